"""What one call has taught a budget, the next one knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import specdec
from specdec import budget as budget_module
from specdec.budget import Budget, StepTimes
from tests.conformance import OracleDrafter, reference
from tests.test_budget import CPU, chain, with_times
from tests.tiny_models import new_model, prompts


def test_what_is_accepted_is_known_to_the_next_budget_of_the_model_and_kind_of_call() -> None:
    model = new_model("llama")
    first, second, other = Budget(8), Budget(8), Budget(8)
    first.begin(model, "greedy")
    tree = chain(0.9, nodes=4)
    for _ in range(50):
        first.observe(tree, [[]])
    second.begin(model, "greedy")
    other.begin(model, "sampled")
    for budget in (first, second, other):
        budget._times[1] = with_times(CPU)._times[1]
    assert other.choose(tree).num_nodes == 4, "nothing is known of this kind"
    assert second.choose(tree).num_nodes == first.choose(tree).num_nodes == 1, "such drafts were always wrong"
    second.begin(model, "sampled")
    assert second.choose(tree).num_nodes == 4
    unrelated = Budget(8)
    unrelated.begin(new_model("llama"), "greedy")
    assert unrelated.tried.sum() == 0


def test_calls_that_sample_and_calls_that_do_not_are_told_apart() -> None:
    model = new_model("llama")
    fast = specdec.accelerate(model, "lookahead")
    counts = []
    for sampled in (False, True, False):
        fast.generate(**prompts(6), max_new_tokens=8, do_sample=sampled)
        counts.append(fast.speculation.budget.tried)
    assert counts[0] is counts[2] is not counts[1]
    again = specdec.accelerate(model, "lookahead")
    again.generate(**prompts(6), max_new_tokens=8, do_sample=True)
    assert again.speculation.budget.tried is counts[1]


def test_budgets_of_two_owners_learn_apart() -> None:
    model = new_model("llama")
    mine, same, other = (Budget(8, owner=owner) for owner in ("mine", "mine", "other"))
    for budget in (mine, same, other):
        budget.begin(model, "greedy")
    assert mine.tried is same.tried is not other.tried


def test_a_new_call_is_not_slept_through() -> None:
    """The rest that one prompt has led to says little of the next one."""
    model, budget, tree = new_model("llama"), Budget(8), chain(0.02, nodes=8)
    budget._times[1] = with_times(CPU)._times[1]
    budget.begin(model, "greedy")
    for _ in range(8):
        budget.nodes_to_draft()
        budget.choose(tree, spent=40.0)
    assert budget.nodes_to_draft() == 1
    budget.begin(model, "greedy")
    assert budget.nodes_to_draft() == 8
    budget.choose(tree, spent=40.0)
    assert budget.nodes_to_draft() == 1, "one try, not as many as in the first call"


def test_step_times_of_one_kind_of_attention_say_nothing_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    asked: list[str] = []
    monkeypatch.setattr(
        StepTimes, "measure", lambda self, *_, **__: measured.append(asked[-1]) or self.seconds.update({1: 1.0, 8: 1.0})
    )
    model, inputs, budget = new_model("llama"), prompts(9), Budget(8)
    expected = reference(model, inputs, max_new_tokens=8, eos_token_id=None)
    calls: dict[str, dict[str, Any]] = {
        "model": {},
        "sdpa": {"attention": "sdpa"},
        "several": {"attention": ["model", "sdpa"]},
        "static": {"cuda_graphs": "eager"},
    }
    for manner, kwargs in (*calls.items(), *calls.items()):
        asked.append(manner)
        drafter = OracleDrafter(expected.answers)
        fast = specdec.accelerate(model, drafter, strict=True, budget=budget, **kwargs)
        assert torch.equal(fast.generate(**inputs, max_new_tokens=8, eos_token_id=None), expected.ids)
    assert measured == list(calls), "each once; the second round knows all of them"
    assert len(budget_module._TIMES[model]) == len(calls)
