"""A draft model during one call of `generate`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.drafters.base import DraftContext
from specdec.drafters.draft_growth import DraftNodes, add_children, choose_level, follow
from specdec.drafters.draft_lists import DraftLists
from specdec.drafters.draft_passes import DraftPasses
from specdec.kernels import Floats, Ints

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
        least_fed_order: Nodes ranked lower are not fed.
        least_score: Nodes whose score is below are not fed: they stay, but nothing follows them.
        any_level: Older nodes may be fed after all.
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
    least_score: float = 0.0
    any_level: bool = False
    most: int = MAX_CANDIDATES


class DraftCall:
    """Keeps the draft model's cache in step with the target's, and grows trees.

    Args:
        passes: The draft model's forwards.
        lists: Makes drafts out of its logits.
        context: As the call begins.
        room: Nodes of a proposal that are fed at most.
    """

    def __init__(self, passes: DraftPasses, lists: DraftLists, context: DraftContext, room: int) -> None:
        self.passes = passes
        self.lists = lists
        self.rows = list(context.rows)
        self.nodes: DraftNodes | None = None
        self.drafted_at: list[int] = []
        # The root is fed with the first proposal: what follows it is wanted then.
        prompts = [self._draft_tokens(sequence[:-1]) for sequence in context.sequences]
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
            self.rows = list(context.rows)
            if self.nodes is not None:
                self.nodes = self.nodes.of_rows(kept)
                self.drafted_at = [self.drafted_at[i] for i in kept]
        if self.nodes is None:
            return
        new = [sequence[at:] for sequence, at in zip(context.sequences, self.drafted_at, strict=True)]
        counts = np.array([len(tokens) for tokens in new])
        known = np.zeros((len(new), counts.max()), np.int64)
        for i, tokens in enumerate(new):
            known[i, : len(tokens)] = tokens
        paths = np.empty((len(new), known.shape[1] + 1), np.int64)
        follow(self.nodes, known, counts, tried, hit, decay, paths)
        self.passes.commit([[place for place in path if place >= 0] for path in paths.tolist()])
        self.nodes = None

    def grow(self, context: DraftContext, growth: Growth) -> DraftNodes:
        """Drafts: the tokens not seen yet go through the model together with the root, then level after level."""
        roots = np.array([sequence[-1] for sequence in context.sequences], np.int64)
        nodes = self.nodes = DraftNodes.of_roots(roots, growth.most)
        self.drafted_at = [len(sequence) for sequence in context.sequences]
        level = np.zeros((len(roots), 1), np.int64)
        width = growth.width(nodes)
        if width == 0 or growth.max_depths.max() < 1:
            self.nodes = None
            return nodes
        while True:
            started = time.perf_counter()
            logits = self._feed(context, nodes, level)
            since = nodes.counts.copy() if not growth.any_level else np.ones_like(nodes.counts)
            depths = nodes.depths[np.arange(len(roots))[:, None], level]
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
            width = min(growth.width(nodes), (growth.most - int(nodes.counts.max())) // growth.num_children)
            if width < 1:
                return nodes
            level = np.empty((len(roots), width), np.int64)
            widest = choose_level(
                nodes,
                since,
                growth.least_score,
                growth.least_fed_order,
                growth.max_depths,
                self.passes.num_fed,
                level,
            )
            if widest == 0:
                return nodes
            level = np.ascontiguousarray(level[:, :widest])

    def _feed(self, context: DraftContext, nodes: DraftNodes, level: Ints) -> Tensor:
        """Feeds a level, or what leads to the root and the root itself; logits `[rows, width, draft_vocab]`."""
        if self.passes.num_fed == 0:
            pending = zip(context.sequences, self.passes.lengths, strict=True)
            return self.passes.feed_pending([self._draft_tokens(ids[length:]) for ids, length in pending])[:, None]
        row_index, is_real = np.arange(len(level))[:, None], level >= 0
        fed = nodes.fed[row_index, nodes.parents[row_index, level]]
        tokens = self._draft_tokens(np.where(is_real, nodes.tokens[row_index, level], 0))
        return self.passes.feed_level(tokens, np.where(is_real, fed, -1))

    def _draft_tokens(self, tokens: NDArray[Any]) -> Ints:
        """Target tokens as the draft model takes them; one that it does not know as its first."""
        ids = torch.from_numpy(np.asarray(tokens, np.int64))
        drafted: Ints = self.lists.vocabulary.draft_tokens(ids).clamp(min=0).numpy()
        return drafted
