"""Measures what merging and budgeting cost per step, without a model: the sources hand out trees made beforehand.

    python benchmarks/bench_merge.py
    python benchmarks/bench_merge.py --nodes 16 --sources 2 --rows 8

The sources share part of their paths, as real ones do, and one of their paths is right now and then. "draft" is the
merged drafter's `propose` without its sources' own, "observe" is all that it learns from a step, "choose" and "count"
are the budget's share. A step is all of them. The last of several sources is expensive, so that it pauses.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from specdec.budget import Budget
from specdec.common.provenance import circumstances, write_json
from specdec.drafters.base import DraftContext, Drafter, Step
from specdec.drafters.merged import MergedDrafter
from specdec.drafters.merging.session import MergedSession
from specdec.tree import NODE_BUCKETS, TokenTree

RESULTS = Path(__file__).parent / "results"
VOCAB, COMMON, TREES = 32_000, 6, 64
PASS_SECONDS, DEAR_SECONDS = 0.01, 0.001
PARTS = ("draft", "choose", "observe", "count", "step")

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, add_completion=False)


class Model:
    """As much of a target as a merged drafter looks at."""

    def get_input_embeddings(self) -> Any:
        return torch.nn.Embedding(VOCAB, 1)


def random_tree(rng: np.random.Generator, rows: int, nodes: int) -> TokenTree:
    """Trees of few tokens, so that sources agree on some paths."""
    tokens = rng.integers(1, 1 + COMMON, (rows, nodes))
    tokens[:, 0] = 0
    parents = np.array([[max(-1, rng.integers(max(0, node // 2 - 4), node)) if node else -1 for node in range(nodes)]])
    scores = np.sort(rng.random((rows, nodes)).astype(np.float32), 1)[:, ::-1].copy()
    return TokenTree(torch.from_numpy(tokens), torch.from_numpy(np.repeat(parents, rows, 0)), torch.from_numpy(scores))


class Clock:
    """Real time, and some that is only said to have passed."""

    passed = 0.0

    def __call__(self) -> float:
        return time.perf_counter() + self.passed


@dataclass(eq=False)
class Recorded(Drafter):
    """Hands out trees one after the other."""

    trees: list[TokenTree] = field(default_factory=list)
    name = "recorded"
    clock: Clock | None = None
    turn: int = 0

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        self.turn += 1
        if self.clock is not None:
            self.clock.passed += DEAR_SECONDS
        return self.trees[self.turn % len(self.trees)]


def one_step(
    session: MergedSession, budget: Budget, texts: list[Any], length: int, right: Any, passing: Clock
) -> dict[str, float]:
    """One step's times in microseconds; `right` are the tokens that the target would have picked, `[rows, depth]`."""
    rows = len(texts)
    clock = time.perf_counter_ns
    context = DraftContext(list(range(rows)), [text[:length] for text in texts], [1] * rows, [100] * rows)
    began = clock()
    tree = session.propose(context, budget.nodes_to_draft())
    drafted = clock()
    chosen = budget.choose(tree, 1e-5)
    chose = clock()
    accepted = []
    for row in range(rows):
        path, parents, tokens = [0], chosen.parents[row].tolist(), chosen.tokens[row].tolist()
        for token in right[row]:
            found = [n for n in range(path[-1] + 1, len(tokens)) if parents[n] == path[-1] and tokens[n] == token]
            if not found:
                break
            path.append(found[0])
        accepted.append(path[1:])
        texts[row][length : length + len(path)] = right[row][: len(path)]
    after = [text[: length + len(nodes) + 1] for text, nodes in zip(texts, accepted, strict=True)]
    context = DraftContext(list(range(rows)), after, [1] * rows, [100] * rows)
    new_tokens = [text[length : length + len(nodes) + 1] for text, nodes in zip(texts, accepted, strict=True)]
    step = Step(context.rows, chosen, [len(nodes) for nodes in accepted], new_tokens=new_tokens)
    picked = [right[row][: len(nodes) + 1].tolist() for row, nodes in enumerate(accepted)]
    passing.passed += PASS_SECONDS
    observing = clock()
    session.observe(context, step)
    observed = clock()
    budget.observe(chosen, accepted, picked)
    counted = clock()
    times = [drafted - began, chose - drafted, observed - observing, counted - observed]
    return {part: taken / 1e3 for part, taken in zip(PARTS, [*times, sum(times)], strict=True)}


def measure(rows: int, nodes: int, sources: int, steps: int) -> list[dict[str, float]]:
    """Times of each step in microseconds, the sources' own left out."""
    rng = np.random.default_rng(0)
    recorded = [Recorded([random_tree(rng, rows, nodes) for _ in range(TREES)]) for _ in range(sources)]
    drafter, budget, passing = MergedDrafter(recorded, max_nodes=nodes), Budget(nodes), Clock()
    drafter._clock = passing
    if sources > 1:
        recorded[-1].clock = passing
    drafter.bind(Model())
    session = drafter.start(DraftContext([], [], [], []))
    budget.set_size(rows, 100)
    budget.times.seconds = {size: PASS_SECONDS * (1 + size / 256) for size in NODE_BUCKETS if size <= nodes}
    out = []
    gc.disable()
    for _ in range(steps):
        texts = [np.zeros(200, np.int32) for _ in range(rows)]
        right = rng.integers(1, 1 + COMMON, (rows, 12))
        out.append(one_step(session, budget, texts, 100, right, passing))
    return out


def table(results: dict[str, dict[str, float]], title: str) -> Table:
    out = Table("part", "median (us)", "p99 (us)", title=title, title_justify="left")
    for part, figures in results.items():
        out.add_row(part, f"{figures['median']:.1f}", f"{figures['p99']:.1f}")
    return out


@app.command()
def main(
    rows: Annotated[int, typer.Option(min=1, help="Rows of the batch.")] = 1,
    nodes: Annotated[int, typer.Option(min=2, help="Nodes of each source's tree, and of the merged one.")] = 64,
    sources: Annotated[int, typer.Option(min=1, max=8, help="How many are merged.")] = 3,
    steps: Annotated[int, typer.Option(min=10, help="Steps measured.")] = 5000,
    output: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "merge.json",
) -> None:
    """Measures and prints the figures, and writes them with the circumstances."""
    measure(rows, nodes, sources, 50)  # compiles
    every = measure(rows, nodes, sources, steps)
    results = {
        part: {
            "median": float(np.median([step[part] for step in every])),
            "mean": float(np.mean([step[part] for step in every])),
            "p99": float(np.percentile([step[part] for step in every], 99)),
        }
        for part in PARTS
    }
    settings = {"rows": rows, "nodes": nodes, "sources": sources, "steps": steps}
    write_json(output, {**circumstances(), "settings": settings, "results": results})
    console = Console()
    console.print(table(results, f"merging {sources} sources of {nodes} nodes, {rows} rows"))
    console.print(f"written to {output}")


if __name__ == "__main__":
    app()
