"""How many nodes are worth verifying now."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor, nn

from specdec.kernels import Floats, Ints, best_size, count_accepted, count_followed
from specdec.step_times import StepTimes
from specdec.target import TargetModel
from specdec.tree import NODE_BUCKETS, TokenTree

SCORE_BINS = 12
DECAY = 0.98
"""Forgetting per step of the acceptance counts: a memory of about fifty steps."""
IDLE_DECAY = 0.995
"""Forgetting per step without a draft, so that drafting is tried again when the text has changed."""
PRIOR_WEIGHT = 4.0
"""How many observations the drafter's own score is worth against what was counted."""
PATIENCE = 4
"""Drafts that may promise less than they cost, since one has brought more, before drafting rests."""
LEAST_PROMISE = 1.05
"""Speed-up that a draft must promise to count as one that pays: less is within the error of what is known."""
FIRST_CREDIT, MOST_CREDIT = 1.0, 2.0
"""Passes without a draft that drafting may lose before anything is known, and after a time in which it has paid."""
MOST_DEBT, DEBT_AT_START = 3.0, 1.0
"""Passes that drafting can owe at most, and when a call begins: another prompt may be another matter."""
DEBT_MARGIN = 0.5
"""What a draft must promise above a pass without, for each pass that drafting owes."""
LEAST_TRUST, MOST_TRUST = 0.7, 1.1
"""Bounds of the factor between promises and what comes of them: the size that promises most is often overrated."""
TRUST_PRIOR = 50.0
"""Draft tokens, promised and accepted, that the factor of 1 is worth."""
TRUST_DECAY = 0.99
TRIAL_SHARE = 0.005
"""Share of the time that goes into drafts while drafting does not pay, to see when it does again; and by which what
drafting has lost is forgiven."""
LONGEST_REST = 128
PLAIN_STEPS_PER_LOOK = 4
"""Steps without a draft of which one is taken into the step times."""
FIRST_LENGTH = 1024
"""Tokens in the kv cache up to which step times count as the same; from there on they are told apart by doublings."""

Surroundings = tuple[int, int, str]
"""What step times are measured for: rows and length by powers of two; where, in what type and how the model runs."""

_TIMES: WeakKeyDictionary[nn.Module, dict[Surroundings, StepTimes]] = WeakKeyDictionary()


@dataclass
class Standing:
    """How drafting stands at one batch size.

    Args:
        credit: What drafts have brought above their cost of late, in passes without a draft; what they owe if negative.
        losses: Drafts that promised less than they cost, since one has brought more.
        rest: Steps for which drafting still rests.
    """

    credit: float = FIRST_CREDIT
    losses: int = 0
    rest: int = 0

    @property
    def margin(self) -> float:
        """Speed-up that a draft must promise: promises that were not kept make for higher ones to be asked for."""
        return 1.0 + DEBT_MARGIN * max(-self.credit, 0.0)

    def book(self, passes: float) -> None:
        """Adds to the credit what a draft has brought above its cost, in passes without a draft."""
        self.credit = min(max(self.credit + passes, -MOST_DEBT), MOST_CREDIT)
        if passes > 0.0:
            self.losses = 0

    def lose(self, passes: float) -> None:
        """Notes a draft that promises less than it costs: rests double up to where such drafts take `TRIAL_SHARE`."""
        self.losses += 1
        if self.losses >= PATIENCE:
            doubled = 2 ** min(self.losses - PATIENCE, 10)
            self.rest = min(int(passes / TRIAL_SHARE), doubled, LONGEST_REST)


