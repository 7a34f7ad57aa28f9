"""`specdec demo`: transformers' own methods and specdec's, side by side on the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.commands import options
from specdec.common.errors import UserError, user_errors
from specdec.common.loading import EMBEDDED, load_model, own_draft_model, path_of, prepare_torch, read_text

if TYPE_CHECKING:
    from rich.console import Console

    from specdec.benchmark.measuring import EncodedPrompt, Measurement, Method, Sample, Settings

SMOLLM2 = "smollm2"
FLOAT32_PROMPTS, FLOAT32_TOKENS = 2, 24
"""Prompts and tokens that are compared in float32 where the demonstration runs in another precision."""


@dataclass(frozen=True)
class Task:
    """A prompt of the demonstration.

    Args:
        id: For tables.
        text: What is shown of it.
        input_ids: `[1, tokens]`.
        is_code: Whether it is the beginning of a Python file.
    """

    id: str
    text: str
    input_ids: Any
    is_code: bool


def run(
    prompts: Annotated[int, typer.Option(min=1, help="Prompts to complete with each method.")] = 8,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens per completion. Default: 48; embedded: 128.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of a causal LM, or embedded. Default: smollm2, if it is there."),
    ] = None,
    draft_model: options.DraftModel = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help='JSONL, {"prompt": "..."} a line, or a text: one prompt.')
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all samples and settings to a file.")] = None,
    sample: options.Sample = False,
    temperature: Annotated[float, typer.Option(min=1e-3, help="With --sample.")] = 1.0,
    seed: options.Seed = 0,
    dtype: Annotated[str, typer.Option(help="auto (on a CPU the fastest), float32, bfloat16 or float16.")] = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Answer chat prompts with HF generate, prompt lookup, assisted generation, and with specdec."""
    from rich.console import Console

    console = Console()
    if prompt_file is not None:
        read_text(prompt_file)
    prepare_torch(threads)
    name = _available(console, model)
    with console.status("loading torch and the models"):
        draft_model = draft_model or own_draft_model(name)
        target, tokenizer = _load_target(console, name, dtype, device)
        draft, draft_tokenizer = load_model(draft_model, dtype, device) if draft_model else (None, None)

    from specdec.benchmark.baselines import assisted_kwargs
    from specdec.benchmark.measuring import Settings

    tasks = _tasks(prompt_file, tokenizer, prompts + 1)
    settings = Settings.of(tokens or (48 if tokenizer.chat_template else 128), sample, temperature, seed)
    kwargs = assisted_kwargs(tokenizer, draft_tokenizer) if draft is not None else {}
    methods = _methods(console, target, draft, kwargs, sample)
    result = _measure(console, methods, tasks, prompts, target, tokenizer, settings)
    _print_results(console, result, name, draft_model, target)
    if str(target.dtype) != "torch.float32" and not sample:
        _compare_in_float32(console, result, name, device, tasks[:FLOAT32_PROMPTS])
    if json_file is not None:
        _write(json_file, result, (name, target), (draft_model, draft))
        console.print(f"written to {json_file}", highlight=False, soft_wrap=True)


def _available(console: Console, model: str | None) -> str:
    """The model's name; the embedded one where none is asked for and SmolLM2 cannot be had."""
    try:
        path_of(model or SMOLLM2)
    except UserError as error:
        if model is not None:
            raise
        console.print(f"The small embedded model is shown, as {error}.", highlight=False, soft_wrap=True)
        return EMBEDDED
    return model or SMOLLM2


