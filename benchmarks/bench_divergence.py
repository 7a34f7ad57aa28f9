"""Counts greedy outputs that are those of `generate`, and tells where and how closely the others leave it.

    python benchmarks/bench_divergence.py
    python benchmarks/bench_divergence.py --model FOLDER --dtypes bfloat16 --prompts 16

Each prompt is continued by the model's own `generate` and by each method. For outputs that differ the report has the
tokens before the first other one, and the gap between the two best logits of `generate` there. Speculation is
deterministic here, so that the counts can be repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isnan, nan
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import specdec
from specdec.common.loading import load_model
from specdec.common.prompts import own_prompts
from specdec.common.provenance import circumstances, model_info, write_json

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("identical", "prompts", "median_tokens_until_divergence", "median_gap", "largest_gap", "tokens_per_pass")

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="Folder or hub name of a chat model, or smollm2.")] = "smollm2",
    dtypes: Annotated[str, typer.Option(help="Separated by commas.")] = "bfloat16,float32",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts to continue, spread over all kinds.")] = 18,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per prompt.")] = 96,
    compiled: Annotated[bool, typer.Option(help="Include generate with a static cache, compiled.")] = True,
    output: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS / "divergence.json",
) -> None:
    """Runs the comparison and prints it."""
    available = own_prompts()
    chosen = available[:: max(len(available) // prompts, 1)][:prompts]
    results: list[dict[str, Any]] = []
    info: dict[str, Any] = {}
    for dtype in dtypes.split(","):
        target, tokenizer = load_model(model, dtype, "auto")
        info = model_info(Path(model).name, target)
        inputs = [prompt.encode(tokenizer).to(target.device) for prompt in chosen]
        for name, row in divergences(target, inputs, new_tokens, compiled).items():
            results.append({"dtype": dtype, "method": name} | row)
    settings = {"prompts": len(chosen), "new_tokens": new_tokens, "greedy": True}
    write_json(output, circumstances() | {"model": info, "settings": settings, "results": results})
    table = Table()
    for column in ("dtype", "method", *COLUMNS):
        table.add_column(column.replace("_", " "))
    for row in results:
        table.add_row(row["dtype"], row["method"], *(str(row[column]) for column in COLUMNS))
    Console().print(table)


def divergences(model: Any, inputs: list[Any], new_tokens: int, compiled: bool) -> dict[str, dict[str, Any]]:
    """Figures of each method against the model's own `generate`."""
    kwargs: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False}
    drafters = {"specdec off": None, "specdec lookahead": "lookahead", "specdec auto": "auto"}
    ours = {name: specdec.accelerate(model, drafter, deterministic=True) for name, drafter in drafters.items()}
    methods: dict[str, Callable[..., Tensor]] = {name: fast.generate for name, fast in ours.items()}
    methods["transformers prompt lookup"] = lambda **given: model.generate(**given, prompt_lookup_num_tokens=10)
    if compiled:
        methods["transformers compiled"] = lambda **given: model.generate(**given, cache_implementation="static")
    found: dict[str, list[tuple[int, float] | None]] = {name: [] for name in methods}
    passes, tokens = dict.fromkeys(ours, 0), dict.fromkeys(ours, 0)
    for given in inputs:
        plain = model.generate(**given, **kwargs, output_logits=True, return_dict_in_generate=True)
        for name, generate in methods.items():
            mine = generate(**given, **kwargs)
            found[name].append(first_difference(mine[0], plain, given["input_ids"].shape[1]))
            if name in ours:
                passes[name] += ours[name].report.num_row_passes
                tokens[name] += ours[name].report.num_generated_tokens
    return {
        name: figures(of) | {"tokens_per_pass": round(tokens[name] / passes[name], 2) if name in ours else None}
        for name, of in found.items()
    }


def first_difference(mine: Tensor, plain: Any, prompt: int) -> tuple[int, float] | None:
    """Tokens before the first other one, and the gap of the two best logits there; None for the same output."""
    theirs = plain.sequences[0]
    if torch.equal(mine, theirs):
        return None
    length = min(len(mine), len(theirs))
    differs = (mine[:length] != theirs[:length]).nonzero()
    first = (int(differs[0]) if len(differs) else length) - prompt
    if first >= len(plain.logits):
        return first, nan
    best = plain.logits[first][0].float().topk(2).values
    return first, float(best[0] - best[1])


def figures(differences: list[tuple[int, float] | None]) -> dict[str, Any]:
    """Counts and medians."""
    left = [found for found in differences if found is not None]
    gaps = [gap for _, gap in left if not isnan(gap)]
    return {
        "identical": len(differences) - len(left),
        "prompts": len(differences),
        "median_tokens_until_divergence": median(first for first, _ in left) if left else None,
        "median_gap": round(median(gaps), 4) if gaps else None,
        "largest_gap": round(max(gaps), 4) if gaps else None,
    }


if __name__ == "__main__":
    app()
