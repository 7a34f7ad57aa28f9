"""A draft model during one call of `generate`."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.drafters.base import DraftContext, DraftSession, Step
from specdec.drafters.small_model.calibration import Calibration, LevelTimes, is_worth_a_level
from specdec.drafters.small_model.captured import captured_pass
from specdec.drafters.small_model.growth import (
    DraftNodes,
    add_children,
    child_of,
    choose_level,
    follow,
    level_inputs,
    write_trees,
)
from specdec.drafters.small_model.lists import DraftLists
from specdec.drafters.small_model.loading import BoundModel
from specdec.drafters.small_model.passes import ChainPasses, DraftPasses, TreePasses
from specdec.drafters.small_model.pipelined import (
    AHEAD_WIDTH,
    FIRST_THRESHOLD,
    OPENING_SCORE,
    WIDTH,
    LoadWindows,
    adjusted,
    choose_branches,
    least_proposed,
    outcome,
    subtrees_after,
)
from specdec.drafters.tokenizers.draft_vocabulary import RowTexts, SharedVocabulary
from specdec.kernels import Floats, Ints, largest
from specdec.tree import TokenTree

if TYPE_CHECKING:
    from specdec.drafters.draft_model import DraftModelDrafter

MAX_CANDIDATES = 1024
"""Nodes of a draft per row, of which the best are proposed; raise it for deeper drafts of many branches."""
DRAWN_CHILDREN = 3
"""Children of a node at most where they are drawn at random: each costs a node of the tree, likely or not."""


@dataclass(frozen=True)
class Growth:
    """How one proposal grows.

    Args:
        num_children: Length of the list after each node that is fed.
        width: Nodes fed per level.
        max_depths: Largest depth of a node, `[rows]`.
        rates: P(accepted | parent accepted) by class of rank and of probability.
        size: Nodes that are proposed at most.
        least: Nothing follows a node whose path product is below.
        capacity: Nodes that may be made.
        is_paced: The nodes of a level are LLMCad's branches.
        is_ahead: Nodes of any level may be fed next, not only those of the last.
        step_seconds: Of the target, where levels must pay; None where they need not.
    """

    num_children: int
    width: int
    max_depths: Ints
    rates: Floats
    size: int
    least: float
    capacity: int
    is_paced: bool = False
    is_ahead: bool = False
    step_seconds: tuple[Ints, Floats] | None = None


class NoDrafts(DraftSession):
    """Proposes nothing: the prompt is too long for the draft model, or has no token that it knows."""

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        return _roots_of(context)


class DraftModelSession(DraftSession):
    """Keeps the draft model's cache in step with the target's, and grows trees.

    Args:
        drafter: Its settings.
        bound: The draft model.
        calibration: How often its drafts were right.
        texts: The rows in its tokens.
        context: As the call begins.
        target: Whose loads are used, with `pipelined=True`.
    """

    def __init__(
        self,
        drafter: DraftModelDrafter,
        bound: BoundModel,
        calibration: Calibration,
        texts: RowTexts,
        context: DraftContext,
        target: Any,
    ) -> None:
        self.drafter = drafter
        self.bound = bound
        self.calibration = calibration
        self.texts = texts
        self.rows = list(context.rows)
        self.nodes: DraftNodes | None = None
        """The last proposal's candidates, with what was drafted after them since."""
        self.went_on = False
        """Whether the last proposal continued what had been drafted before."""
        self.threshold = FIRST_THRESHOLD
        self.times = LevelTimes()
        self.windows = LoadWindows(target, self.times) if drafter.pipelined else None
        self.lists = self._new_lists(context)
        self.passes = self._new_passes()
        is_tree = isinstance(self.passes, TreePasses) and self.lists.kind != "drawn"
        self.keeps_subtrees = drafter.pipelined and is_tree and isinstance(texts.vocabulary, SharedVocabulary)
        room = min(drafter.depth * max(drafter.beam, WIDTH), MAX_CANDIDATES)
        # The root is fed with the first proposal: what follows it is wanted then.
        self.passes.prefill([tokens[:-1].astype(np.int64) for tokens in texts.tokens], max(context.max_depth) + room)

    def _new_lists(self, context: DraftContext) -> DraftLists:
        sampler, target_size = context.sampler, self.bound.target_size
        if sampler is not None and sampler.noise is not None and sampler.noise.vocab:
            target_size = min(target_size, sampler.noise.vocab)
        if self.texts.is_text:  # neither noise nor processors have a meaning for its tokens
            sampler, target_size = None, self.bound.vocabularies.draft_size
        return DraftLists(sampler, self.drafter.coupled, context.is_sampled_from, self.texts.vocabulary, target_size)

    def _new_passes(self) -> DraftPasses:
        model, capability, compiled = self.bound.model, self.bound.capability, self.bound.compiled
        is_captured = self.drafter.cuda_graphs and not (self.drafter.compiled or self.drafter.pipelined)
        captured = captured_pass(model, capability) if is_captured else None
        kind: type[DraftPasses] = TreePasses if capability.mode == "tree" else ChainPasses
        return kind(model, capability, compiled, captured)

    # --- the session ---

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        if self.windows is not None:
            self.windows.close()
        self._follow(context)
        size, longest = max(1, min(max_nodes, self.drafter.max_nodes)), self.texts.longest
        if size == 1 or longest >= self.bound.longest:
            return _roots_of(context)
        growth = self._growth(context, size, longest)
        nodes = self._grow(context, growth)
        if self.windows is not None and self.keeps_subtrees:
            deepest = min(2 * self.drafter.depth, self.bound.longest - longest)
            max_depths = np.array(context.max_depth, np.int64).clip(0, int(deepest))
            ahead = replace(growth, width=AHEAD_WIDTH, max_depths=max_depths, least=0.0, is_paced=False, is_ahead=True)
            self.windows.open(functools.partial(self._grow_ahead, ahead), self.went_on)
        return self._tree(context, nodes, size)

    def observe(self, context: DraftContext, step: Step) -> None:
        if self.windows is not None:
            self.windows.close()
        if self.drafter.growth == "paced" and step.tree.num_nodes > 1:
            self.threshold = adjusted(self.threshold, *outcome(step))

    def figures(self, context: DraftContext) -> dict[str, Any]:
        figures = self.texts.vocabulary.figures() | self.passes.figures()
        if self.windows is not None:
            figures |= self.windows.figures() | {"draft_threshold": self.threshold}
        return figures

    def finish(self, context: DraftContext) -> None:
        self.passes.close()
        if self.windows is not None:
            self.windows.finish()

    # --- what was committed ---

    def _follow(self, context: DraftContext) -> None:
        """Brings the cache up to what has been committed since, and counts which drafts were right.

        Accepted drafts whose keys and values are in the cache stay there; the others are forgotten.
        """
        if len(context.rows) < len(self.rows):
            kept = [self.rows.index(row) for row in context.rows]
            self.passes.keep_rows(kept)
            self.texts.keep_rows(kept)
            self.rows = list(context.rows)
            self.nodes = self.nodes.of_rows(kept) if self.nodes is not None else None
        readings = self.texts.read(context.sequences)
        if self.nodes is not None:
            self.nodes = self._follow_nodes(self.nodes, [reading.known for reading in readings])
        holding = [reading.num_kept for reading in readings]
        if any(length > kept for length, kept in zip(self.passes.lengths, holding, strict=True)):
            self.passes.rollback(holding)

    def _follow_nodes(self, nodes: DraftNodes, new: Sequence[NDArray[np.int32]]) -> DraftNodes | None:
        """Walks the last draft along the new tokens; returns what of it continues them, if that is kept."""
        counts = np.array([len(tokens) for tokens in new])
        known = np.zeros((len(new), counts.max()), np.int64)
        for i, tokens in enumerate(new):
            known[i, : len(tokens)] = tokens
        paths = np.empty((len(new), known.shape[1] + 1), np.int64)
        counted = self.calibration.of_kind(self.lists.kind)
        with self.calibration.lock:
            follow(nodes, known, counts, *counted, self.calibration.decay, paths)
        places = [[place for place in path if place >= 0] for path in paths.tolist()]
        below = subtrees_after(nodes, known, counts) if self.keeps_subtrees else None
        if below is None or not isinstance(self.passes, TreePasses):
            self.passes.commit(places)
            return None
        self.passes.commit_above(places, below.places, below.parents)
        return below.nodes

    # --- growth ---

    def _growth(self, context: DraftContext, size: int, longest: int) -> Growth:
        """How the next proposal grows, none of it deeper than its row or the draft model can go."""
        drafter, kind = self.drafter, self.lists.kind
        deepest = int(min(drafter.depth, size - 1, self.bound.longest - longest))
        num_children, is_paced = drafter.top_k, drafter.growth == "paced"
        if drafter.growth == "chain" or self.texts.is_text:
            num_children = 1
        elif kind == "drawn":
            num_children = min(num_children, DRAWN_CHILDREN, size - 1)
        width = WIDTH if is_paced else drafter.beam if drafter.growth == "dynamic" else 1
        return Growth(
            num_children,
            1 if isinstance(self.passes, ChainPasses) else width,
            np.array(context.max_depth, np.int64).clip(0, deepest),
            self.calibration.rates(kind),
            size,
            0.0 if is_paced else drafter.min_confidence,
            size if kind == "drawn" else MAX_CANDIDATES,
            is_paced,
            step_seconds=context.step_seconds if drafter.needs_step_seconds and not is_paced else None,
        )

    def _grow(self, context: DraftContext, growth: Growth) -> DraftNodes:
        """Drafts: the tokens not read yet go through the model together with the root, then level after level.

        Where something was drafted after the root already, growth continues from there.
        """
        nodes, since = self.nodes, None
        self.went_on = nodes is not None
        self.times.begin()
        if nodes is None:
            roots = np.array([sequence[-1] for sequence in context.sequences], np.int64)
            nodes = DraftNodes.of_roots(roots, growth.capacity)
            if growth.max_depths.max() < 1:
                return nodes
            self.nodes = nodes
            since = self._grow_level(growth, nodes, np.zeros((len(roots), 1), np.int64))
        while (level := self._next_level(growth, nodes, since)) is not None:
            since = self._grow_level(growth, nodes, level)
        return nodes

    def _grow_ahead(self, growth: Growth) -> bool:
        """Adds one level to a draft; False where there is none to add."""
        if self.nodes is None or (level := self._next_level(growth, self.nodes, None)) is None:
            return False
        self._grow_level(growth, self.nodes, level)
        return True

    def _next_level(self, growth: Growth, nodes: DraftNodes, since: Ints | None) -> Ints | None:
        """The nodes to feed next, `[rows, width]`, -1 at padding; None at the end of the draft."""
        width = min(growth.width, (nodes.tokens.shape[1] - int(nodes.counts.max())) // growth.num_children)
        if width < 1:
            return None
        level = np.empty((len(nodes.tokens), width), np.int64)
        depths, num_fed = growth.max_depths, self.passes.num_fed
        if growth.is_paced:
            opening_score = OPENING_SCORE if isinstance(self.passes, TreePasses) else np.inf
            least = max(self.threshold, least_proposed(nodes, growth.size))
            widest = choose_branches(nodes, opening_score, least, depths, num_fed, level)
        else:
            if since is None or growth.is_ahead:
                since = np.ones_like(nodes.counts)
            widest = choose_level(nodes, since, growth.least, depths, num_fed, level)
        level = np.ascontiguousarray(level[:, :widest])
        if not widest or self._pays(growth, nodes, level):
            return level if widest else None
        rows, places = np.nonzero(level >= 0)
        nodes.fed[rows, level[rows, places]] = -1
        return None

    def _pays(self, growth: Growth, nodes: DraftNodes, level: Ints) -> bool:
        if growth.step_seconds is None or growth.is_ahead:
            return True
        hit_rates = self.calibration.hit_rates(self.lists.kind)
        return is_worth_a_level(nodes, level, growth.size, hit_rates, self.times, growth.step_seconds)

    def _grow_level(self, growth: Growth, nodes: DraftNodes, level: Ints) -> Ints:
        """Feeds a level and adds its children; returns where they begin, `[rows]`."""
        started = time.perf_counter()
        tokens, parents, depths = level_inputs(nodes, level)
        if self.passes.num_fed == 0:
            logits = self._feed_roots()
        else:
            logits = self.passes.feed_level(self.texts.vocabulary.fed_tokens(tokens).clip(0), parents)
        since = nodes.counts.copy()
        lists = self.lists.make(logits, growth.num_children, self.rows, depths)
        add_children(nodes, level, *lists, growth.rates, growth.max_depths)
        self.times.observe(time.perf_counter() - started)
        return since

    def _feed_roots(self) -> Tensor:
        """Feeds what leads to the root and the root itself; logits `[rows, 1, draft_vocab]`."""
        self.lists.begin()
        pending = zip(self.texts.tokens, self.passes.lengths, strict=True)
        logits = self.passes.feed_pending([tokens[length:].astype(np.int64) for tokens, length in pending])
        self.texts.vocabulary.observe(logits)
        return logits[:, None]

    def _tree(self, context: DraftContext, nodes: DraftNodes, size: int) -> TokenTree:
        """The best nodes as a tree."""
        if nodes.counts.max() == 1:
            return _roots_of(context)
        if self.texts.is_text:
            roots = [int(ids[-1]) for ids in context.sequences]
            return self.texts.reencoded(nodes, roots, size, self.bound.target_size)
        shape, is_drawn = (len(context.rows), size), self.lists.kind == "drawn"
        tokens, scores = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        parents, fed = np.full(shape, -1, np.int64), np.full(shape, -1, np.int64)
        used = write_trees(nodes, not is_drawn, tokens, parents, scores, fed)
        if not is_drawn:
            return TokenTree.of_arrays(tokens[:, :used], parents[:, :used], scores[:, :used])
        # Without scores, nothing is cut off: leaving out a draw for being unlikely would change the distribution.
        tree = TokenTree(torch.from_numpy(tokens), torch.from_numpy(parents)).first(used)
        return replace(tree, draft_probs=self.lists.probs_of(fed[:, :used]))


def _roots_of(context: DraftContext) -> TokenTree:
    return TokenTree.root_only(torch.tensor([int(sequence[-1]) for sequence in context.sequences]))


@functools.cache
def compile_kernels() -> None:
    """Compiles, or loads what was compiled before, so that no step of a generation waits for it."""
    nodes = DraftNodes.of_roots(np.zeros(1, np.int64), 8)
    level, one, table = np.zeros((1, 1), np.int64), np.ones(1, np.int64), np.zeros((2, 2))
    listed, probs = np.zeros((1, 1, 2), np.int64), np.full((1, 1, 2), 0.4, np.float32)
    add_children(nodes, level, listed, probs, table, 2 * one)
    choose_level(nodes, one, 0.0, 2 * one, 1, level)
    choose_branches(nodes, OPENING_SCORE, 0.0, one, 1, level.copy())
    level_inputs(nodes, level)
    child_of(nodes, 0, 0, 0)
    largest(np.zeros((1, 1, 2), np.float32), 1)
    tokens, scores = np.zeros((1, 4), np.int64), np.zeros((1, 4), np.float32)
    write_trees(nodes, True, tokens, tokens.copy(), scores, tokens.copy())
    follow(nodes, level, one, table, table.copy(), table.copy(), 1.0, np.zeros((1, 2), np.int64))
