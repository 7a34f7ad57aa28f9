"""`specdec demo`: the benchmark on a few short chat prompts, with the completions side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.commands import options
from specdec.common.errors import UserError, user_errors
from specdec.common.loading import EMBEDDED, load_model, own_draft_model, path_of, prepare_torch, read_text

if TYPE_CHECKING:
    from rich.console import Console

    from specdec.benchmark import BenchmarkResults
    from specdec.benchmark.measuring import EncodedPrompt

SMOLLM2 = "smollm2"
CHAT_TOKENS, CODE_TOKENS = 28, 128
"""Default tokens per completion. With eight prompts and `CHAT_TOKENS` the demo of SmolLM2 takes less than two minutes
on two cores."""
FLOAT32_PROMPTS, FLOAT32_TOKENS = 2, 24
"""Prompts and tokens that are compared in float32 where the demo runs in another dtype."""


def run(
    prompts: Annotated[int, typer.Option(min=1, help="Number of prompts.")] = 8,
    tokens: Annotated[
        int | None,
        typer.Option(min=2, help=f"Tokens per completion. Default: {CHAT_TOKENS}; without a chat template 128."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub name of a causal LM, or embedded. Default: smollm2, if it is there."),
    ] = None,
    draft_model: options.DraftModel = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help='JSONL, {"prompt": "..."} a line, or a text file: one prompt.')
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to a JSON file.")] = None,
    sample: options.Sample = False,
    temperature: Annotated[float, typer.Option(min=1e-3, help="With --sample.")] = 1.0,
    seed: options.Seed = 0,
    dtype: Annotated[str, typer.Option(help="auto (the fastest on this CPU), float32, bfloat16 or float16.")] = "auto",
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
        draft_name = draft_model or own_draft_model(name)
        target, tokenizer = _load_target(console, name, dtype, device)
        draft, draft_tokenizer = load_model(draft_name, dtype, device) if draft_name else (None, None)

    from specdec.benchmark import BenchmarkSettings, run_benchmark

    with user_errors(ValueError, FileNotFoundError):
        tasks = _tasks(prompt_file, tokenizer, prompts + 1)
        settings = BenchmarkSettings(
            max_new_tokens=tokens or (CHAT_TOKENS if tokenizer.chat_template else CODE_TOKENS),
            temperatures=(temperature if sample else 0.0,),
            seed=seed,
            trace=True,
        )
        results = run_benchmark(
            target,
            tokenizer,
            _drafters(console, target, draft),
            tasks[:prompts],
            settings,
            warm_up=tasks[-1],
            draft_model=draft,
            draft_tokenizer=draft_tokenizer,
            console=console,
            show_text=True,
        )
    results.models["target"]["name"] = name
    if results.models["draft"] is not None:
        results.models["draft"]["name"] = draft_name
    _print_results(console, results)
    if str(target.dtype) != "torch.float32" and not sample:
        _compare_in_float32(console, results, (name, device), tasks[:FLOAT32_PROMPTS])
    if json_file is not None:
        with user_errors(OSError):
            results.write_json(json_file)
        _say(console, f"written to {json_file}")


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def _available(console: Console, model: str | None) -> str:
    """The model's name; the embedded one where none is asked for and SmolLM2 cannot be had."""
    try:
        path_of(model or SMOLLM2)
    except UserError as error:
        if model is not None:
            raise
        _say(console, f"The small embedded model is used, because {error}.")
        return EMBEDDED
    return model or SMOLLM2


