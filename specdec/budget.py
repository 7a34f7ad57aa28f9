"""How many nodes are worth verifying now."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple
from weakref import ref

import numpy as np
from torch import nn

from specdec.budgeting.kernels import best_size, count_followed
from specdec.budgeting.ledger import LEARNED, SCORE_BINS, Learned
from specdec.budgeting.pass_times import StepTimes, Surroundings, keep_times, length_class, size_class, times_of
from specdec.budgeting.priors import first_seconds
from specdec.kernels import Floats, Ints
from specdec.tree import NODE_BUCKETS, TokenTree

DECAY = 0.98
"""Factor per step on the acceptance counts, a memory of about fifty steps; raise it to remember longer."""
IDLE_DECAY = 0.995
"""Factor on the counts per proposal that is not verified; lower it to try drafts again sooner when text changes."""
PRIOR_WEIGHT = 4.0
"""Observations that the drafter's own score is worth; raise it to trust scores longer against what was counted."""
REJECTED = -2
"""In place of the token after the accepted ones, where the target's pick is not known: no draft token equals it."""


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
    buckets, one node ("no draft") included. After several proposals in a row that are not worth their time, drafting
    pauses (`Backoff`). Expectations are products of calibrated scores along paths; scores are calibrated by decayed
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
        """How often trees of n nodes were chosen; 1 is no draft."""
        self.num_rests = 0
        """Steps in which drafting paused."""
        self._times: StepTimes | None = None
        self._target: Callable[[], nn.Module | None] = lambda: None
        self._rows, self._length, self._is_sampled, self._manner = 1, 0, False, ""
        self._num_calls = 0
        self._proposed: TokenTree | None = None
        self._origin = self

    def of_call(self) -> Budget:
        """A copy for one call, as calls may run in several threads at once; `end` hands back what it has decided."""
        new = copy.copy(self)
        new._origin = self
        return new

    def begin(self, model: nn.Module, kind: tuple[Hashable, ...], is_sampled: bool = False, manner: str = "") -> None:
        """Takes up what is known of a kind of call, from this budget's calls or another's of the same model and owner.

        Args:
            model: The target.
            kind: Calls in which drafts of one score are accepted about as often: the same drafter.
            is_sampled: Whether tokens are sampled: such calls have counts and step times of their own.
            manner: How the model's passes are computed: what was measured of others says nothing of these.
        """
        self._proposed = None
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
        self.learned.backoff.begin_call()

    def forget_times(self) -> None:
        """Looks the step times up again: what is known of the model has changed."""
        self._times = None

    def nodes_to_draft(self) -> int:
        """How large a tree the drafter is asked for now: one node while drafting pauses, because it does not pay."""
        if self.learned.backoff.skips():
            self.num_rests += 1
            return 1
        return self.max_nodes

    @property
    def rests_next(self) -> bool:
        """Whether drafting pauses in the next step, whatever comes of this one."""
        return self.learned.backoff.pause > 0

    def set_size(self, rows: int, tokens: int) -> None:
        """Sets the batch size and the kv cache's tokens in the longest row, for which step times are looked up."""
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

    def record_empty_proposal(self, spent: float) -> None:
        """Notes that a drafter found nothing to propose, and took `spent` seconds to find that out."""
        if (known := self.step_seconds) is not None and not self.deterministic:
            self.learned.backoff.record(spent / float(known[1][0]))

    def choose(self, tree: TokenTree, spent: float = 0.0) -> TokenTree:
        """The part of a proposal that is worth a target pass; the root alone when none is.

        Args:
            tree: The proposal, best nodes first.
            spent: Seconds that drafting it took: the more expensive it was, the more of it should be verified.
        """
        tree = tree.first(self.max_nodes)
        if self.fixed or tree.num_nodes == 1 or tree.scores is None or (known := self.step_seconds) is None:
            return tree
        spent = 0.0 if self.deterministic else float(spent)
        learned, rows = self.learned, self._rows
        assert tree.host_scores is not None
        counts = learned.tried, learned.hit, PRIOR_WEIGHT
        best, tokens, taken, plain = best_size(tree.host_parents, tree.host_scores, *counts, *known, spent)
        pays = tokens * plain > rows * (taken + spent)
        learned.backoff.record(0.0 if pays else (spent + taken - plain) / plain)
        if best == 1:
            learned.tried *= IDLE_DECAY
            learned.hit *= IDLE_DECAY
        self._proposed = tree
        self.sizes[best] += 1
        self.last_choice = Choice(tree.num_nodes, best, tokens, spent + taken, rows, plain)
        return tree.first(best)

    def observe(
        self, tree: TokenTree, accepted: list[list[int]], tokens: Sequence[Sequence[int]] | None = None
    ) -> None:
        """Counts which nodes were right where their parent was.

        Args:
            tree: The verified tree.
            accepted: Per row the accepted draft nodes, from the root's child down.
            tokens: Per row what the target has picked after the root. With it all nodes count that were proposed,
                those too that were not worth verifying. None where another token than that might be accepted.
        """
        proposed, self._proposed = self._proposed, None
        if tokens is None or proposed is None or proposed.draft_probs is not None:
            proposed = tree
            tokens = [[*of_row[nodes].tolist(), REJECTED] for of_row, nodes in zip(tree.tokens, accepted, strict=True)]
        if proposed.num_nodes == 1 or proposed.scores is None:
            return
        known = np.full((len(tokens), max(map(len, tokens))), -1, np.int64)
        for row, picked in enumerate(tokens):
            known[row, : len(picked)] = picked
        assert proposed.host_scores is not None
        counts = self.learned.tried, self.learned.hit, DECAY
        count_followed(proposed.host_tokens, proposed.host_parents, proposed.host_scores, known, *counts)

    def record(self, nodes: int, seconds: float) -> None:
        """Takes in the time a step took, drafting left out."""
        if not (self.fixed or self.deterministic):
            self.times.update(nodes, seconds)

    def end(self) -> None:
        """Keeps what was measured for later processes, after calls 1, 2, 4, 8 and so on."""
        self._num_calls += 1
        model = self._target()
        if model is not None and not self.deterministic and self._num_calls.bit_count() == 1:
            keep_times(model)
        if self._origin is not self:
            self._origin.__dict__.update({name: value for name, value in vars(self).items() if name != "_origin"})

    def fresh(self) -> Budget:
        """A deterministic budget of the same settings, for one call."""
        return Budget(self.max_nodes, self.fixed, self.owner, deterministic=True)


@functools.cache
def compile_kernels() -> None:
    """Compiles, or loads what was compiled before, so that no step of a generation waits for it."""
    ids, parents, scores = np.zeros((1, 2), np.int64), np.array([[-1, 0]]), np.zeros((1, 2), np.float32)
    tried, known = np.zeros(SCORE_BINS), (np.array([1, 2]), np.ones(2))
    best_size(parents, scores, tried, tried.copy(), PRIOR_WEIGHT, *known, 0.0)
    count_followed(ids, parents, scores, ids.copy(), tried, tried.copy(), DECAY)
