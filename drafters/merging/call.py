"""What a merged drafter keeps during one call of `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from specdec.drafters.base import DraftContext, Drafter, DraftSession, Step
from specdec.drafters.merging.chain import Chained
from specdec.drafters.merging.growth import CandidateStore, candidates_in, child_with
from specdec.drafters.merging.known import Known
from specdec.kernels import Ints
from specdec.tree import TokenTree


@dataclass
class SourceRecord:
    """What one source did in a call.

    Args:
        calls: Steps in which it was asked.
        skipped: Steps in which it was not, because it did not seem worth its time.
        seconds: Time of its proposals.
        telling: Time of telling it that the call begins, and what became of its proposals.
        proposed: Draft tokens that it named.
        saved: Time saved by accepted tokens that would not be if it had named nothing, each worth its part of the step.
        error: What it raised before it was switched off; None when it did not.
    """

    calls: int = 0
    skipped: int = 0
    seconds: float = 0.0
    telling: float = 0.0
    proposed: int = 0
    saved: float = 0.0
    error: str | None = None


class Proposal(NamedTuple):
    """A source's tree, and what it took.

    Args:
        tree: As the source proposed it.
        node_of: Place of each node among the candidates, -1 for none, `[rows, nodes]`; None for a root alone.
        seconds: What it took.
        sureness: Class of what was expected of the sources asked before.
    """

    tree: TokenTree
    node_of: Ints | None
    seconds: float
    sureness: int


@dataclass
class PendingStep:
    """What was proposed and has not been verified yet.

    Args:
        rows: As in the context.
        nodes: What all sources named.
        max_depths: Largest depth of a node, `[rows]`.
        chained: What was continued; None where nothing was.
        proposals: By source, of those that were asked.
    """

    rows: list[int]
    nodes: CandidateStore
    max_depths: Ints
    proposals: dict[int, Proposal] = field(default_factory=dict)
    chained: Chained | None = None

    def room(self) -> int:
        """Candidates that every row has room for."""
        return self.nodes.shape[1] - int(self.nodes.counts.max())

    def known(self, context: DraftContext, counts: Sequence[int]) -> tuple[Ints, Ints]:
        """The tokens committed since, `[rows, tokens]`, and how many they are, `[rows]`, given as `counts`."""
        known = np.zeros((len(counts), max(*counts, 1)), np.int64)
        for row, (sequence, count) in enumerate(zip(context.sequences, counts, strict=True)):
            known[row, :count] = sequence[len(sequence) - count :]
        return known, np.array(counts, np.int64)


@dataclass
class MergedCall:
    """One call of `generate`.

    Args:
        sources: All sources, by number.
        active: Those that have not failed.
        records: What each did.
        known: What was learned of calls of this kind.
        idle: Sources that take no part in this call, because they have not earned it of late.
        credits: Accepted tokens by the sources that named them, `[2 ** sources]`.
        started: When the call began, in seconds.
        sessions: Of the active sources.
        merging: Time that it took to merge what several sources had named.
        drawing: The source that draws its drafts at random; None while there is none.
        alone: The source whose tree was taken as it is in the step that is under way; None for a merged tree.
        lengths: Tokens of each row when it was proposed.
        step_started: When the step that is under way began, in seconds.
        pending: The merged tree that is under way.
        nodes: Room for what the sources name, used by one step after the other.
        roots: How many roots each row of it has: ones, `[rows]`.
    """

    sources: Sequence[Drafter]
    active: list[int]
    records: list[SourceRecord]
    known: Known
    idle: set[int]
    credits: Ints
    started: float
    sessions: dict[int, DraftSession] = field(default_factory=dict)
    merging: float = 0.0
    drawing: int | None = None
    alone: int | None = None
    lengths: Sequence[int] = ()
    step_started: float = 0.0
    pending: PendingStep | None = None
    nodes: CandidateStore | None = None
    roots: Ints = field(default_factory=lambda: np.ones(1, np.int64))

    @classmethod
    def begin(cls, sources: Sequence[Drafter], known: Known, idle: set[int], started: float) -> MergedCall:
        """A call in which nothing has happened yet."""
        active = [source for source in range(len(sources)) if source not in idle]
        records = [SourceRecord() for _ in sources]
        return cls(sources, active, records, known, idle, np.zeros(2 ** len(sources), np.int64), started)

    def close(self, context: DraftContext, now: float) -> None:
        """Notes what each source was worth in this call, which is over; `context` lists all rows."""
        seconds = now - self.started
        if seconds > 0.0 and self.drawing is None:
            worth = self.known.worth(len(context.rows))
            tried = worth.idle - self.idle  # what others bring beside these says nothing of what they bring without
            for source in tried.intersection(self.active) or self.active:
                record = self.records[source]
                taken = record.seconds + record.telling + self.merging / max(len(self.active) - 1, 1)
                worth.close_call(source, record.saved / seconds, taken / seconds)

    def credit_alone(self, source: int, context: DraftContext, now: float) -> None:
        """Counts the accepted tokens of a tree that was taken as it is; the last token of each row is the target's."""
        counts = self.counts(context)
        accepted = sum(max(count - 1, 0) for count in counts)
        self.credits[1 << source] += accepted
        self.records[source].saved += accepted / max(sum(counts), 1) * (now - self.step_started)

    def counts(self, context: DraftContext) -> list[int]:
        """How many tokens each row got since the proposal."""
        return [len(sequence) - length for sequence, length in zip(context.sequences, self.lengths, strict=True)]

    def candidates(self, roots: Ints, width: int) -> CandidateStore:
        """The roots `[rows]` alone, with room for a tree of some width from each source."""
        capacity = 1 + (width - 1) * (len(self.sources) + 1)  # one for what is continued
        if self.nodes is None or self.nodes.shape != (len(roots), capacity):
            self.nodes, self.roots = CandidateStore.of_roots(roots, capacity), np.ones_like(roots)
        else:
            self.nodes.begin(roots)
        return self.nodes

    def sources_of(self, row: int, path: Sequence[int]) -> list[tuple[str, ...]]:
        """The sources that named each token of a path, by their names; see `Drafter.sources_of`."""
        names = distinct_names(self.sources)
        if self.alone is not None:
            return [(names[self.alone],)] * len(path)
        assert self.pending is not None, "nothing is proposed"
        found, node = [], 0
        nodes = candidates_in(self.pending.nodes)
        for token in path:
            node = child_with(nodes, row, node, token)
            named = int(nodes.named[row, node])
            found.append(tuple(name for source, name in enumerate(names) if named >> source & 1))
        return found

    def figures(self, context: DraftContext) -> dict[str, Any]:
        """What each source did and earned, by its name, ready for JSON.

        An accepted token counts as `accepted` of every source that had named it, as `alone` of a source that no other
        one shared it with, and as `credit` in equal shares: credits sum up to the accepted tokens.
        """
        out: dict[str, Any] = {}
        credited = [(named, count, named.bit_count()) for named, count in enumerate(self.credits.tolist()) if count]
        for source, (name, record) in enumerate(zip(distinct_names(self.sources), self.records, strict=True)):
            own = [(count, shared) for named, count, shared in credited if named >> source & 1]
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
            elif source in self.active and (more := self.sessions[source].figures(context)):
                out[name]["figures"] = more
        return out


def distinct_names(sources: Sequence[Drafter]) -> list[str]:
    """The sources' names; the second one of a name gets a number."""
    seen: dict[str, int] = {}
    names = []
    for source in sources:
        seen[source.name] = seen.get(source.name, 0) + 1
        names.append(source.name if seen[source.name] == 1 else f"{source.name}-{seen[source.name]}")
    return names


def idle_step(step: Step) -> Step:
    """The step as it was for a source that had no part in it."""
    root = TokenTree.root_only(step.tree.tokens[:, 0])
    return Step(step.rows, root, [0] * len(step.rows), new_tokens=step.new_tokens)


def verified_part(proposal: Proposal, verified: Any) -> TokenTree:
    """A source's own tree, of the nodes that were verified: the others are padding."""
    assert proposal.node_of is not None
    is_verified = np.take_along_axis(verified, proposal.node_of.clip(0), 1) & (proposal.node_of >= 0)
    width = int(np.flatnonzero(is_verified.any(0))[-1]) + 1
    tree = proposal.tree.first(width)
    parents = tree.parents.where(torch.from_numpy(is_verified[:, :width]).to(tree.parents.device), -1)
    return TokenTree(tree.tokens, parents, tree.scores)
