"""Several drafters as one: all they propose goes into one tree."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any
from weakref import ref

import numpy as np
import torch

from specdec.drafters.base import (
    NO_NEEDS,
    DraftContext,
    Drafter,
    DrafterSwitchedOffWarning,
    DraftSession,
    Needs,
    Step,
    check_proposal,
)
from specdec.drafters.merging.call import MergedCall, PendingStep, Proposal, distinct_names, idle_step, verified_part
from specdec.drafters.merging.chain import MOST_NODES, Chained, grafted, leaves_of
from specdec.drafters.merging.growth import (
    CandidateStore,
    add_tree,
    follow_merged,
    grow_merged,
    mark_verified,
)
from specdec.drafters.merging.kernels import compile_kernels
from specdec.drafters.merging.known import Known, known_of, new_known
from specdec.drafters.merging.worth import HEAVY_SHARE, Asked, Worth, sureness_of
from specdec.kernels import Ints
from specdec.target import embedding_rows
from specdec.tree import TokenTree

MAX_SOURCES = 8
UNKNOWN_SCORE = 0.5
"""P(accepted | parent accepted) of a node whose source gives none, until it is counted."""


@dataclass(eq=False)
class MergedDrafter(Drafter):
    """Merges the trees of several drafters into one, the best nodes of all first.

    A path that several sources name stands in the tree once, and is worth more. What a node is worth is learned by the
    sources that name it, its depth and their scores: decayed counts of how often such nodes were accepted where their
    parent was. By these the tree grows best-first, which is optimal at every size (OPT-Tree, arXiv 2406.17276), so a
    source gets as many nodes as it earns, and what no source is good at gets none.

    Each source has its time measured. One whose time matters, such as a draft model, is asked only while the tokens
    that come of it alone are worth more than that time; this is learned apart for steps in which the cheaper sources
    are sure of themselves and those in which they are not, and tried again now and then.

    A source that raises is left out for the rest of the call. Where a verifier needs drafts that were drawn at random
    (`"block"`, `"traversal"`) there is no merging: a drawn tree must be verified with all its nodes and no others, so
    the first source that draws is the only one then.

    Args:
        sources: The drafters, used as they are. Each keeps what it learns.
        max_nodes: Largest tree, the root included.
        prior_weight: How many counted nodes the sources' own scores are worth.
        memory: Steps after which a count is worth 1/e.
        chained: Let sources go on behind what other ones have named, while it pays.
    """

    name = "merged"

    sources: Sequence[Drafter] = ()
    max_nodes: int = 64
    prior_weight: float = 6.0
    memory: float = 60.0
    chained: bool = True

    def __post_init__(self) -> None:
        for name, least in (("max_nodes", 1), ("prior_weight", 0.01), ("memory", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        self._lock = threading.Lock()
        self._thread = threading.local()
        self._shares_counts = True
        self._clock: Callable[[], float] = time.perf_counter
        self._decay = float(np.exp(-1.0 / self.memory))
        self._target: Callable[[], Any]
        self._use(self.sources)

    def _use(self, sources: Sequence[Drafter]) -> None:
        """Takes up sources, and forgets what was counted of others."""
        self.sources = sources = list(sources)
        for source in sources:
            if not isinstance(source, Drafter):
                raise TypeError(f"sources must be Drafters, got {source!r:.200}; specdec.accelerate takes names too")
        if not 1 <= len(sources) <= MAX_SOURCES:
            raise ValueError(f"sources: {len(sources)} drafters were given; 1 to {MAX_SOURCES} can be merged")
        if len(set(map(id, sources))) < len(sources):
            raise ValueError("sources: one drafter was given twice; leave it out once")
        self.needs_hidden_states = any(source.needs_hidden_states for source in sources)
        self.needs_step_seconds = any(source.needs_step_seconds for source in sources)
        self.num_top_tokens = max(source.num_top_tokens for source in sources)
        self._known = new_known(len(sources))
        self._target = lambda: None

    def fresh(self) -> MergedDrafter:
        """Fresh sources, all of which are asked in each step: what they cost is not measured."""
        settings = {name: getattr(self, name) for name in ("max_nodes", "prior_weight", "memory", "chained")}
        new = MergedDrafter([source.fresh() for source in self.sources], **settings)
        new.name, new._clock = self.name, lambda: 0.0
        new._shares_counts = False
        return new

    def settings(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name != "sources"}
        names = distinct_names(self.sources)
        return values | {"sources": {name: s.settings() for name, s in zip(names, self.sources, strict=True)}}

    def bind(self, model: Any) -> None:
        for source in self.sources:
            source.bind(model)
        with self._lock:
            if self._target() is not model:
                self._target = ref(model)
                self._vocab_size = embedding_rows(model)
                kind = type(self), *map(type, self.sources), str(self.settings())
                number = len(self.sources)
                self._known = known_of(model, kind, number) if self._shares_counts else new_known(number)
        compile_kernels()

    def needs(self, device: torch.device, rows: int, is_sampled: bool) -> Needs:
        """As its sources; on the CPU those excepted that have not earned of late what they take."""
        needs, known = [source.needs(device, rows, is_sampled) for source in self.sources], self._known[is_sampled]
        worth = known.worth(rows)
        costly = [source for source, need in enumerate(needs) if need != NO_NEEDS or worth.is_dear(source, HEAVY_SHARE)]
        idle = self._thread.idle = known.idle_sources(rows, costly) if device.type == "cpu" else set()
        kept = [need for source, need in enumerate(needs) if source not in idle]
        return Needs(any(need.hidden_states for need in kept), max((need.top_tokens for need in kept), default=0))

    def kind(self) -> tuple[Hashable, ...]:
        return *super().kind(), *sorted(getattr(self._thread, "idle", ()))

    def state_dict(self) -> dict[str, Any]:
        modes = [[is_sampled, known.state_dict()] for is_sampled, known in self._known.items()]
        return {"modes": modes, "sources": [source.state_dict() for source in self.sources]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for is_sampled, known in state["modes"]:
            self._known[bool(is_sampled)].load_state_dict(known)
        for source, known in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(known)

    # --- a call ---

    def start(self, context: DraftContext) -> DraftSession:
        idle: set[int] = self._thread.__dict__.pop("idle", set())
        known = self._known[context.sampler is not None and context.sampler.noise is not None]
        call = self._thread.call = MergedCall.begin(self.sources, known, idle, self._clock())
        for source in tuple(call.active):

            def open_session(source: int = source) -> None:
                call.sessions[source] = self.sources[source].start(context)

            self._timed(call, source, "start", context, open_session)
        return self

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        call = self._of_thread(context)
        width = max(1, min(max_nodes, self.max_nodes))
        call.alone = call.pending = None
        call.lengths, call.step_started = [len(sequence) for sequence in context.sequences], self._clock()
        for source in call.idle:
            call.records[source].skipped += 1
        if len(call.active) == 1:
            alone = self._ask(call, call.active[0], context, width, 0)
            return alone or TokenTree.root_only(torch.tensor([ids[-1] for ids in context.sequences]))
        roots = np.array([sequence[-1] for sequence in context.sequences], np.int64)
        nodes = call.candidates(roots, width)
        max_depths = np.array(context.max_depth, np.int64)
        call.pending = PendingStep(list(context.rows), nodes, max_depths)
        worth = call.known.worth(len(roots))
        grown = None
        for source in self._order(call, worth):
            sureness = 0
            if worth.is_dear(source):
                grown = grown or self._grow_arrays(call.known, nodes, width)
                sureness = sureness_of(grown[1] / len(roots))
                if call.drawing is None and not worth.is_asked(source, sureness, self._clock()):
                    call.records[source].skipped += 1
                    continue
            tree, grown = self._ask(call, source, context, width, sureness), None
            if tree is not None and tree.draft_probs is not None:
                call.drawing, call.alone, call.pending = source, source, None
                return tree
        tree = TokenTree.of_arrays(*(grown or self._grow_arrays(call.known, nodes, width))[0])
        call.merging += self._clock() - call.step_started
        if 1 < tree.num_nodes < width and self._is_chaining(call) and worth.pays(len(self.sources), self._clock()):
            return self._continued(call, context, tree, roots, width)
        return tree

    def observe(self, context: DraftContext, step: Step) -> None:
        call = self._of_thread(context)
        pending, call.pending = call.pending, None
        alone, call.alone = call.alone, None
        if alone is not None:
            call.credit_alone(alone, context, self._clock())
        if pending is None or pending.rows != context.rows:
            for source in self._listening(call):
                self._tell(call, source, context, step if source == alone else None, step)
            return
        known, counts = pending.known(context, call.counts(context))
        own, gains = np.empty((len(counts), len(self.sources)), np.int64), np.empty(len(self.sources), np.int64)
        with call.known.lock:
            counted = self._decay, call.known.tried, call.known.hit
            tokens = follow_merged(pending.nodes, known, counts, *counted, call.credits, own, gains)
            asked = {s: Asked(p.seconds, p.sureness, int(gains[s])) for s, p in pending.proposals.items()}
            now = self._clock()
            for s, gain in enumerate(gains.tolist()):
                call.records[s].saved += gain / max(tokens, 1) * (now - call.step_started)
            if pending.chained is not None:
                asked[len(self.sources)] = Asked(pending.chained.seconds, 0, pending.chained.gain(known, counts))
            call.known.worth(len(counts)).observe(asked, len(counts), tokens, call.step_started, now)
        verified = None
        for source in self._listening(call):
            drafter, proposal, shown = self.sources[source], pending.proposals.get(source), None
            if not drafter.num_top_tokens and proposal is not None and proposal.node_of is not None:
                if verified is None:
                    verified = np.zeros(pending.nodes.shape, np.bool_)
                    mark_verified(pending.nodes, step.tree.host_tokens, step.tree.host_parents, verified)
                part, accepted = verified_part(proposal, verified), own[:, source].tolist()
                shown = Step(step.rows, part, accepted, new_tokens=step.new_tokens)
            self._tell(call, source, context, shown, step)

    def sources_of(self, row: int, path: Sequence[int]) -> list[tuple[str, ...]]:
        call: MergedCall | None = getattr(self._thread, "call", None)
        return [(self.name,)] * len(path) if call is None else call.sources_of(row, path)

    def figures(self, context: DraftContext) -> dict[str, Any]:
        return self._of_thread(context).figures(context)

    def finish(self, context: DraftContext) -> None:
        call = self._of_thread(context)
        call.close(context, self._clock())
        for source in tuple(call.active):
            self._guarded(call, source, "finish", context, partial(call.sessions[source].finish, context))
        self._thread.call = None

    # --- its parts ---

    def _of_thread(self, context: DraftContext) -> MergedCall:
        call: MergedCall | None = getattr(self._thread, "call", None)
        if call is None or call.sources is not self.sources:
            self.start(context)
            call = self._thread.call
        assert call is not None
        return call

    def _listening(self, call: MergedCall) -> list[int]:
        """Sources that want to know what became of a step."""
        return [s for s in call.active if type(call.sessions[s]).observe not in (DraftSession.observe, Drafter.observe)]

    def _order(self, call: MergedCall, worth: Worth) -> list[int]:
        if call.drawing is not None:
            return [source for source in call.active if source == call.drawing]
        return worth.by_cost(call.active)

    def _ask(self, call: MergedCall, source: int, context: DraftContext, width: int, sureness: int) -> TokenTree | None:
        """A source's proposal, taken in among the candidates if there are any; None when the source has failed."""

        def ask() -> TokenTree:
            started = self._clock()
            tree = call.sessions[source].propose(context, width)
            seconds = self._clock() - started
            record = call.records[source]
            record.calls += 1
            record.seconds += seconds
            if call.pending is None:
                check_proposal(tree, context, width, self._vocab_size)
                record.proposed += int(np.count_nonzero(tree.host_parents >= 0))
                call.alone = source
                if tree.num_nodes > 1 and tree.scores is None and tree.draft_probs is None:
                    tree = replace(tree, scores=torch.full(tree.tokens.shape, UNKNOWN_SCORE))
            else:
                call.merging -= seconds
                node_of = self._add(call, source, context, tree, width)
                call.pending.proposals[source] = Proposal(tree, node_of, seconds, sureness)
            return tree

        tree: TokenTree | None = self._guarded(call, source, "propose", context, ask)
        return tree

    def _is_chaining(self, call: MergedCall) -> bool:
        return self.chained and call.drawing is None and len(call.active) > 1

    def _continued(
        self, call: MergedCall, context: DraftContext, tree: TokenTree, roots: Ints, width: int
    ) -> TokenTree:
        """The merged tree, gone on with behind each row's likeliest leaf by all sources that can."""
        assert call.pending is not None
        started, paths = self._clock(), leaves_of(tree)
        if paths is None:
            return tree
        most = min(MOST_NODES, width - tree.num_nodes + 1)
        is_longer = False
        for source in tuple(call.active):

            def extend(source: int = source) -> bool:
                more = call.sessions[source].extend(context, paths, most)
                if more is None or more.num_nodes == 1 or more.num_nodes > most:
                    return False
                whole, given = grafted(more, roots, paths)
                self._add(call, source, context, whole, whole.num_nodes, given)
                return True

            if call.pending.room() >= most:
                is_longer |= bool(self._guarded(call, source, "extend", context, extend))
        if is_longer:
            tree = TokenTree.of_arrays(*self._grow_arrays(call.known, call.pending.nodes, width)[0])
        call.pending.chained = Chained(paths, self._clock() - started)
        return tree

    def _add(
        self,
        call: MergedCall,
        source: int,
        context: DraftContext,
        tree: TokenTree,
        width: int,
        num_given: Ints | None = None,
    ) -> Ints | None:
        """Adds a tree to the candidates; each node's place there, or None for a tree that is not to be merged.

        Raises:
            TypeError: It is no tree.
            ValueError: It is not one that was asked for.
        """
        assert call.pending is not None
        is_tree = isinstance(tree, TokenTree) and tree.tokens.dtype == tree.parents.dtype == torch.int64
        if not is_tree or tree.tokens.shape[0] != len(context.rows) or tree.num_nodes > width:
            check_proposal(tree, context, width, self._vocab_size)
        if tree.num_nodes == 1 or tree.draft_probs is not None:
            return None
        node_of = np.empty(tree.tokens.shape, np.int64)
        given = call.roots if num_given is None else num_given
        scores = np.full(node_of.shape, UNKNOWN_SCORE, np.float32) if tree.host_scores is None else tree.host_scores
        pending = call.pending
        arrays = tree.host_tokens, tree.host_parents, scores, pending.max_depths
        taken = add_tree(pending.nodes, source, *arrays, self._vocab_size, node_of, given)
        if taken < 0:
            check_proposal(tree, context, width, self._vocab_size)
        call.records[source].proposed += taken
        return node_of

    def _grow_arrays(self, known: Known, nodes: CandidateStore, width: int) -> tuple[tuple[Ints, Ints, Any], float]:
        """Tokens, parents and scores of the merged tree, and how many draft tokens it should bring, over all rows."""
        shape = nodes.shape[0], width
        tokens, parents, scores = np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape, np.float32)
        with known.lock:
            counted = known.tried, known.hit, float(self.prior_weight)
            used, expected = grow_merged(nodes, *counted, tokens, parents, scores)
        return (tokens[:, :used], parents[:, :used], scores[:, :used]), expected

    def _tell(self, call: MergedCall, source: int, context: DraftContext, shown: Step | None, step: Step) -> None:
        """Tells a source what became of its nodes, if it had any; one that wants top tokens, of the whole tree."""
        drafter = self.sources[source]
        if drafter.num_top_tokens and step.top_tokens is not None:
            shown = step
            if drafter.num_top_tokens < step.top_tokens.shape[-1]:
                shown = replace(step, top_tokens=step.top_tokens[..., : drafter.num_top_tokens])
        elif shown is None:
            shown = step if step.tree.num_nodes == 1 else idle_step(step)
        self._timed(call, source, "observe", context, partial(call.sessions[source].observe, context, shown))

    def _timed(
        self, call: MergedCall, source: int, method: str, context: DraftContext, action: Callable[[], Any]
    ) -> None:
        started = self._clock()
        self._guarded(call, source, method, context, action)
        call.records[source].telling += self._clock() - started

    def _guarded(
        self, call: MergedCall, source: int, method: str, context: DraftContext, action: Callable[[], Any]
    ) -> Any:
        """Runs a source's method; after an error the source is left out, unless errors are to be raised."""
        try:
            return action()
        except Exception as error:
            if context.strict:
                raise
            call.active.remove(source)
            call.records[source].error = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"source {distinct_names(self.sources)[source]!r} of the merged drafter failed in {method}() and is "
                f"left out for the rest of this call; the output is complete and the same as without it. "
                f"{call.records[source].error}. Pass strict=True to raise instead.",
                DrafterSwitchedOffWarning,
                stacklevel=2,
            )
            return None