def _load_target(console: Console, name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """The target, in the fastest precision where that is left open on a CPU, and its tokenizer."""
    target, tokenizer = load_model(name, dtype, device)
    if dtype != "auto" or target.device.type != "cpu" or name == EMBEDDED:
        return target, tokenizer

    from specdec.common.dtypes import fastest

    target, times = fastest(lambda precision: load_model(name, precision, "cpu")[0])
    shown = ", ".join(f"{precision} {time:.0f} ms" for precision, time in times.items())
    console.print(f"A pass over one token on this CPU: {shown}. {next(iter(times))} is used.", highlight=False)
    return target, tokenizer


def _tasks(file: Path | None, tokenizer: Any, count: int) -> list[Task]:
    """The prompts; those of the package are short chat tasks for a chat model, else Python code."""
    from specdec.benchmark.prompts import spread_over
    from specdec.common.embedded import heldout_prompts, read_prompts
    from specdec.common.prompts import own_prompts

    if file is None and tokenizer.chat_template:
        # One of each category, the shortest, before the next of each.
        own = sorted(own_prompts(), key=lambda p: len(p.messages[-1]["content"]))
        by_round = sorted(own, key=lambda p: [q.id for q in own if q.category == p.category].index(p.id))
        return [Task(p.id, p.messages[-1]["content"], p.encode(tokenizer).input_ids, False) for p in by_round[:count]]
    with user_errors(ValueError, FileNotFoundError):
        found = heldout_prompts(count) if file is None else spread_over(read_prompts(file)[:count], None)
    if not any(p.text.strip() for p in found):
        raise UserError(f"{file} holds no prompt; write one JSON object with a prompt a line")
    return [Task(p.id, p.text, tokenizer(p.text, return_tensors="pt").input_ids, True) for p in found]


def _methods(console: Console, target: Any, draft: Any, kwargs: dict[str, Any], sample: bool) -> list[Method]:
    """The benchmark's methods; what this model has nothing for is left out, with a word."""
    from specdec.benchmark.baselines import OFF
    from specdec.benchmark.contenders import Contender, methods_of
    from specdec.benchmark.settings import Part
    from specdec.drafters.medusa import own_heads

    names, missing = ["lookahead"], []
    if own_heads(target) is not None:
        names.append("medusa")
    else:
        missing.append("Medusa (no heads for this model)")
    if draft is not None:
        names.append("draft-model")
    else:
        missing.append("HF assisted and a draft model (no smaller model is at hand; --draft-model names one)")
    if missing:
        console.print(f"Left out: {'; '.join(missing)}.", highlight=False, soft_wrap=True)
    ours = [Contender.named(name, draft, optional=name == "draft-model") for name in [*names, "auto"]]
    part = Part("demo", float(sample), 1)
    return methods_of(target, [Contender(OFF, lambda: None), *ours], part, draft, kwargs)


def _measure(
    console: Console,
    methods: Sequence[Method],
    tasks: Sequence[Task],
    count: int,
    target: Any,
    tokenizer: Any,
    settings: Settings,
) -> Measurement:
    """Runs all methods with the display of this console."""
    from specdec.benchmark.measuring import EncodedPrompt, run_interleaved
    from specdec.commands.accepted_drafts import Traced
    from specdec.commands.demo_display import display_for

    encoded = [EncodedPrompt(task.id, task.input_ids.to(target.device)) for task in tasks]
    by_id = {task.id: task for task in tasks}
    traced = Traced(tokenizer)
    with display_for(console, [m.name for m in methods], min(count, len(tasks))) as display:

        def on_sample(sample: Sample) -> None:
            display.ran(sample, traced.pieces(sample))

        def on_round(prompt: EncodedPrompt, samples: list[Sample]) -> None:
            task = by_id[prompt.id]
            display.round_ended(task.id, task.text, task.is_code, samples[-1], traced.pieces(samples[-1]))

        # The prompt after the last one is for the warm-up, if there is one.
        return run_interleaved(
            [traced.method(method) for method in methods],
            encoded[:count],
            target,
            settings,
            encoded[-1],
            on_warm_up=display.warmed_up,
            on_sample=on_sample,
            on_round=on_round,
        )


def _print_results(console: Console, result: Measurement, model: str, draft_model: str | None, target: Any) -> None:
    from specdec.commands.demo_display import summary_table
    from specdec.common.provenance import hardware

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


def _compare_in_float32(console: Console, result: Measurement, name: str, device: str, tasks: Sequence[Task]) -> None:
    """Says where outputs differ from HF generate's, and shows that they do not in float32."""
    from specdec.benchmark.contenders import Contender, methods_of
    from specdec.benchmark.measuring import EncodedPrompt, run_interleaved
    from specdec.benchmark.settings import Part

    if not all(row.num_identical == row.num_runs for row in result.rows()):
        console.print(
            "Not identical: in half precision a pass over several tokens rounds differently, so where the two best "
            "tokens are almost equally likely, either can win. HF's own prompt lookup has the same effect.",
            highlight=False,
            soft_wrap=True,
        )
    with console.status("comparing in float32"):
        target, _ = load_model(name, "float32", device)
        methods = [
            m for m in methods_of(target, [Contender.named("auto")], Part("float32", 0.0, 1)) if "lookup" not in m.name
        ]
        encoded = [EncodedPrompt(task.id, task.input_ids.to(target.device)) for task in tasks]
        settings = replace(result.settings, arguments={**result.settings.arguments, "max_new_tokens": FLOAT32_TOKENS})
        ours = run_interleaved(methods, encoded, target, settings).rows()[-1]
    console.print(
        f"In float32, specdec auto returns the same tokens as HF generate for {ours.num_identical} of {ours.num_runs} "
        f"prompts ({FLOAT32_TOKENS} tokens each).",
        highlight=False,
        soft_wrap=True,
    )


def _write(file: Path, result: Measurement, target: tuple[str, Any], draft: tuple[str | None, Any]) -> None:
    from specdec.common.provenance import circumstances, model_info, write_json

    models = {"target": model_info(*target), "draft": model_info(draft[0], draft[1]) if draft[0] else None}
    with user_errors(OSError):
        write_json(file, {**circumstances(), "models": models, **result.to_dict()})
