"""`specdec demo`: plain, assisted and speculative decoding side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.commands import options
from specdec.commands.errors import UserError, user_errors
from specdec.commands.loading import EMBEDDED, load_model, own_draft_model, prepare_torch, read_text

if TYPE_CHECKING:
    from rich.console import Console

    from specdec.embedded import Prompt
    from specdec.measuring import EncodedPrompt, Measurement, Method, Sample, Settings


def run(
    prompts: Annotated[int, typer.Option(min=1, help="Prompts to complete with each method.")] = 6,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per completion.")] = 128,
    model: options.Model = EMBEDDED,
    draft_model: options.DraftModel = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help='JSONL, {"prompt": "..."} a line, or a text: one prompt.')
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all samples and settings to a file.")] = None,
    sample: options.Sample = False,
    temperature: Annotated[float, typer.Option(min=1e-3, help="With --sample.")] = 1.0,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Complete Python functions with HF generate, prompt lookup, assisted generation, and with specdec."""
    from rich.console import Console

    console = Console()
    chosen = _prompts(prompt_file, prompts + 1)
    with console.status("loading torch and the models"):
        prepare_torch(threads)
        draft_model = draft_model or own_draft_model(model)
        target, tokenizer = load_model(model, dtype, device)
        draft, draft_tokenizer = load_model(draft_model, dtype, device) if draft_model else (None, None)

    from specdec.commands.contenders import assisted_kwargs, encode_prompts, hf_methods, specdec_methods
    from specdec.measuring import Settings

    settings = Settings.of(tokens, sample, temperature, seed)
    encoded = encode_prompts(chosen, tokenizer, target.device)
    kwargs = assisted_kwargs(tokenizer, draft_tokenizer) if draft is not None else {}
    methods = [*hf_methods(target, draft, kwargs), *specdec_methods(target, draft, shared=True)]
    # The prompt after the last one is for the warm-up, if there is one.
    result = _measure(console, methods, encoded[:prompts], encoded[-1], target, tokenizer, settings)
    _print_results(console, result, model, draft_model, target)
    _print_completion(console, chosen[0].text, encoded[0], target, tokenizer, settings)
    if json_file is not None:
        _write(json_file, result, (model, target), (draft_model, draft))
        console.print(f"written to {json_file}", highlight=False, soft_wrap=True)


def _prompts(file: Path | None, count: int) -> Sequence[Prompt]:
    from specdec.embedded import heldout_prompts, read_prompts

    with user_errors(ValueError, FileNotFoundError):
        if file is None:
            return heldout_prompts(count)
        read_text(file)
        found = read_prompts(file)[:count]
    if not any(p.text.strip() for p in found):
        raise UserError(f"{file} holds no prompt; write one JSON object with a prompt a line")
    return found


def _measure(
    console: Console,
    methods: Sequence[Method],
    prompts: Sequence[EncodedPrompt],
    warm_up: EncodedPrompt,
    target: Any,
    tokenizer: Any,
    settings: Settings,
) -> Measurement:
    """Runs all methods with the display of this console."""
    from specdec.commands.demo_display import display_for
    from specdec.measuring import run_interleaved

    with display_for(console, [m.name for m in methods], len(prompts)) as display:

        def on_sample(sample: Sample) -> None:
            display.ran(sample, tokenizer.decode(sample.output or [], skip_special_tokens=True))

        return run_interleaved(
            methods,
            prompts,
            target,
            settings,
            warm_up,
            on_warm_up=display.warmed_up,
            on_sample=on_sample,
        )


def _print_results(console: Console, result: Measurement, model: str, draft_model: str | None, target: Any) -> None:
    from specdec.commands.demo_display import summary_table
    from specdec.provenance import hardware

    machine = hardware()
    asked = result.settings.arguments
    mode = f"sampled, T={asked['temperature']:g}" if asked["do_sample"] else "greedy"
    where = ", ".join(machine["gpus"]) if target.device.type == "cuda" else machine["cpu"]
    console.print()
    console.print(summary_table(result, f"{mode}, {asked['max_new_tokens']} tokens, batch 1, median over prompts"))
    for name, reason in result.failed.items():
        console.print(f"{name} is left out: {reason}", highlight=False, soft_wrap=True)
    parameters = target.num_parameters() / 1e6
    console.print(
        f"{model} ({parameters:.1f} M parameters, {str(target.dtype).removeprefix('torch.')}), "
        f"draft model {draft_model or 'none'}; {where}, {machine['threads']} threads",
        highlight=False,
        soft_wrap=True,
    )


def _print_completion(
    console: Console, text: str, prompt: EncodedPrompt, target: Any, tokenizer: Any, settings: Settings
) -> None:
    """One completion, with the tokens that had been drafted marked; a run of its own, as marking takes time."""
    from specdec.api import accelerate
    from specdec.commands.accepted_drafts import pieces_of
    from specdec.commands.contenders import LOOKAHEAD
    from specdec.commands.demo_display import DRAFTED, completion_text
    from specdec.drafters.lookahead import LookaheadDrafter
    from specdec.measuring import Method, run_once

    fast = accelerate(target, LookaheadDrafter())
    sample = run_once(Method(LOOKAHEAD, lambda: fast, {"trace": True}), fast, prompt, target, settings)
    output, trace = sample.output or [], fast.report.trace
    passes = trace.passes[1:] if trace is not None else []  # the first one is the prefill
    accepted = [len(made.tokens) - 1 for made in passes] if passes else [0] * len(output)
    pieces = pieces_of(output, accepted, tokenizer)
    console.print(f"\n{prompt.id}, completed with {LOOKAHEAD}:", highlight=False, soft_wrap=True)
    if console.is_terminal:
        console.print(f"[{DRAFTED}]these tokens[/] were drafted and accepted")
    console.print("\n", completion_text(text, pieces), sep="")


def _write(file: Path, result: Measurement, target: tuple[str, Any], draft: tuple[str | None, Any]) -> None:
    from specdec.provenance import circumstances, model_info, write_json

    models = {"target": model_info(*target), "draft": model_info(draft[0], draft[1]) if draft[0] else None}
    with user_errors(OSError):
        write_json(file, {**circumstances(), "models": models, **result.to_dict()})
