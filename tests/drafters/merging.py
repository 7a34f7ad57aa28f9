"""What the tests of merged drafters share: sources of a known kind, a clock to be set, and a merge in plain Python."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from specdec.drafters import DraftContext, Drafter, MergedDrafter, Step
from specdec.drafters.merging import known as merge_known
from specdec.drafters.merging.growth import DEPTH_CLASSES, MOST_SURE, SCORE_BINS
from specdec.drafters.merging.session import MergedSession
from specdec.tree import TokenTree
from tests.tiny_models import tiny_model


@dataclass(eq=False)
class ScriptedDrafter(Drafter):
    """Proposes what a function says, and remembers what it is told.

    Args:
        script: Given the context, the tree.
        label: Its name.
        clock: Moved on by `seconds` at each proposal.
        seconds: What a proposal takes.
    """

    script: Callable[[DraftContext], TokenTree]
    label: str = "scripted"
    clock: FakeClock | None = None
    seconds: float = 0.0
    steps: list[Step] = field(default_factory=list)
    calls: int = 0

    def __post_init__(self) -> None:
        self.name = self.label

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        self.calls += 1
        if self.clock is not None:
            self.clock.now += self.seconds
        return self.script(context).first(max_nodes)

    def observe(self, context: DraftContext, step: Step) -> None:
        self.steps.append(step)


@dataclass
class FakeClock:
    """A clock that stands still."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def context_of(*sequences: Sequence[int], room: int = 50, **extra: Any) -> DraftContext:
    arrays = [np.array(ids, np.int32) for ids in sequences]
    return DraftContext(list(range(len(arrays))), arrays, [1] * len(arrays), [room] * len(arrays), **extra)


def paths_tree(root: int, paths: dict[tuple[int, ...], float]) -> TokenTree:
    """A tree of one row from its paths, each with the score of its last node."""
    nodes = {(): 0} | {path: i for i, path in enumerate(paths, 1)}
    tokens = [root, *(path[-1] for path in paths)]
    parents = [-1, *(nodes[path[:-1]] for path in paths)]
    return TokenTree.from_rows([tokens], [parents], [[0.0, *paths.values()]])


def paths_of(tree: TokenTree, row: int = 0) -> dict[tuple[int, ...], float]:
    """Score by path, in the order of the nodes; a path that stands twice is an error."""
    assert tree.scores is not None
    paths: list[tuple[int, ...] | None] = [()]
    out: dict[tuple[int, ...], float] = {}
    for node in range(1, tree.num_nodes):
        parent = int(tree.parents[row, node])
        above = paths[parent] if parent >= 0 else None
        path = None if above is None else (*above, int(tree.tokens[row, node]))
        paths.append(path)
        if path is not None:
            assert path not in out, f"{path} stands there twice"
            out[path] = float(tree.scores[row, node])
    return out


def merging(*sources: Drafter, clock: Any = None, **settings: Any) -> MergedDrafter:
    """A merged drafter, ready to be used without a model; time stands still."""
    merge_known._KNOWN.clear()  # nothing of an earlier one in the same test
    drafter = MergedDrafter(sources, **settings)
    drafter._clock = clock or FakeClock()
    drafter.bind(tiny_model())
    return drafter


def session_of(*sources: Drafter, strict: bool = False, **settings: Any) -> MergedSession:
    """A call of a merged drafter, as `merging` makes it."""
    return merging(*sources, **settings).start(context_of([9], strict=strict))


def step_of(tree: TokenTree, *new_tokens: list[int], top_tokens: Any = None) -> Step:
    """What the target has made of a tree: per row the tokens committed, of which the last one is its own."""
    news = [np.array(new, np.int32) for new in new_tokens]
    return Step(list(range(len(news))), tree, [max(len(new) - 1, 0) for new in news], top_tokens, news)


def combined(trees: Sequence[TokenTree], row: int, max_depth: int) -> dict[tuple[int, ...], tuple[int, float]]:
    """By path the sources that name it, as bits, and their combined score: the definition."""
    found: dict[tuple[int, ...], tuple[int, float]] = {}
    for source, tree in enumerate(trees):
        best: dict[tuple[int, ...], float] = {}
        paths: list[tuple[int, ...] | None] = [()]
        for node in range(1, tree.num_nodes):
            parent = int(tree.parents[row, node])
            above = paths[parent] if parent >= 0 else None
            path = None if above is None else (*above, int(tree.tokens[row, node]))
            path = path if path is not None and len(path) <= max_depth else None
            paths.append(path)
            if path is not None:
                score = 0.5 if tree.scores is None else float(tree.scores[row, node])
                best.setdefault(path, min(score, MOST_SURE))
        for path, score in best.items():
            named, before = found.get(path, (0, 0.0))
            found[path] = named | 1 << source, min(1 - (1 - before) * (1 - score), MOST_SURE)
    return found


def calibrated(tried: Any, hit: Any, prior: float, score: float) -> float:
    """A score's rate, given the counts of its sources and depth, `[bins]` each."""
    rates = (hit + prior * ((np.arange(SCORE_BINS) + 0.5) / SCORE_BINS) ** 2) / (tried + prior)
    rate = float(np.interp(np.sqrt(score) * SCORE_BINS - 0.5, np.arange(SCORE_BINS), rates))
    return min(max(rate, 1e-6), MOST_SURE)


def reference_merge(
    trees: Sequence[TokenTree], row: int, max_nodes: int, max_depth: int, tried: Any, hit: Any, prior: float
) -> dict[tuple[int, ...], float]:
    """The merged tree by its definition: score by path, best first."""
    found = combined(trees, row, max_depth)
    alone: dict[tuple[int, ...], float] = {}
    for path, (named, score) in found.items():
        depth = min(len(path), DEPTH_CLASSES) - 1
        alone[path] = calibrated(tried[named, depth], hit[named, depth], prior, score)
    rates: dict[tuple[int, ...], float] = {}
    for path, (named, _) in found.items():
        siblings = [other for other in found if other[:-1] == path[:-1]]
        rivals = [alone[other] for other in siblings if alone[other] > alone[path] and found[other][0] & ~named]
        rates[path] = alone[path] * (1 - max(rivals, default=0.0))
    order = list(found)
    waiting = [(-rates[path], order.index(path), path) for path in found if len(path) == 1]
    heapq.heapify(waiting)
    out: dict[tuple[int, ...], float] = {}
    while waiting and len(out) + 1 < max_nodes:
        product, _, path = heapq.heappop(waiting)
        out[path] = rates[path]
        for child in found:
            if child[:-1] == path:
                heapq.heappush(waiting, (product * rates[child], order.index(child), child))
    return out


def few_token_tree(seed: int, batch: int = 2, nodes: int = 14) -> TokenTree:
    """Random trees of few tokens: paths stand in several of them, now and then twice in one."""
    random = np.random.default_rng(seed)
    parents = np.full((batch, nodes), -1)
    for row in range(batch):
        real = [0]
        for node in range(1, nodes):
            if random.random() >= 0.1:
                parents[row, node] = random.choice(real[-6:])
                real.append(node)
    tokens = random.integers(3, 7, (batch, nodes))
    tokens[:, 0] = [11, 12][:batch]
    scores = random.random((batch, nodes)).astype(np.float32)
    return TokenTree(torch.tensor(tokens), torch.tensor(parents), torch.tensor(scores))
