"""A draft model during one call of `generate`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from specdec.budgeting.pass_times import StepTimes
from specdec.drafters.base import DraftContext
from specdec.drafters.small_model.branch_pace import subtrees_below
from specdec.drafters.small_model.depth import WIDTHS, Pace
from specdec.drafters.small_model.growth import (
    DraftNodes,
    add_children,
    choose_level,
    follow,
    level_inputs,
    write_trees,
)
from specdec.drafters.small_model.lists import DraftLists
from specdec.drafters.small_model.passes import DraftPasses, TreePasses
from specdec.drafters.tokenizers.draft_vocabulary import RowTexts, SharedVocabulary
from specdec.kernels import Floats, Ints, largest

MAX_CANDIDATES = 1024


@dataclass(frozen=True)
class Growth:
    """How one proposal grows.

    Args:
        num_children: Length of the list behind each node that is fed.
        max_depths: Largest depth of a node, `[rows]`.
        rates: P(accepted | parent accepted) by class of rank and of probability.
        width: Called before each level with the nodes so far: how many to feed, 0 to stop.
        measured: Called after each level with the nodes, those that were fed, and the seconds it took.
        acceptances: See `add_children`.
        least_order: See `add_children`.
        least_fed_order: Nodes ranked lower are not fed: they stay, but nothing follows them.
        any_level: Older nodes may be fed after all.
        choose: Takes the nodes to be fed next in place of `choose_level`: sets `fed` of them from the given place on,
            writes them, and returns how many there are.
        most: Nodes that may be made, for drafts of which none may be left out.
    """

    num_children: int
    max_depths: Ints
    rates: Floats
    width: Callable[[DraftNodes], int]
    measured: Callable[[DraftNodes, Ints, float], None] | None = None
    acceptances: Floats = field(default_factory=lambda: np.zeros(0))
    least_order: float = 0.0
    least_fed_order: float = 0.0
    any_level: bool = False
    choose: Callable[[DraftNodes, int, Ints], int] | None = None
    most: int = MAX_CANDIDATES


class DraftCall:
    """Keeps the draft model's cache in step with the target's, and grows trees.

    Args:
        passes: The draft model's forwards.
        lists: Makes drafts out of its logits.
        texts: The rows in its tokens.
        context: As the call begins.
        room: Nodes of a proposal that are fed at most.
        keeps_subtrees: What was drafted behind the tokens that the target picks is gone on with, if it can be: in trees
            of the likeliest tokens of one vocabulary.
    """

    def __init__(
        self,
        passes: DraftPasses,
        lists: DraftLists,
        texts: RowTexts,
        context: DraftContext,
        room: int,
        keeps_subtrees: bool = False,
    ) -> None:
        self.passes = passes
        is_shared = isinstance(texts.vocabulary, SharedVocabulary)
        is_tree = isinstance(passes, TreePasses) and lists.kind != "drawn"
        self.keeps_subtrees = keeps_subtrees and is_tree and is_shared
        self.lists = lists
        self.texts = texts
        self.rows = list(context.rows)
        self.nodes: DraftNodes | None = None
        self.goes_on = False
        """Whether the last proposal went on from what had been drafted before."""
        self.drafted_at: list[int] = []
        # The root is fed with the first proposal: what follows it is wanted then.
        prompts = [tokens[:-1].astype(np.int64) for tokens in texts.tokens]
        self.passes.prefill(prompts, max(context.max_depth) + room)

    def fits(self, context: DraftContext) -> bool:
        """Whether the context goes on where this call is."""
        return set(context.rows) <= set(self.rows)

    def follow(self, context: DraftContext, tried: Floats, hit: Floats, decay: float) -> None:
        """Brings the cache up to what has been committed since, and counts which drafts were right.

        Accepted drafts whose keys and values are in the cache stay there; the others are forgotten.
        """
        if len(context.rows) < len(self.rows):
            kept = [self.rows.index(row) for row in context.rows]
            self.passes.keep_rows(kept)
            self.texts.keep_rows(kept)
            self.rows = list(context.rows)
            if self.nodes is not None:
                self.nodes = self.nodes.of_rows(kept)
                self.drafted_at = [self.drafted_at[i] for i in kept]
        readings = self.texts.read(context.sequences)
        if self.nodes is not None:
            self._follow_nodes(context, self.nodes, [reading.known for reading in readings], tried, hit, decay)
        holding = [reading.num_kept for reading in readings]
        if any(length > kept for length, kept in zip(self.passes.lengths, holding, strict=True)):
            self.passes.rollback(holding)

    def _follow_nodes(
        self,
        context: DraftContext,
        nodes: DraftNodes,
        new: list[NDArray[np.int32]],
        tried: Floats,
        hit: Floats,
        decay: float,
    ) -> None:
        """Walks the last draft along the tokens that have been committed since."""
        counts = np.array([len(tokens) for tokens in new])
        known = np.zeros((len(new), counts.max()), np.int64)
        for i, tokens in enumerate(new):
            known[i, : len(tokens)] = tokens
        paths = np.empty((len(new), known.shape[1] + 1), np.int64)
        follow(nodes, known, counts, tried, hit, decay, paths)
        places = [[place for place in path if place >= 0] for path in paths.tolist()]
        below = subtrees_below(nodes, known, counts) if self.keeps_subtrees else None
        if below is None or not isinstance(self.passes, TreePasses):
            self.passes.commit(places)
            self.nodes = None
            return
        self.passes.commit_above(places, below.places, below.parents)
        self.nodes = below.nodes
        self.drafted_at = [len(sequence) for sequence in context.sequences]

    def grow(self, context: DraftContext, growth: Growth) -> DraftNodes:
        """Drafts: the tokens not seen yet go through the model together with the root, then level after level.

        Where something was drafted behind the root already, growth goes on from there.
        """
        nodes = self.nodes
        self.goes_on = nodes is not None
        since = None
        if nodes is None:
            roots = np.array([sequence[-1] for sequence in context.sequences], np.int64)
            nodes = self.nodes = DraftNodes.of_roots(roots, growth.most)
            self.drafted_at = [len(sequence) for sequence in context.sequences]
            if growth.width(nodes) == 0 or growth.max_depths.max() < 1:
                self.nodes = None
                return nodes
            since = self._grow_level(growth, nodes, np.zeros((len(roots), 1), np.int64))
        while (level := self._next_level(growth, nodes, since)) is not None:
            since = self._grow_level(growth, nodes, level)
        return nodes

    def grow_ahead(self, growth: Growth) -> bool:
        """Adds one level to a draft; False where there is none to add."""
        if self.nodes is None or (level := self._next_level(growth, self.nodes, None)) is None:
            return False
        self._grow_level(growth, self.nodes, level)
        return True

    def _grow_level(self, growth: Growth, nodes: DraftNodes, level: Ints) -> Ints:
        """Feeds a level and adds its children; returns where they begin, `[rows]`."""
        started = time.perf_counter()
        tokens, parents, depths = level_inputs(nodes, level)
        logits = self._feed_roots() if self.passes.num_fed == 0 else self._feed(tokens, parents)
        since = nodes.counts.copy()
        listed, probs = self.lists.make(logits, growth.num_children, self.rows, depths)
        add_children(
            nodes,
            level,
            listed,
            probs,
            growth.rates,
            growth.acceptances,
            growth.least_order,
            growth.max_depths,
        )
        if growth.measured is not None:
            growth.measured(nodes, level, time.perf_counter() - started)
        return since

    def _next_level(self, growth: Growth, nodes: DraftNodes, since: Ints | None) -> Ints | None:
        """The nodes to feed next, `[rows, width]`, -1 at padding; None at the end of the draft."""
        width = min(growth.width(nodes), (growth.most - int(nodes.counts.max())) // growth.num_children)
        if width < 1:
            return None
        level = np.empty((len(nodes.tokens), width), np.int64)
        if growth.choose is not None:
            widest = growth.choose(nodes, self.passes.num_fed, level)
        else:
            if since is None or growth.any_level:
                since = np.ones_like(nodes.counts)
            widest = choose_level(
                nodes,
                since,
                growth.least_fed_order,
                growth.max_depths,
                self.passes.num_fed,
                level,
            )
        return np.ascontiguousarray(level[:, :widest]) if widest else None

    def _feed_roots(self) -> Tensor:
        """Feeds what leads to the root and the root itself; logits `[rows, 1, draft_vocab]`."""
        pending = zip(self.texts.tokens, self.passes.lengths, strict=True)
        logits = self.passes.feed_pending([tokens[length:].astype(np.int64) for tokens, length in pending])
        self.texts.vocabulary.observe(logits)
        return logits[:, None]

    def _feed(self, tokens: Ints, parents: Ints) -> Tensor:
        """Feeds a level, `[rows, width]`; logits `[rows, width, draft_vocab]`."""
        return self.passes.feed_level(self.texts.vocabulary.fed_tokens(tokens).clip(0), parents)


@functools.cache
def compile_kernels() -> None:
    """Compiles, or loads what was compiled before, so that no step of a generation waits for it."""
    nodes = DraftNodes.of_roots(np.zeros(1, np.int64), 8)
    level, depths = np.zeros((1, 1), np.int64), np.full(1, 2)
    listed: NDArray[np.int64] = np.zeros((1, 1, 2), np.int64)
    table = np.zeros((1, 2))
    add_children(nodes, level, listed, np.full((1, 1, 2), 0.4, np.float32), table, np.zeros(0), 0.0, depths)
    choose_level(nodes, np.ones(1, np.int64), 0.0, depths, 1, level)
    level_inputs(nodes, level)
    largest(np.zeros((1, 1, 2), np.float32), 1)
    pace, times = Pace(), StepTimes(2)
    pace.observe_level(nodes, level, 1.0)
    pace.width(nodes, depths, times.known(), 4, WIDTHS)
    tokens, scores = np.zeros((1, 4), np.int64), np.zeros((1, 4), np.float32)
    write_trees(nodes, True, tokens, tokens.copy(), scores, tokens.copy())
    follow(nodes, level, np.ones(1, np.int64), table, table.copy(), 1.0, np.zeros((1, 2), np.int64))
