"""Measures generation on held-out prompts: what the README's table is made of.

    python benchmarks/bench_generate.py
    python benchmarks/bench_generate.py --model Qwen/Qwen3-8B --draft-model Qwen/Qwen3-0.6B --name qwen3

Every method completes each prompt before the next prompt; the method that begins changes from prompt to prompt. Figures
are medians over the prompts. Lookahead starts each prompt with an empty memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from specdec.commands import options
from specdec.commands.contenders import assisted_kwargs, encode_prompts, hf_methods, specdec_methods
from specdec.commands.demo_display import summary_table
from specdec.commands.errors import UserError, with_short_errors
from specdec.commands.loading import EMBEDDED, load_model, own_draft_model, prepare_torch
from specdec.embedded import heldout_prompts, read_prompts
from specdec.measuring import EncodedPrompt, Measurement, Method, Settings, run_interleaved
from specdec.provenance import circumstances, model_info, write_json

RESULTS = Path(__file__).parent / "results"
PARTS = ("greedy", "sampled", "incompressible")
RANDOM_PROMPT_TOKENS = 128

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, add_completion=False)


def random_prompts(count: int, target: Any) -> list[EncodedPrompt]:
    """Prompts of random tokens, in which there is nothing to look up."""
    vocab = target.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocab, (count, 1, RANDOM_PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    return [EncodedPrompt(f"random {i}", row) for i, row in enumerate(ids.to(target.device))]


def measure(
    part: str,
    methods: Sequence[Method],
    prompts: Sequence[EncodedPrompt],
    target: Any,
    settings: Settings,
    repeats: int,
) -> Measurement:
    """Measures with a progress bar; the last prompt is for the warm-up."""
    *measured, warm_up = prompts
    # No refresh in the background: it would be timed too.
    with Progress(auto_refresh=False) as progress:
        task = progress.add_task(part, total=len(methods) * (1 + len(measured) * repeats))

        def advance(*args: object) -> None:
            progress.update(task, advance=1, refresh=True)

        return run_interleaved(methods, measured, target, settings, warm_up, repeats, advance, advance)


@app.command()
@with_short_errors
def main(
    name: Annotated[str, typer.Option(help="Of the file in benchmarks/results.")] = "embedded",
    model: options.Model = EMBEDDED,
    draft_model: options.DraftModel = None,
    prompt_file: Annotated[Path | None, typer.Option(help='JSONL, {"prompt": "..."} a line.')] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts per part.")] = 20,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per completion.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Runs per prompt and method.")] = 1,
    part: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(PARTS)}; may be repeated.")] = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Measure all methods and write benchmarks/results/NAME.json."""
    if unknown := set(part or []) - set(PARTS):
        raise UserError(f"--part {', '.join(sorted(unknown))} is not known; use {', '.join(PARTS)}")
    chosen = read_prompts(prompt_file)[: prompts + 1] if prompt_file else heldout_prompts(prompts + 1)
    if len(chosen) < 2:
        raise UserError("there must be two prompts at least: the last one is for the warm-up")
    prepare_torch(threads)
    draft_name = draft_model or own_draft_model(model)
    target, tokenizer = load_model(model, dtype, device)
    draft, draft_tokenizer = load_model(draft_name, dtype, device) if draft_name else (None, None)
    ours = specdec_methods(target, draft)
    everything = hf_methods(target, draft, assisted_kwargs(tokenizer, draft_tokenizer) if draft_name else {}) + ours
    encoded = encode_prompts(chosen, tokenizer, target.device)
    sampled = Settings.of(tokens, do_sample=True, temperature=1.0, seed=seed)
    plans = {
        "greedy": (everything, encoded, Settings.of(tokens)),
        "sampled": (everything, encoded, sampled),
        # Sampled, because greedy continuations of random tokens soon repeat themselves.
        "incompressible": (ours, random_prompts(len(encoded), target), sampled),
    }
    console, results = Console(), {}
    for current in part or PARTS:
        methods, inputs, settings = plans[current]
        result = measure(current, methods, inputs, target, settings, repeats)
        console.print(summary_table(result, f"{current}, {tokens} tokens, batch 1, {len(inputs) - 1} prompts"))
        results[current] = result.to_dict()
    models = {"target": model_info(model, target), "draft": model_info(draft_name, draft) if draft_name else None}
    shape = {"batch": 1, "num_prompts": len(encoded) - 1, "repeats": repeats}
    write_json(RESULTS / f"{name}.json", {**circumstances(), "models": models, **shape, "parts": results})
    console.print(f"written to {RESULTS / name}.json", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
