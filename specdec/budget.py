"""How many nodes are worth verifying now."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor, nn

from specdec.kernels import Floats, Ints, best_size, count_accepted, seconds_of
from specdec.target import TargetModel
from specdec.tree import NODE_BUCKETS, TokenTree, bucket_of

SCORE_BINS = 12
DECAY = 0.98
"""Forgetting per step of the acceptance counts: a memory of about fifty steps."""
IDLE_DECAY = 0.995
"""Forgetting per step without a draft, so that drafting is tried again when the text has changed."""
PRIOR_WEIGHT = 4.0
"""How many observations the drafter's own score is worth against what was counted."""
PATIENCE = 4
"""Drafts in a row that may promise less than they cost before drafting rests."""
LEAST_PROMISE = 1.05
"""Speed-up that a draft must promise to count as one that pays: less is within the error of what is known."""
LEAST_TRUST, MOST_TRUST = 0.7, 1.1
"""Bounds of the factor between promises and what comes of them: the size that promises most is often overrated."""
TRUST_PRIOR = 50.0
"""Draft tokens, promised and accepted, that the factor of 1 is worth."""
TRUST_DECAY = 0.99
TRIAL_SHARE = 0.0075
"""Share of the time that goes into drafts while drafting does not pay, to see when it does again."""
LONGEST_REST = 128
DRIFT = 0.0005
"""Share per step by which a size that seems dear comes nearer to one in use, so that it is tried again."""
UPDATES_PER_LOOK = 8
"""Steps between two looks at the sizes that are not in use."""
FIRST_LENGTH = 1024
"""Tokens in the kv cache up to which step times count as the same; from there on they are told apart by doublings."""
PATIENCE_AT_LENGTH = 0.5
"""Seconds for measuring anew because the kv cache has grown."""


class StepTimes:
    """Seconds a target pass takes by node count, for one model and batch size: measured, then kept up to date.

    Args:
        max_nodes: Largest node count of interest.
    """

    def __init__(self, max_nodes: int) -> None:
        self.buckets = [n for n in NODE_BUCKETS if n <= max_nodes]
        self.seconds: dict[int, float] = {}
        self.uses: Counter[int] = Counter()
        self.measured: dict[int, float] = {}
        """What was known of each size before the first real step."""
        self.extra = 0.0
        """Seconds by which real steps took longer than that."""
        self._until_look = 0
        self._known: tuple[Ints, Floats] | None = None

    def measure(self, run: Callable[[int], None], patience: float = 2.0) -> None:
        """Times `run(nodes)` for the buckets, a few rounds, as long as `patience` seconds are not used up.

        Args:
            run: One pass with this many nodes, ending when the device has finished.
            patience: Seconds after which the rest is interpolated.
        """
        start = time.perf_counter()
        run(self.buckets[-1])  # warm-up
        for _ in range(3):
            for nodes in sorted(self.buckets, key=lambda n: (n not in (1, 8, self.buckets[-1]), n)):
                before = time.perf_counter()
                run(nodes)
                taken = time.perf_counter() - before
                self.seconds[nodes] = min(taken, self.seconds.get(nodes, taken))
                self._known = None
                if time.perf_counter() - start > patience and len(self.seconds) > 1:
                    return

    def known(self) -> tuple[Ints, Floats]:
        """Node counts that were measured, ascending, and their seconds, `[sizes]` each."""
        if self._known is not None:
            return self._known
        sizes = sorted(self.seconds)
        times = [self.seconds[n] for n in sizes]
        # A larger tree cannot be cheaper; where it seems so, the smaller one's time had noise, which only ever adds.
        for i in range(len(times) - 2, -1, -1):
            times[i] = min(times[i], times[i + 1])
        self._known = np.array(sizes), np.array(times)
        return self._known

    def of(self, nodes: int) -> float:
        """Seconds of a pass over a tree of this size; some size must have been measured."""
        return float(seconds_of(nodes, *self.known()))

    def update(self, nodes: int, seconds: float) -> None:
        """Takes in the time of a real step, faster while few of this size were seen.

        Sizes that were not used yet were measured without what comes before and after a pass; they are supposed to take
        as much longer than measured as the others did of late.
        """
        bucket = bucket_of(nodes, self.buckets)
        old = self.seconds.setdefault(bucket, seconds)
        if len(self.measured) < len(self.seconds):
            self.measured = {**self.seconds, **self.measured}
        taken = min(seconds, 1.5 * old)
        new = self.seconds[bucket] = old + max(0.3 / (1 + self.uses[bucket]), 0.05) * (taken - old)
        self._known = None
        self.uses[bucket] += 1
        self.extra += 0.1 * (taken - self.measured[bucket] - self.extra)
        self._until_look -= 1
        if self._until_look >= 0:
            return
        self._until_look = UPDATES_PER_LOOK - 1
        for other in self.seconds:
            drift = UPDATES_PER_LOOK * DRIFT * (new - self.seconds[other]) if other > bucket else 0.0
            if self.uses[other]:
                self.seconds[other] += drift
            else:
                self.measured[other] += drift
                self.seconds[other] = max(self.measured[other] + self.extra, 0.5 * self.measured[other])


