"""A merged drafter at work in one call of `generate`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from specdec.drafters.base import (
    DraftContext,
    Drafter,
    DrafterSwitchedOffWarning,
    DraftSession,
    Step,
    check_proposal,
)
from specdec.drafters.merging.growth import (
    add_tree,
    begin,
    follow_merged,
    grow_merged,
    new_candidates,
    paths_to,
    sources_along,
)
from specdec.drafters.merging.known import Known
from specdec.kernels import Ints
from specdec.tree import TokenTree

if TYPE_CHECKING:
    from specdec.drafters.merged import MergedDrafter

UNKNOWN_SCORE = 0.5
"""P(accepted | parent accepted) assumed of a node whose source gives none, until it is counted."""
MOST_CONTINUED = 16
"""Largest tree of a continuation, its root included; raise it for longer chains where a leaf is right."""


@dataclass
class SourceRecord:
    """What one source did in a call.

    Args:
        calls: Steps in which it was asked.
        skipped: Steps in which it was not, because it did not earn its time.
        seconds: Time of its proposals.
        proposed: Draft tokens that it proposed.
        error: What it raised before it was left out; None when it did not.
    """

    calls: int = 0
    skipped: int = 0
    seconds: float = 0.0
    proposed: int = 0
    error: str | None = None


class MergedSession(DraftSession):
    """Asks the sources, merges what they propose, and credits those whose tokens are accepted.

    Args:
        drafter: Its settings and sources.
        known: What earlier calls of this kind have taught.
        vocab_size: Draft tokens must be below.
        clock: Seconds.
        context: As the call begins.
    """

    def __init__(
        self,
        drafter: MergedDrafter,
        known: Known,
        vocab_size: int,
        clock: Callable[[], float],
        context: DraftContext,
    ) -> None:
        self.drafter, self.known, self._vocab_size, self._clock = drafter, known, vocab_size, clock
        self.sources = list(drafter.sources)
        self.names = distinct_names(self.sources)
        self.records = [SourceRecord() for _ in self.sources]
        self.credits: Ints = np.zeros(2 ** len(self.sources), np.int64)
        """Accepted tokens by the sources that proposed them, as bits."""
        self._drawing: int | None = None
        """The source that draws its drafts at random; None while there is none."""
        self._proposals: dict[int, tuple[TokenTree, float]] = {}
        """Tree and seconds by source, of the step that is under way."""
        self._rows: list[int] = []
        self._started = 0.0
        self._nodes, self._counts = new_candidates(0, 0), np.zeros(0, np.int64)
        self.sessions: dict[int, DraftSession] = {}
        """Of the sources that have not failed."""
        for source, each in enumerate(self.sources):
            if (session := self._guarded(source, "start", context, partial(each.start, context))) is not None:
                self.sessions[source] = session

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        """The merged tree; a drawn one as it is, because it must be verified with all its nodes and no others."""
        width = max(1, min(max_nodes, self.drafter.max_nodes))
        self._started, self._rows, self._proposals = self._clock(), list(context.rows), {}
        roots = np.array([sequence[-1] for sequence in context.sequences], np.int64)
        capacity = 1 + (width + MOST_CONTINUED) * len(self.sources)
        if self._nodes.shape != (len(roots), capacity):
            self._nodes, self._counts = new_candidates(len(roots), capacity), np.zeros(len(roots), np.int64)
        begin(self._nodes, self._counts, roots)
        max_depths = np.array(context.max_depth, np.int64)
        for source in list(self.sessions) if self._drawing is None else [self._drawing]:
            if self._drawing is None and self.known.sources[source].skips():
                self.records[source].skipped += 1
                continue
            tree = self._guarded(
                source, "propose", context, partial(self._ask, source, context, width, roots, max_depths)
            )
            if tree is not None and tree.draft_probs is not None:
                self._drawing, self._proposals = source, {source: self._proposals[source]}
                return tree
        tree, leaves = self._grow(width)
        if self.drafter.chained and len(self.sessions) > 1 and 1 < tree.num_nodes < width and (leaves >= 0).any():
            tree = self._continued(context, tree, leaves, max_depths, width)
        return tree

    def observe(self, context: DraftContext, step: Step) -> None:
        """Counts what was right, and tells each source what became of its own proposal."""
        proposals, self._proposals = self._proposals, {}
        if self._rows != list(step.rows):
            proposals = {}
        lengths = np.array([len(new) for new in step.new_tokens], np.int64)
        own = np.zeros((len(step.rows), len(self.sources)), np.int64)
        drawing = self._drawing
        if drawing is not None and proposals:
            self.credits[1 << drawing] += np.maximum(lengths - 1, 0).sum()
        elif proposals:
            known = np.zeros((len(lengths), max(lengths.max(), 1)), np.int64)
            for row, new in enumerate(step.new_tokens):
                known[row, : len(new)] = new
            gains = np.zeros(len(self.sources), np.int64)
            learned = self.known
            with learned.lock:
                counts = self.drafter.decay, learned.tried, learned.hit
                follow_merged(self._nodes, known, lengths, *counts, learned.by_cost(), self.credits, own, gains)
                asked = {source: (int(gains[source]), seconds) for source, (_, seconds) in proposals.items()}
                learned.record(asked, int(lengths.sum()), self._clock() - self._started)
        for source, session in list(self.sessions.items()):
            if type(session).observe in (DraftSession.observe, Drafter.observe):
                continue
            shown = step
            if drawing is None or source not in proposals:
                shown = self._shown(source, step, proposals, own[:, source])
            self._guarded(source, "observe", context, partial(session.observe, context, shown))

    def sources_of(self, row: int, path: Sequence[int]) -> list[tuple[str, ...]]:
        """See `DraftSession.sources_of`."""
        if self._drawing is not None:
            return [(self.names[self._drawing],)] * len(path)
        along = sources_along(self._nodes, row, path)
        return [tuple(name for source, name in enumerate(self.names) if bits >> source & 1) for bits in along]

    def figures(self, context: DraftContext) -> dict[str, Any]:
        """What each source did and earned, by its name, ready for JSON.

        An accepted token counts as `accepted` of every source that had proposed it, as `alone` of a source that no
        other one shared it with, and as `credit` in equal shares: credits sum up to the accepted tokens.
        """
        out: dict[str, Any] = {}
        credited = [(bits, count, bits.bit_count()) for bits, count in enumerate(self.credits.tolist()) if count]
        for source, (name, record) in enumerate(zip(self.names, self.records, strict=True)):
            own = [(count, shared) for bits, count, shared in credited if bits >> source & 1]
            out[name] = {
                "calls": record.calls,
                "skipped": record.skipped,
                "seconds": round(record.seconds, 6),
                "proposed": record.proposed,
                "accepted": sum(count for count, _ in own),
                "alone": sum(count for count, shared in own if shared == 1),
                "credit": round(sum(count / shared for count, shared in own), 3),
            }
            if record.error is not None:
                out[name]["error"] = record.error
            elif more := self.sessions[source].figures(context):
                out[name]["figures"] = more
        return out

    def finish(self, context: DraftContext) -> None:
        """Ends the sources' sessions."""
        for source, session in list(self.sessions.items()):
            self._guarded(source, "finish", context, partial(session.finish, context))

    # --- its parts ---

    def _ask(self, source: int, context: DraftContext, width: int, roots: Ints, max_depths: Ints) -> TokenTree:
        """A source's proposal, added to the candidates unless it was drawn."""
        started = self._clock()
        tree = self.sessions[source].propose(context, width)
        seconds = self._clock() - started
        self.records[source].calls += 1
        self.records[source].seconds += seconds
        is_tree = isinstance(tree, TokenTree) and tree.tokens.dtype == tree.parents.dtype == torch.int64
        if not is_tree or len(tree.tokens) != len(roots) or tree.num_nodes > width or tree.draft_probs is not None:
            check_proposal(tree, context, width, self._vocab_size)
        self._proposals[source] = tree, seconds
        if tree.draft_probs is not None:
            self.records[source].proposed += int(np.count_nonzero(tree.host_parents >= 0))
        elif tree.num_nodes > 1 and not self._add(source, tree, np.zeros_like(roots), max_depths):
            check_proposal(tree, context, width, self._vocab_size)
        return tree

    def _add(self, source: int, tree: TokenTree, starts: Ints, max_depths: Ints) -> bool:
        """Adds a tree to the candidates; false where it is not valid."""
        tokens = tree.host_tokens
        scores = np.full(tokens.shape, UNKNOWN_SCORE, np.float32) if tree.host_scores is None else tree.host_scores
        arrays = tokens, tree.host_parents, scores, max_depths
        taken = add_tree(self._nodes, self._counts, starts, source, *arrays, self._vocab_size)
        self.records[source].proposed += max(taken, 0)
        return taken >= 0

    def _grow(self, width: int) -> tuple[TokenTree, Ints]:
        """The merged tree, and each row's likeliest leaf; see `grow_merged`."""
        shape = len(self._counts), width
        tokens, parents, scores = np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape, np.float32)
        leaves, known = np.empty(len(self._counts), np.int64), self.known
        with known.lock:
            counted = self._counts, known.tried, known.hit, float(self.drafter.prior_weight)
            used = grow_merged(self._nodes, *counted, tokens, parents, scores, leaves)
        return TokenTree.of_arrays(tokens[:, :used], parents[:, :used], scores[:, :used]), leaves

    def _continued(
        self, context: DraftContext, tree: TokenTree, leaves: Ints, max_depths: Ints, width: int
    ) -> TokenTree:
        """The merged tree, continued from each row's likeliest leaf by all sources that were asked and can."""
        tokens, depths = paths_to(self._nodes, leaves)
        paths = [path[:depth] for path, depth in zip(tokens, depths.tolist(), strict=True)]
        most = min(MOST_CONTINUED, width - tree.num_nodes + 1)
        is_longer = False
        for source in list(self._proposals):
            if (session := self.sessions.get(source)) is None:
                continue
            extend = partial(session.extend, context, paths, most)
            more = self._guarded(source, "extend", context, extend)
            if more is not None and 1 < more.num_nodes <= most:
                is_longer |= self._add(source, more, leaves, max_depths)
        return self._grow(width)[0] if is_longer else tree

    def _shown(self, source: int, step: Step, proposals: dict[int, tuple[TokenTree, float]], own: Ints) -> Step:
        """The step as a source sees it: whole, if it asks for top tokens, or else what became of its own proposal."""
        count = self.sources[source].num_top_tokens
        if count and step.top_tokens is not None:
            return Step(step.rows, step.tree, step.accepted, step.top_tokens[..., :count], step.new_tokens)
        if source in proposals:
            tree, accepted = proposals[source][0], own.tolist()
        else:
            tree, accepted = TokenTree.root_only(step.tree.tokens[:, 0]), [0] * len(step.rows)
        return Step(step.rows, tree, accepted, None, step.new_tokens)

    def _guarded(self, source: int, method: str, context: DraftContext, action: Callable[[], Any]) -> Any:
        """Runs a source's method; after an error the source is left out, unless errors are to be raised."""
        try:
            return action()
        except Exception as error:
            if context.strict:
                raise
            self.sessions.pop(source, None)
            self._proposals.pop(source, None)
            self.records[source].error = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"source {self.names[source]!r} of the merged drafter failed in {method}() and is left out for the "
                "rest of this call; the output is complete and the same as without it. "
                f"{self.records[source].error}. Pass strict=True to raise instead.",
                DrafterSwitchedOffWarning,
                stacklevel=2,
            )
            return None


def distinct_names(sources: Sequence[Drafter]) -> list[str]:
    """The sources' names; the second one of a name gets a number."""
    seen: dict[str, int] = {}
    names = []
    for source in sources:
        seen[source.name] = seen.get(source.name, 0) + 1
        names.append(source.name if seen[source.name] == 1 else f"{source.name}-{seen[source.name]}")
    return names