def _load_target(console: Console, name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """The target and its tokenizer; on a CPU in the fastest dtype, unless one is given."""
    target, tokenizer = load_model(name, dtype, device)
    if dtype != "auto" or target.device.type != "cpu" or name == EMBEDDED:
        return target, tokenizer

    from specdec.common.dtypes import fastest

    target, times = fastest(lambda precision: load_model(name, precision, "cpu")[0])
    shown = ", ".join(f"{precision} {time:.0f} ms" for precision, time in times.items())
    _say(console, f"A pass over one token on this CPU: {shown}. {next(iter(times))} is used.")
    return target, tokenizer


def _tasks(file: Path | None, tokenizer: Any, count: int) -> list[EncodedPrompt]:
    """The prompts; those of the package are short chat tasks for a chat model, else Python code."""
    from specdec.benchmark.prompts import OWN_PROMPTS, read_benchmark_prompts

    if file is not None:
        return read_benchmark_prompts(str(file.resolve()), tokenizer, count)
    if not tokenizer.chat_template:
        return read_benchmark_prompts("embedded", tokenizer, count)
    # The shortest of each category, then the second shortest of each.
    found = sorted(read_benchmark_prompts(next(iter(OWN_PROMPTS)), tokenizer), key=lambda prompt: len(prompt.text))
    ranks = {p.id: sum(q.category == p.category for q in found[:i]) for i, p in enumerate(found)}
    return sorted(found, key=lambda prompt: ranks[prompt.id])[:count]


def _drafters(console: Console, target: Any, draft: Any) -> list[Any]:
    """Lookahead, Medusa, a draft model and auto; what this model has nothing for is left out, with a word."""
    from specdec.benchmark import Contender
    from specdec.drafters.medusa import own_heads

    has_heads = own_heads(target) is not None
    missing = [] if has_heads else ["Medusa (no heads for this model)"]
    if draft is None:
        missing.append("HF assisted and a draft model (no smaller model is at hand; --draft-model names one)")
    if missing:
        _say(console, f"Left out: {'; '.join(missing)}.")
    medusa = ["medusa"] if has_heads else []
    small = [Contender.named("draft-model", draft, optional=True)] if draft is not None else []
    return ["lookahead", *medusa, *small, "auto"]


def _print_results(console: Console, results: BenchmarkResults) -> None:
    from specdec.benchmark.display import summary_table
    from specdec.benchmark.tables import conditions

    (part,) = results.parts.values()
    mode = f"sampled, T={part.part.temperature:g}" if part.part.temperature else "greedy"
    tokens = results.settings.max_new_tokens
    console.print()
    console.print(summary_table(part.measurement, f"{mode}, {tokens} tokens, batch 1, median over prompts"))
    for method, reason in part.measurement.failed.items():
        _say(console, f"{method} is left out: {reason}")
    _say(console, conditions(results))


def _compare_in_float32(
    console: Console,
    results: BenchmarkResults,
    model: tuple[str, str],
    prompts: Sequence[EncodedPrompt],
) -> None:
    """Says why outputs differ from HF generate's, and shows that they do not in float32."""
    from specdec.benchmark import BenchmarkSettings
    from specdec.benchmark.measuring import EncodedPrompt, run_interleaved
    from specdec.benchmark.methods import Contender, hf_methods

    (part,) = results.parts.values()
    if not all(row.num_identical == row.num_runs for row in part.measurement.rows()):
        _say(
            console,
            "Not identical: in half precision a pass over several tokens rounds differently, so where the two best "
            "tokens are almost equally likely, either can win. HF's own prompt lookup has the same effect.",
        )
    with console.status("comparing in float32"):
        target, _ = load_model(model[0], "float32", model[1])
        methods = [hf_methods(target)[0], Contender.named("auto").method(target)]
        asked = BenchmarkSettings(max_new_tokens=FLOAT32_TOKENS).of(part.part)
        encoded = [EncodedPrompt(prompt.id, prompt.input_ids.to(target.device)) for prompt in prompts]
        ours = run_interleaved(methods, encoded, target, asked).rows()[-1]
    _say(
        console,
        f"In float32, specdec auto returns the same tokens as HF generate for {ours.num_identical} of {ours.num_runs} "
        f"prompts ({FLOAT32_TOKENS} tokens each).",
    )
