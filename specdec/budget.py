"""How many nodes are worth verifying now."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple
from weakref import ref

import numpy as np
from torch import nn

from specdec.budgeting.ledger import LEARNED, SCORE_BINS, Learned
from specdec.budgeting.pass_times import StepTimes, Surroundings, keep_times, length_class, size_class, times_of
from specdec.budgeting.priors import first_seconds
from specdec.kernels import Floats, Ints, best_size, count_accepted, count_followed
from specdec.tree import NODE_BUCKETS, TokenTree

DECAY = 0.98
"""Forgetting per step of the acceptance counts: a memory of about fifty steps."""
IDLE_DECAY = 0.995
"""Forgetting per step without a draft, so that drafting is tried again when the text has changed."""
PRIOR_WEIGHT = 4.0
"""How many observations the drafter's own score is worth against what was counted."""
LEAST_PROMISE = 1.05
"""Speed-up that a draft must promise to count as one that pays: less is within the error of what is known."""
TRUST_DECAY = 0.99
MOST_STALL = 1.5
"""A step that took longer than so many times the usual is booked as one of that."""
PLAIN_STEPS_PER_LOOK = 4
"""Steps without a draft of which one is taken into the step times."""


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
        spent: Seconds that drafting took.
        seconds: What the pass should take.
        plain: What a pass without a draft should take.
    """

    tree: TokenTree
    promise: float
    spent: float
    seconds: float
    plain: float


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
        deterministic: Decide by nothing that is measured, nor by what earlier calls have taught: step times are those
            of the prior, drafting counts as free, and each call starts with empty counts.
    """

    def __init__(
        self, max_nodes: int = 64, fixed: bool = False, owner: Hashable = None, deterministic: bool = False
    ) -> None:
        if max_nodes not in NODE_BUCKETS:
            raise ValueError(f"max_nodes={max_nodes} is not allowed; use one of {', '.join(map(str, NODE_BUCKETS))}")
        self.max_nodes = max_nodes
        self.fixed = fixed
        self.owner = owner
        self.deterministic = deterministic
        self.learned = Learned()
        self.last_choice: Choice | None = None
        """The latest decision; None before the first one."""
        self.sizes: Counter[int] = Counter()
        """How often trees of so many nodes were chosen; 1 is no draft."""
        self.num_rests = 0
        """Steps in which drafting rested."""
        self._times: StepTimes | None = None
        self._target: Callable[[], nn.Module | None] = lambda: None
        self._rows, self._length, self._is_sampled, self._manner = 1, 0, False, ""
        self._num_plain = self._num_steps = self._num_calls = 0
        self._saved = 0.0
        self._pending: Pending | None = None
        self._unbooked: tuple[Pending, float] | None = None

    def begin(self, model: nn.Module, kind: tuple[Hashable, ...], is_sampled: bool = False, manner: str = "") -> None:
        """Takes up what is known of a kind of call, from this budget's calls or another's of the same model and owner.

        Args:
            model: The target.
            kind: Calls in which drafts of one score are accepted about as often: the same drafter.
            is_sampled: Whether tokens are sampled: such calls have counts and step times of their own.
            manner: How the model's passes are computed: what was measured of others says nothing of these.
        """
        self._pending = self._unbooked = None
        self._num_steps, self._saved = 0, 0.0
        if self.fixed:
            return
        self._target = ref(model)
        self.forget_times()
        self._is_sampled, self._manner = is_sampled, f"{model.device} {model.dtype} {manner}".rstrip()
        compile_kernels()
        if self.deterministic:
            self.learned = Learned()
            return
        self.learned = LEARNED.setdefault(model, {}).setdefault((self.owner, kind, is_sampled), Learned())
        self.learned.begin_call()

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
        self._times = None

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
        length = length_class(tokens)
        if rows != self._rows or length != self._length:
            self._rows, self._length = rows, length
            self.forget_times()

    @property
    def times(self) -> StepTimes:
        """What is known of passes with this model, batch size and length of the kv cache."""
        if self._times is None:
            model = self._target()
            at = Surroundings(size_class(self._rows), self._length, self._is_sampled, self._manner)
            if model is None:
                self._times = StepTimes(self.max_nodes)
            elif self.deterministic:
                self._times = StepTimes(self.max_nodes, first_seconds(model, at.rows, self.max_nodes))
            else:
                self._times = times_of(model, at, self.max_nodes)
        return self._times

    @property
    def step_seconds(self) -> tuple[Ints, Floats] | None:
        """Node counts and seconds of a target pass, `[sizes]` each; larger ones take longer. None: nothing is known."""
        return self.times.known() if not self.fixed and (self.times.is_known or self.times.seconds) else None

    def pass_over(self, spent: float) -> None:
        """Notes that a drafter found nothing to propose, and took `spent` seconds to find that out."""
        if (known := self.step_seconds) is not None:
            spent = 0.0 if self.deterministic else spent
            self.learned.standing(self._rows).lose(spent / float(known[1][0]))

    def choose(self, tree: TokenTree, spent: float = 0.0, trial: Callable[[int], None] | None = None) -> TokenTree:
        """The part of a proposal that is worth a target pass; the root alone when none is.

        Args:
            tree: The proposal, best nodes first.
            spent: Seconds that drafting it took: the more expensive it was, the more of it should be made of it.
            trial: Runs a pass with so many nodes, to its end on the device, for budgets that time sizes explicitly;
                this one learns from real steps.
        """
        tree = tree.first(self.max_nodes)
        if self.fixed or tree.num_nodes == 1 or tree.scores is None:
            return tree
        if (known := self.step_seconds) is None:
            return tree
        spent = 0.0 if self.deterministic else float(spent)
        learned, rows = self.learned, self._rows
        standing, worth = learned.standing(rows), learned.trust * self._worth
        assert tree.host_scores is not None
        counts = learned.tried, learned.hit, PRIOR_WEIGHT
        terms = spent, worth, standing.margin
        best, tokens, taken, plain = best_size(tree.host_parents, tree.host_scores, *counts, *known, *terms)
        if tokens * plain <= LEAST_PROMISE * rows * (taken + spent):
            standing.lose((spent + taken - plain) / plain)
        if best == 1:
            learned.forget(IDLE_DECAY)
        self._pending = Pending(tree, (tokens - rows) / worth, spent, taken, plain)
        self.sizes[best] += 1
        self.last_choice = Choice(tree.num_nodes, best, tokens, spent + taken, rows, plain)
        return tree.first(best)

    @property
    def _worth(self) -> float:
        """What an accepted token is worth, if a pass that all rows need less is worth one for each of them."""
        if self._rows == 1:
            return 1.0
        plain = self.times.of(1)
        by_rows = min((self.times.of(2) - plain) / plain, 1.0)  # share of a pass that it takes because of its rows
        return by_rows + (1.0 - by_rows) * self.learned.standing(self._rows).shortening

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
        if pending is None and tree.num_nodes == 1:
            return
        learned, counts = self.learned, (self.learned.tried, self.learned.hit, DECAY)
        num_accepted = sum(map(len, accepted))
        self._saved += num_accepted / len(accepted)
        if pending is not None and pending.promise > 0.0:
            learned.promised = TRUST_DECAY * learned.promised + pending.promise
            learned.kept = TRUST_DECAY * learned.kept + num_accepted
            self._unbooked = pending, num_accepted / len(accepted)
        if pending is not None and tokens is not None and pending.tree.draft_probs is None:
            proposed = pending.tree
            known = np.full((len(tokens), max(map(len, tokens))), -1, np.int64)
            for row, picked in enumerate(tokens):
                known[row, : len(picked)] = picked
            assert proposed.host_scores is not None
            count_followed(proposed.host_tokens, proposed.host_parents, proposed.host_scores, known, *counts)
        elif tree.num_nodes > 1 and tree.scores is not None:
            accepted_nodes = np.zeros(tree.tokens.shape, np.bool_)
            accepted_nodes[:, 0] = True
            for row, nodes in enumerate(accepted):
                accepted_nodes[row, nodes] = True
            assert tree.host_scores is not None
            count_accepted(tree.host_parents, tree.host_scores, accepted_nodes, *counts)

    def record(self, nodes: int, seconds: float) -> None:
        """Takes in the time a step took, drafting left out, and books what its draft has brought above that."""
        if self.fixed:
            return
        if self.deterministic:
            seconds = self.times.of(nodes)
        standing = self.learned.standing(self._rows)
        standing.forgive()
        self._num_steps += 1
        unbooked, self._unbooked = self._unbooked, None
        if unbooked is not None:
            draft, brought = unbooked
            taken = draft.spent + min(seconds, MOST_STALL * draft.seconds)
            standing.book(self._worth * brought - (taken - draft.plain) / draft.plain)
        if self.deterministic:
            return
        self._num_plain += nodes == 1
        if nodes > 1 or self._num_plain % PLAIN_STEPS_PER_LOOK == 1:  # that time is well known
            self.times.update(nodes, seconds)

    def end(self, rows: int, longest: int) -> None:
        """Records the end of a call: how many rows it had, and how many tokens the longest of them generated."""
        if self.fixed:
            return
        if rows > 1:
            self.learned.standing(rows).end_call(longest - 1 - self._num_steps, self._saved)
        self._num_calls += 1
        model = self._target()
        if model is not None and not self.deterministic and self._num_calls.bit_count() == 1:  # calls 1, 2, 4, 8 ...
            keep_times(model)

    def fresh(self) -> Budget:
        """A deterministic budget of the same settings, for one call."""
        return Budget(self.max_nodes, self.fixed, self.owner, deterministic=True)


@functools.cache
def compile_kernels() -> None:
    """Compiles, or loads what was compiled before, so that no step of a generation waits for it."""
    ids, parents, scores = np.zeros((1, 2), np.int64), np.array([[-1, 0]]), np.zeros((1, 2), np.float32)
    tried, known = np.zeros(SCORE_BINS), (np.array([1, 2]), np.ones(2))
    best_size(parents, scores, tried, tried.copy(), PRIOR_WEIGHT, *known, 0.0, 1.0, 1.0)
    count_accepted(parents, scores, np.ones((1, 2), np.bool_), tried, tried.copy(), DECAY)
    count_followed(ids, parents, scores, ids.copy(), tried, tried.copy(), DECAY)