Surroundings = tuple[int, int, str]
"""What step times are measured for: rows and length by powers of two; where, in what type and how the model runs."""

_TIMES: WeakKeyDictionary[nn.Module, dict[Surroundings, StepTimes]] = WeakKeyDictionary()


@dataclass
class Learned:
    """What was counted of one kind of call.

    Args:
        tried: Drafts whose parent was accepted, by bin of their score, `[bins]`.
        hit: Those among them that were accepted, `[bins]`.
        promised: Draft tokens of late that were expected to be accepted, over all rows.
        kept: Those that were.
        losses: Drafts in a row that promised less than they cost.
        rest: Steps for which drafting still rests.
    """

    tried: Floats = field(default_factory=lambda: np.zeros(SCORE_BINS))
    hit: Floats = field(default_factory=lambda: np.zeros(SCORE_BINS))
    promised: float = 0.0
    kept: float = 0.0
    losses: int = 0
    rest: int = 0

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
        self._promise = 0.0
        self._manner = ""

    def begin(self, model: nn.Module, kind: Hashable, manner: str = "") -> None:
        """Takes up what is known of a kind of call, from this budget's calls or another's of the same model and owner.

        Args:
            model: The target.
            kind: Calls in which drafts of one score are accepted about as often: the same drafter, sampled or not.
            manner: How the model's passes are computed: what was measured of others says nothing of these.
        """
        if self.fixed:
            return
        if manner != self._manner:
            self._manner = manner
            self.forget_times()
        learned = self.learned = _LEARNED.setdefault(model, {}).setdefault((self.owner, kind), Learned())
        learned.rest, learned.losses = 0, min(learned.losses, PATIENCE - 1)  # another prompt is worth one try

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
        if self.learned.rest > 0:
            self.learned.rest -= 1
            self.num_rests += 1
            return 1
        return self.max_nodes

    def set_length(self, tokens: int) -> None:
        """Tells how many tokens the kv cache of the longest row holds: the more, the longer each pass takes."""
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
            patience = {"patience": PATIENCE_AT_LENGTH} if size in self._times else {}
            patience |= {"patience": float("inf")} if in_full else {}
            times.measure(lambda nodes: target.trial_pass(tokens, nodes), **patience)
        self._times[size] = known[surroundings]
        self._lengths[size] = self._length

    def choose(self, tree: TokenTree, spent: float = 0.0) -> TokenTree:
        """The part of a proposal that is worth a target pass; the root alone when none is.

        Args:
            tree: The proposal, best nodes first.
            spent: Seconds that drafting it took: the dearer it was, the more of it should be made of it.
        """
        if tree.steps is not None:  # a step is judged as a whole or not at all
            return tree
        tree = tree.first(self.max_nodes)
        times = self._times.get(_size(len(tree.tokens)))
        if self.fixed or times is None or tree.num_nodes == 1 or tree.scores is None:
            return tree
        learned, rows, scores = self.learned, len(tree.tokens), tree.host_scores
        assert scores is not None
        counts = learned.tried, learned.hit, PRIOR_WEIGHT
        trust = learned.trust
        best, tokens, taken, plain = best_size(
            tree.host_parents, scores, *counts, *times.known(), float(spent), float(trust)
        )
        learned.losses = 0 if tokens * plain > LEAST_PROMISE * rows * (taken + spent) else learned.losses + 1
        if learned.losses >= PATIENCE:
            learned.rest = min(int((spent + taken - plain) / (TRIAL_SHARE * plain)), LONGEST_REST)
        if best == 1:
            learned.forget(IDLE_DECAY)
        self._promise = (tokens - rows) / trust
        self.sizes[best] += 1
        self.last_choice = Choice(tree.num_nodes, best, tokens, spent + taken, rows, plain)
        return tree.first(best)

    def observe(self, tree: TokenTree, accepted: list[list[int]]) -> None:
        """Counts which nodes were accepted where their parent had been.

        Args:
            tree: The verified tree.
            accepted: Per row the accepted draft nodes, from the root's child down.
        """
        if tree.num_nodes == 1 or tree.scores is None or tree.steps is not None:
            return
        parents, scores = tree.host_parents, tree.host_scores
        assert scores is not None
        accepted_nodes = np.zeros(parents.shape, np.bool_)
        accepted_nodes[:, 0] = True
        for row, nodes in enumerate(accepted):
            accepted_nodes[row, nodes] = True
        learned = self.learned
        count_accepted(parents, scores, accepted_nodes, learned.tried, learned.hit, DECAY)
        if self._promise > 0.0:
            learned.promised = TRUST_DECAY * learned.promised + self._promise
            learned.kept = TRUST_DECAY * learned.kept + sum(map(len, accepted))
            self._promise = 0.0

    def record(self, rows: int, nodes: int, seconds: float) -> None:
        """Takes in the time a step took, drafting left out."""
        if times := self._times.get(_size(rows)):
            times.update(nodes, seconds)


def _size(rows: int) -> int:
    """Batch sizes are told apart by powers of two."""
    return 1 << (rows - 1).bit_length()
