"""Counts how often half precision leaves plain decoding's text, and how many near-ties are counted.

    python benchmarks/bench_near_ties.py
    python benchmarks/bench_near_ties.py --dtype float16 --prompts 32

Each prompt is continued by `model.generate` and, under the same seed, by speculation whose trees are verified whole, so
that most passes are wide ones. An output differs from its first other token on; what matters is how many outputs
are the same to the end, and per how many tokens one leaves. "plain" is specdec's loop without drafts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import specdec
from specdec.budget import Budget
from specdec.common.embedded import heldout_prompts, load_embedded
from specdec.common.provenance import circumstances, model_info, write_json
from specdec.passes.near_ties import gap_of

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("identical", "tokens_until_divergence", "near_ties", "tokens_per_pass", "largest_gap")
WAYS = {"plain": None, "lookahead": "lookahead"}

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, add_completion=False)


class Count:
    """What became of all outputs of one way to generate."""

    def __init__(self) -> None:
        self.identical = self.outputs = self.same_tokens = self.left = 0
        self.near_ties = self.tokens = self.passes = 0
        self.gaps: list[float] = []

    def add(self, mine: Tensor, plain: Tensor, scores: tuple[Tensor, ...], prompt: int, report: Any) -> None:
        """Compares an output `[tokens]` with plain decoding's."""
        length = min(len(mine), len(plain))
        differs = (mine[:length] != plain[:length]).nonzero()
        first = int(differs[0]) if len(differs) else length
        is_same = len(mine) == len(plain) and first == length
        self.outputs += 1
        self.identical += is_same
        self.same_tokens += first - prompt
        self.left += not is_same
        self.near_ties += report.num_near_ties or 0
        self.tokens += report.num_generated_tokens
        self.passes += report.num_row_passes
        if not is_same and first < length:
            self.gaps.append(float(scores[first - prompt].topk(2).values.diff().abs()))

    def row(self) -> dict[str, Any]:
        """Its figures."""
        return {
            "identical": self.identical,
            "outputs": self.outputs,
            "tokens_until_divergence": round(self.same_tokens / self.left) if self.left else None,
            "near_ties": self.near_ties,
            "tokens": self.tokens,
            "tokens_per_pass": round(self.tokens / self.passes, 2),
            "largest_gap": max(self.gaps, default=None),
        }


@app.command()
def main(
    prompts: Annotated[int, typer.Option(help="Prompts to continue.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens per prompt.")] = 128,
    max_nodes: Annotated[int, typer.Option(help="Largest tree.")] = 16,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    output: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS / "near_ties.json",
) -> None:
    """Runs the comparison and prints it."""
    model, tokenizer = load_embedded()
    model = model.to(getattr(torch, dtype))
    gap = gap_of(specdec.accelerate(model, None).capability.rounding or 0.0)
    budget = Budget(max_nodes, fixed=True)
    fast = {name: specdec.accelerate(model, drafter, budget=budget) for name, drafter in WAYS.items()}
    results: list[dict[str, Any]] = []
    for do_sample in (False, True):
        counts = {name: Count() for name in WAYS}
        for seed, prompt in enumerate(heldout_prompts(prompts)):
            inputs = tokenizer(prompt.text, return_tensors="pt")
            kwargs: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": do_sample, "temperature": None}
            torch.manual_seed(seed)
            plain = model.generate(**inputs, **kwargs, output_scores=True, return_dict_in_generate=True)
            for name, way in fast.items():
                torch.manual_seed(seed)
                ids = way.generate(**inputs, **kwargs)
                size = inputs["input_ids"].shape[1]
                counts[name].add(ids[0], plain.sequences[0], plain.scores, size, way.report)
        results += [{"way": name, "do_sample": do_sample} | count.row() for name, count in counts.items()]
    settings = {"prompts": prompts, "new_tokens": new_tokens, "max_nodes": max_nodes, "gap": gap}
    write_json(
        output, circumstances() | {"model": model_info("embedded", model), "settings": settings, "results": results}
    )
    table = Table(title=f"{dtype}, near-tie: a gap below {gap:.4g}")
    for column in ("way", "sampled", "outputs", *COLUMNS):
        table.add_column(column.replace("_", " "))
    for row in results:
        table.add_row(
            row["way"], "yes" if row["do_sample"] else "no", str(row["outputs"]), *(str(row[c]) for c in COLUMNS)
        )
    Console().print(table)


if __name__ == "__main__":
    app()
