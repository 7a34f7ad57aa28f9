"""What one call has taught a budget, the next one knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import specdec
from specdec.budget import Budget
from specdec.budgeting.ledger import LONGEST_PAUSE, PATIENCE, TRIAL_SHARE, Backoff
from specdec.budgeting.pass_times import TIMES
from specdec.tree import TokenTree
from tests.conformance import OracleDrafter, reference
from tests.test_budget import CPU, chain, set_times, with_times
from tests.tiny_models import new_model, prompts


def test_what_is_accepted_is_known_to_the_next_budget_of_the_model_and_kind_of_call() -> None:
    model = new_model("llama")
    first, second, other = Budget(8), Budget(8), Budget(8)
    first.begin(model, ())
    tree = chain(0.9, nodes=4)
    for _ in range(50):
        first.observe(tree, [[]])
    second.begin(model, ())
    other.begin(model, (), True)
    for budget in (first, second, other):
        set_times(budget.times, CPU)
    assert other.choose(tree).num_nodes == 4, "nothing is known of this kind"
    assert second.choose(tree).num_nodes == first.choose(tree).num_nodes == 1, "such drafts were always wrong"
    second.begin(model, (), True)
    assert second.choose(tree).num_nodes == 4
    unrelated = Budget(8)
    unrelated.begin(new_model("llama"), ())
    assert unrelated.learned.tried.sum() == 0


def test_calls_that_sample_and_calls_that_do_not_are_told_apart() -> None:
    model = new_model("llama")
    fast = specdec.accelerate(model, "lookahead")
    counts = []
    for sampled in (False, True, False):
        fast.generate(**prompts(6), max_new_tokens=8, do_sample=sampled)
        counts.append(fast.speculation.budget.learned.tried)
    assert counts[0] is counts[2] is not counts[1]
    again = specdec.accelerate(model, "lookahead")
    again.generate(**prompts(6), max_new_tokens=8, do_sample=True)
    assert again.speculation.budget.learned.tried is counts[1]


def test_budgets_of_two_owners_learn_apart() -> None:
    model = new_model("llama")
    mine, same, other = (Budget(8, owner=owner) for owner in ("mine", "mine", "other"))
    for budget in (mine, same, other):
        budget.begin(model, ())
    assert mine.learned is same.learned is not other.learned


def test_a_new_call_is_not_slept_through() -> None:
    """The rest that one prompt has led to says little of the next one."""
    model, budget, tree = new_model("llama"), Budget(8), chain(0.02, nodes=8)
    budget.begin(model, ())
    set_times(budget.times, CPU)
    for _ in range(8):
        budget.nodes_to_draft()
        budget.choose(tree, spent=40.0)
    assert budget.nodes_to_draft() == 1
    budget.begin(model, ())
    assert budget.nodes_to_draft() == 8
    budget.choose(tree, spent=40.0)
    assert budget.nodes_to_draft() == 1, "one draft, not as many as in the first call"


def test_step_times_of_one_kind_of_attention_say_nothing_of_another() -> None:
    model, inputs, budget = new_model("llama"), prompts(9), Budget(8)
    expected = reference(model, inputs, max_new_tokens=8, eos_token_id=None)
    calls: dict[str, dict[str, Any]] = {
        "model": {},
        "sdpa": {"attention": "sdpa"},
        "static": {"cuda_graphs": "eager"},
    }
    for kwargs in (*calls.values(), *calls.values()):
        drafter = OracleDrafter(expected.answers)
        fast = specdec.accelerate(model, drafter, strict=True, budget=budget, **kwargs)
        assert torch.equal(fast.generate(**inputs, max_new_tokens=8, eos_token_id=None), expected.ids)
    assert len(TIMES[model]) == len(calls)


class SimulatedCalls:
    """Calls of 128 tokens through budgets of one model, on a simulated device.

    Args:
        seconds: Of a pass, by its number of nodes.
        rate: How often a draft token is accepted, by the score that the drafter gives it.
        rows: Of the batch; all of them have the same tree.
    """

    def __init__(self, seconds: dict[int, float], rate: Callable[[float], float], rows: int = 1) -> None:
        self.model, self.seconds, self.rate, self.rows = new_model("llama"), seconds, rate, rows
        self.random = np.random.default_rng(0)
        self.drafted: list[bool] = []

    def run(self, scores: Callable[[int], float], spent: float = 0.02, tokens: int = 128) -> float:
        """One call; returns its time against that of a call without drafts.

        Args:
            scores: What the drafter gives its tokens, by step.
            spent: What a proposal takes, in passes without a draft.
            tokens: To generate per row.
        """
        budget, plain = Budget(64), self.seconds[1]
        budget.begin(self.model, (), True)
        budget.set_size(self.rows, 100)
        set_times(budget.times, self.seconds)
        made, taken, self.drafted = 0.0, 0.0, []
        while made < tokens:
            budget.set_size(self.rows, 100)
            is_asked = budget.nodes_to_draft() > 1
            tree = chain(scores(len(self.drafted)), nodes=16, rows=self.rows)
            chosen = budget.choose(tree, spent * plain) if is_asked else tree.first(1)
            right = [self._right(tree) for _ in range(self.rows)]
            accepted = [list(range(1, min(count, chosen.num_nodes - 1) + 1)) for count in right]
            picked = [
                [0] * len(nodes) + [int(len(nodes) >= count)] for nodes, count in zip(accepted, right, strict=True)
            ]
            budget.observe(chosen, accepted, picked)
            budget.record(chosen.num_nodes, self.seconds[chosen.num_nodes])
            self.drafted.append(chosen.num_nodes > 1)
            made += 1 + sum(map(len, accepted)) / self.rows
            taken += self.seconds[chosen.num_nodes] + is_asked * spent * plain
        return taken / (made * plain)

    def _right(self, tree: TokenTree) -> int:
        assert tree.scores is not None
        rate, count = self.rate(float(tree.scores[0, 1])), 0
        while count < tree.num_nodes - 1 and self.random.random() < rate:
            count += 1
        return count


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("score", [0.4, 0.7, 0.95])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3])
def test_where_nothing_pays_drafting_costs_less_than_two_hundredths(rows: int, score: float, rate: float) -> None:
    """However much is promised; the first call, of which nothing is known, may take more."""
    calls = SimulatedCalls(CPU, lambda _: rate, rows)
    first, *others = [calls.run(lambda _: score) for _ in range(8)]
    assert first < 1.08
    assert max(others) < 1.02


@pytest.mark.parametrize("rate", [0.5, 0.55, 0.6, 0.65])
def test_where_it_hardly_pays_drafting_loses_next_to_nothing(rate: float) -> None:
    """Chains about which it cannot be known whether they pay, and scores that say they do."""
    calls = SimulatedCalls(CPU, lambda _: rate)
    taken = [calls.run(lambda _: 0.9) for _ in range(12)]
    assert sum(taken[2:]) / 10 < 1.015


def test_a_source_that_pays_at_last_is_back_at_once() -> None:
    """A hundred tokens that cannot be foreseen, call after call, and then text that repeats itself."""
    calls = SimulatedCalls(CPU, lambda score: 0.95 if score > 0.6 else 0.02)
    for _ in range(6):
        calls.run(lambda _: 0.2)
    taken = calls.run(lambda step: 0.9 if step >= 64 else 0.2)
    assert not any(calls.drafted[2:64])
    assert calls.drafted.index(True, 64) <= 64 + 8
    assert taken < 0.75
    assert calls.run(lambda _: 0.9) < 0.45


def test_pauses_double_and_a_draft_that_pays_ends_them() -> None:
    """Text in which drafts paid a moment ago is not slept through."""
    budget, poor, good = with_times(CPU), chain(0.02, nodes=8), chain(0.95, nodes=8)
    pauses = []
    for _ in range(12):
        budget.choose(poor, spent=8.0)  # a fifth of a pass
        pauses.append(0)
        while budget.nodes_to_draft() == 1:
            pauses[-1] += 1
    longest = int(8.0 / CPU[1] / TRIAL_SHARE)
    assert pauses == [0] * (PATIENCE - 1) + [1, 2, 4, 8, 16, 32, longest, longest, longest]
    assert budget.num_rests == sum(pauses)
    budget.choose(good)
    budget.choose(poor, spent=8.0)
    assert budget.nodes_to_draft() > 1


def test_pauses_are_bounded() -> None:
    backoff = Backoff()
    for _ in range(100):
        backoff.record(lost=5.0)
    assert backoff.pause == LONGEST_PAUSE
    backoff.begin_call()
    assert not backoff.skips(), "another prompt may be another matter"
    backoff.record(lost=5.0)
    assert [backoff.skips() for _ in range(3)] == [True, True, False]


def test_finding_nothing_in_step_after_step_is_paused_too() -> None:
    """Looking takes its time: the more expensive, the rarer."""
    asked = {}
    for name, spent in (("dearest", 0.5 * 42.0), ("dear", 0.05 * 42.0), ("cheap", 0.9 * TRIAL_SHARE * 42.0)):
        budget, asked[name] = with_times(CPU), 0
        for _ in range(200):
            if budget.nodes_to_draft() > 1:
                asked[name] += 1
                budget.record_empty_proposal(spent)
    assert asked["cheap"] == 200, "less than `TRIAL_SHARE`"
    assert 10 < asked["dear"] < 30
    assert asked["dearest"] < 15
    Budget(8).record_empty_proposal(1.0)  # while nothing is measured, nothing is known