@dataclass
class Learned:
    """What was counted of one kind of call.

    Args:
        tried: Drafts whose parent was accepted, by bin of their score, `[bins]`.
        hit: Those among them that were accepted, `[bins]`.
        promised: Draft tokens of late that were expected to be accepted, over all rows.
        kept: Those that were.
        standings: How drafting stands, by batch size.
    """

    tried: Floats = field(default_factory=lambda: np.zeros(SCORE_BINS))
    hit: Floats = field(default_factory=lambda: np.zeros(SCORE_BINS))
    promised: float = 0.0
    kept: float = 0.0
    standings: dict[int, Standing] = field(default_factory=dict)

    def standing(self, rows: int) -> Standing:
        """How drafting stands with so many rows; what is not known yet is supposed to be as with other numbers."""
        size = _size(rows)
        if size not in self.standings:
            known = [standing.credit for standing in self.standings.values()]
            credit = min(max(sum(known) / len(known), -DEBT_AT_START), FIRST_CREDIT) if known else FIRST_CREDIT
            self.standings[size] = Standing(credit)
        return self.standings[size]

    @property
    def trust(self) -> float:
        """Accepted draft tokens for each one that was promised."""
        trust = (self.kept + TRUST_PRIOR) / (self.promised + TRUST_PRIOR)
        return min(max(trust, LEAST_TRUST), MOST_TRUST)

    def forget(self, decay: float) -> None:
        """Lets the counts be worth less."""
        self.tried *= decay
        self.hit *= decay
        self.promised *= decay
        self.kept *= decay


_LEARNED: WeakKeyDictionary[nn.Module, dict[Hashable, Learned]] = WeakKeyDictionary()
"""By kind of call: what one budget has learned of a model, the next one knows."""


class Choice(NamedTuple):
    """What was decided on a proposal, and why.

    Args:
        proposed: Nodes of the proposal.
        nodes: Nodes of it that were verified.
        tokens: Tokens expected of that, over all rows.
        seconds: What it should take: drafting and the target pass.
        plain_tokens: Tokens of a pass without a draft: one per row.
        plain_seconds: What that takes.
    """

    proposed: int
    nodes: int
    tokens: float
    seconds: float
    plain_tokens: int
    plain_seconds: float


class Pending(NamedTuple):
    """What a decision waits for.

    Args:
        tree: The proposal.
        promise: Draft tokens that were expected to be accepted, over all rows; 0 where none is verified.
        cost: What drafting and verifying take above a pass without a draft, in such passes.
    """

    tree: TokenTree
    promise: float
    cost: float


class Budget:
    """Chooses the number of nodes n that maximises expected tokens per second.

    `(rows + expected accepted draft tokens in the first n nodes) / (t(n) + time of the drafting)`, over the node-count
    buckets, one node ("no draft") included; drafting rests while even the best n is slower than not to draft at all.
    Expectations are products of calibrated scores along paths; scores are calibrated by decayed
    counts of how often drafts of such a score, whose parent had been accepted, were accepted. Growing best-first by
    path product is optimal at every size at once (OPT-Tree, arXiv 2406.17276; Sequoia, arXiv 2402.12374, for t(n)).

    Args:
        max_nodes: Largest tree to verify, root included.
        fixed: Always verify as many nodes as proposed (up to `max_nodes`): for measuring and tests.
        owner: What is known of a model is shared by the budgets of one owner. Methods that are measured against each
            other have one each, so that none learns from another.
    """

    def __init__(self, max_nodes: int = 64, fixed: bool = False, owner: Hashable = None) -> None:
        if max_nodes not in NODE_BUCKETS:
            raise ValueError(f"max_nodes={max_nodes} is not allowed; use one of {', '.join(map(str, NODE_BUCKETS))}")
        self.max_nodes = max_nodes
        self.fixed = fixed
        self.owner = owner
        self.learned = Learned()
        self.last_choice: Choice | None = None
        """The latest decision; None before the first one."""
        self.sizes: Counter[int] = Counter()
        """How often trees of so many nodes were chosen; 1 is no draft."""
        self.num_rests = 0
        """Steps in which drafting rested."""
        self._times: dict[int, StepTimes] = {}
        self._lengths: dict[int, int] = {}
        self._length = 0
        self._manner = ""
        self._rows = 1
        self._num_plain = 0
        self._pending: Pending | None = None

    def begin(self, model: nn.Module, kind: Hashable, manner: str = "") -> None:
        """Takes up what is known of a kind of call, from this budget's calls or another's of the same model and owner.

        Args:
            model: The target.
            kind: Calls in which drafts of one score are accepted about as often: the same drafter, sampled or not.
            manner: How the model's passes are computed: what was measured of others says nothing of these.
        """
        self._pending = None
        if self.fixed:
            return
        if manner != self._manner:
            self._manner = manner
            self.forget_times()
        _compile_kernels()
        learned = self.learned = _LEARNED.setdefault(model, {}).setdefault((self.owner, kind), Learned())
        for standing in learned.standings.values():  # another prompt is worth a draft
            standing.rest, standing.losses = 0, min(standing.losses, PATIENCE + 2)
            standing.credit = max(standing.credit, -DEBT_AT_START)

    @property
    def tried(self) -> Floats:
        """Drafts whose parent was accepted, by bin of their score, `[bins]`."""
        return self.learned.tried

    @property
    def hit(self) -> Floats:
        """Those among them that were accepted, `[bins]`."""
        return self.learned.hit

    def forget_times(self) -> None:
        """Takes the step times anew from what is known of the model, which has changed."""
        self._times.clear()
        self._lengths.clear()

    def nodes_to_draft(self) -> int:
        """How large a tree the drafter is asked for now: one node while drafting rests, because it does not pay.

        Rests are so long that a drafter that is of no use costs `TRIAL_SHARE` of the time.
        """
        standing = self.learned.standing(self._rows)
        if standing.rest > 0:
            standing.rest -= 1
            self.num_rests += 1
            return 1
        return self.max_nodes

    @property
    def rests_next(self) -> bool:
        """Whether drafting rests in the next step, whatever comes of this one."""
        return self.learned.standing(self._rows).rest > 0

    def set_size(self, rows: int, tokens: int) -> None:
        """Tells how many rows there are, and how many tokens the kv cache of the longest one holds."""
        self._rows = rows
        self._length = max(-(-tokens // FIRST_LENGTH) - 1, 0).bit_length()

    def is_ready(self, rows: int) -> bool:
        """Whether the step times at this batch size and length are known (or not needed)."""
        size = _size(rows)
        return self.fixed or (size in self._times and self._lengths.get(size, self._length) == self._length)

    def step_seconds(self, rows: int) -> tuple[Ints, Floats] | None:
        """Node counts and seconds of a target pass at this batch size, `[sizes]` each; None while not measured."""
        times = self._times.get(_size(rows))
        return None if times is None or not times.seconds else times.known()

    def measure(self, target: TargetModel, tokens: Tensor, room: int, in_full: bool = False) -> None:
        """Finds the step times at the current batch size and length; measures them the first time a model has these.

        Args:
            target: The model in mid-generation; what is run is rolled back.
            tokens: What to run, as many per row as the largest tree has nodes, `[batch, nodes]`, on the device of the
                trees. A mixture of experts takes longer the more they differ, so they should be real text.
            room: Tokens that may still be generated; a chain is not run beyond.
            in_full: Measure all there is to measure, however long it takes, as other processes do.
        """
        known = _TIMES.setdefault(target.model, {})
        size = _size(len(tokens))
        surroundings = size, self._length, f"{target.model.device} {target.model.dtype} {self._manner}".rstrip()
        if in_full or surroundings not in known or known[surroundings].buckets[-1] < self.max_nodes:
            widest = min(self.max_nodes, room) if target.lockstep else self.max_nodes
            times = known[surroundings] = StepTimes(max(widest, 1))
            for nodes in times.buckets:
                target.prepare_pass(tokens, nodes)
            before = self._times.get(size)
            if before is not None and before.seconds and before.buckets[-1] >= times.buckets[-1] and not in_full:
                times.measure_change(lambda nodes: target.trial_pass(tokens, nodes), before)
            else:
                patience = {"patience": float("inf")} if in_full else {}
                times.measure(lambda nodes: target.trial_pass(tokens, nodes), **patience)
        self._times[size] = known[surroundings]
        self._lengths[size] = self._length

    def pass_over(self, rows: int, spent: float) -> None:
        """Notes that a drafter found nothing to propose.

        Args:
            rows: Of the batch.
            spent: Seconds that it took to find that out.
        """
        times = self._times.get(_size(rows))
        if not self.fixed and times is not None and times.seconds:
            self.learned.standing(rows).lose(spent / float(times.known()[1][0]))

    def choose(self, tree: TokenTree, spent: float = 0.0) -> TokenTree:
        """The part of a proposal that is worth a target pass; the root alone when none is.

        Args:
            tree: The proposal, best nodes first.
            spent: Seconds that drafting it took: the dearer it was, the more of it should be made of it.
        """
        if tree.steps is not None:  # a step is judged as a whole or not at all
            return tree
        tree = tree.first(self.max_nodes)
        times = self._times.get(_size(tree.tokens.shape[0]))
        if self.fixed or times is None or tree.num_nodes == 1 or tree.scores is None:
            return tree
        learned, rows, scores = self.learned, tree.tokens.shape[0], tree.host_scores
        assert scores is not None
        counts = learned.tried, learned.hit, PRIOR_WEIGHT
        trust, standing = learned.trust, learned.standing(rows)
        best, tokens, taken, plain = best_size(
            tree.host_parents, scores, *counts, *times.known(), float(spent), float(trust), standing.margin
        )
        if tokens * plain <= LEAST_PROMISE * rows * (taken + spent):
            standing.lose((spent + taken - plain) / plain)
        if best == 1:
            learned.forget(IDLE_DECAY)
        cost = (spent + taken - plain) / plain
        self._pending = Pending(tree, (tokens - rows) / trust, cost if best > 1 else 0.0)
        self.sizes[best] += 1
        self.last_choice = Choice(tree.num_nodes, best, tokens, spent + taken, rows, plain)
        return tree.first(best)

    def observe(
        self, tree: TokenTree, accepted: list[list[int]], tokens: Sequence[Sequence[int]] | None = None
    ) -> None:
        """Counts which nodes were right where their parent was, and books what drafting has brought and cost.

        Args:
            tree: The verified tree.
            accepted: Per row the accepted draft nodes, from the root's child down.
            tokens: Per row what the target has picked behind the root. With it all nodes count that were proposed,
                those too that were not worth verifying. None where another token than that might be accepted.
        """
        pending, self._pending = self._pending, None
        learned, counts = self.learned, (self.learned.tried, self.learned.hit, DECAY)
        num_accepted = sum(map(len, accepted))
        if pending is not None and pending.promise > 0.0:
            learned.promised = TRUST_DECAY * learned.promised + pending.promise
            learned.kept = TRUST_DECAY * learned.kept + num_accepted
            learned.standing(len(accepted)).book(num_accepted / len(accepted) - pending.cost)
        if pending is not None and tokens is not None and pending.tree.draft_probs is None:
            proposed = pending.tree
            known = np.full((len(tokens), max(map(len, tokens))), -1, np.int64)
            for row, picked in enumerate(tokens):
                known[row, : len(picked)] = picked
            assert proposed.host_scores is not None
            count_followed(proposed.host_tokens, proposed.host_parents, proposed.host_scores, known, *counts)
        elif tree.num_nodes > 1 and tree.scores is not None and tree.steps is None:
            accepted_nodes = np.zeros(tree.tokens.shape, np.bool_)
            accepted_nodes[:, 0] = True
            for row, nodes in enumerate(accepted):
                accepted_nodes[row, nodes] = True
            assert tree.host_scores is not None
            count_accepted(tree.host_parents, tree.host_scores, accepted_nodes, *counts)

    def record(self, rows: int, nodes: int, seconds: float) -> None:
        """Takes in the time a step took, drafting left out."""
        standing = self.learned.standing(rows)
        standing.credit = max(standing.credit, min(standing.credit + TRIAL_SHARE, 0.0))
        self._num_plain += nodes == 1
        if nodes == 1 and self._num_plain % PLAIN_STEPS_PER_LOOK:  # that time is well known
            return
        if times := self._times.get(_size(rows)):
            times.update(nodes, seconds)


def _size(rows: int) -> int:
    """Batch sizes are told apart by powers of two."""
    return 1 << (rows - 1).bit_length()


@functools.cache
def _compile_kernels() -> None:
    """Compiles, or loads what was compiled before, so that no step of a generation waits for it."""
    ids, parents, scores = np.zeros((1, 2), np.int64), np.array([[-1, 0]]), np.zeros((1, 2), np.float32)
    tried, known = np.zeros(SCORE_BINS), (np.array([1, 2]), np.ones(2))
    best_size(parents, scores, tried, tried.copy(), PRIOR_WEIGHT, *known, 0.0, 1.0, 1.0)
    count_accepted(parents, scores, np.ones((1, 2), np.bool_), tried, tried.copy(), DECAY)
    count_followed(ids, parents, scores, ids.copy(), tried, tried.copy(), DECAY)
