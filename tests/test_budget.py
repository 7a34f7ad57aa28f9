"""The budget takes as many nodes as pay for themselves, and learns what drafts are worth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import specdec
from specdec.budget import Budget
from specdec.budgeting.pass_times import StepTimes
from specdec.tree import NODE_BUCKETS, TokenTree
from tests.conformance import AlwaysWrongDrafter, OracleDrafter, reference
from tests.tiny_models import prompts, tiny_model

FLAT = dict.fromkeys(NODE_BUCKETS[:7], 1.0)
LINEAR = {nodes: float(nodes) for nodes in NODE_BUCKETS[:7]}
# A 2-core CPU, 84 M parameters: the second token costs most, the next seven almost nothing.
CPU = {1: 42.0, 2: 75.0, 4: 79.0, 8: 86.0, 16: 100.0, 32: 149.0, 64: 207.0}
# A data-centre GPU in bf16: free up to a point, then proportional.
GPU = {1: 8.0, 2: 8.0, 4: 8.0, 8: 8.0, 16: 8.1, 32: 8.4, 64: 9.0}


def with_times(seconds: dict[int, float], rows: int = 1, max_nodes: int = 64) -> Budget:
    budget = Budget(max_nodes)
    budget.set_size(rows, 1)
    budget.times.seconds = {nodes: taken for nodes, taken in seconds.items() if nodes <= max_nodes}
    return budget


def set_times(times: StepTimes, seconds: dict[int, float]) -> None:
    """Has these times known as if they had been measured."""
    times.seconds.update(seconds)
    times.is_known, times._known = True, None


def chain(score: float, nodes: int = 64, rows: int = 1) -> TokenTree:
    parents = torch.arange(-1, nodes - 1).expand(rows, -1)
    return TokenTree(torch.zeros(rows, nodes).long(), parents, torch.full((rows, nodes), score))


def fan(score: float, nodes: int = 64) -> TokenTree:
    parents = (torch.arange(nodes) > 0).long()[None] - 1
    return TokenTree(torch.arange(nodes)[None], parents, torch.full((1, nodes), score))


def best_size(tree: TokenTree, seconds: dict[int, float], score: float) -> int:
    """The definition, for trees of one score: tokens per second at every allowed size."""
    depths = tree.depths[0].tolist()
    rate = float(np.interp(score, (np.arange(12) + 0.5) / 12, (np.arange(12) + 0.5) / 12))
    gain = np.cumsum([0.0] + [rate**depth for depth in depths[1:]])
    return max(seconds, key=lambda nodes: (1 + gain[nodes - 1]) / seconds[nodes])


@pytest.mark.parametrize("score", [0.05, 0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("times", [FLAT, LINEAR, CPU, GPU], ids=["flat", "linear", "cpu", "gpu"])
@pytest.mark.parametrize("shape", [chain, fan])
def test_size_with_the_most_tokens_per_second_is_taken(shape: Any, times: dict[int, float], score: float) -> None:
    tree = shape(score)
    assert with_times(times).choose(tree).num_nodes == best_size(tree, times, score)


def test_known_shapes_of_hardware() -> None:
    assert with_times(FLAT).choose(chain(0.9)).num_nodes == 64, "nodes that cost nothing are all worth it"
    assert with_times(LINEAR).choose(chain(0.9)).num_nodes == 1, "nodes that cost a pass each never are"
    assert with_times(CPU).choose(chain(0.3)).num_nodes == 1
    assert with_times(CPU).choose(chain(0.85)).num_nodes in (8, 16), "none or many, not two"
    assert with_times(GPU).choose(chain(0.3)).num_nodes >= 8


def test_a_tree_between_two_sizes_is_taken_whole() -> None:
    assert with_times(FLAT).choose(chain(0.9, nodes=11)).num_nodes == 11


def test_largest_tree_is_kept_to() -> None:
    assert with_times(FLAT, max_nodes=16).choose(chain(0.9)).num_nodes == 16
    assert Budget(16, fixed=True).choose(chain(0.9)).num_nodes == 16
    assert Budget(64, fixed=True).choose(chain(0.01)).num_nodes == 64


def test_a_tree_without_scores_or_times_is_taken_whole() -> None:
    tree = chain(0.01)
    assert Budget(64).choose(tree).num_nodes == 64
    assert with_times(LINEAR).choose(TokenTree(tree.tokens, tree.parents)).num_nodes == 64
    assert Budget(64).step_seconds is None


def test_rows_of_a_batch_count_together() -> None:
    """Seven hopeless rows and a good one: what is a gain for one row alone is none for all."""
    times = {1: 1.0, 2: 1.5, 4: 1.5, 8: 1.5, 16: 9.0}
    one = chain(0.7, nodes=8)
    scores = torch.full((8, 8), 0.01)
    scores[0] = 0.7
    parents = torch.arange(-1, 7).expand(8, -1)
    many = TokenTree(torch.zeros(8, 8).long(), parents, scores)
    assert with_times(times).choose(one).num_nodes == 8
    assert with_times(times, rows=8).choose(many).num_nodes == 1


def test_padding_is_worth_nothing() -> None:
    tree = TokenTree.from_rows([[1, 2, 3, 4]], [[-1, -1, -1, -1]], [[0.0, 1.0, 1.0, 1.0]])
    assert with_times(CPU).choose(tree).num_nodes == 1


def feed(budget: Budget, tree: TokenTree, accepted: int, steps: int) -> None:
    for _ in range(steps):
        budget.observe(tree, [list(range(1, accepted + 1))] * len(tree.tokens))


def test_scores_that_promise_too_much_are_seen_through() -> None:
    budget, tree = with_times(CPU), chain(0.9, nodes=16)
    assert budget.choose(tree).num_nodes > 1
    feed(budget, tree, accepted=0, steps=40)
    assert budget.choose(tree).num_nodes == 1


def test_scores_that_promise_too_little_are_seen_through() -> None:
    budget, tree = with_times(CPU), chain(0.3, nodes=16)
    assert budget.choose(tree).num_nodes == 1
    feed(budget, tree, accepted=15, steps=40)
    assert budget.choose(tree).num_nodes == 16


def test_scores_are_judged_apart_by_their_size() -> None:
    budget = with_times(CPU)
    low, high = chain(0.3, nodes=8), chain(0.95, nodes=8)
    feed(budget, low, accepted=0, steps=40)
    assert budget.choose(high).num_nodes == 8
    assert budget.choose(low).num_nodes == 1


def test_only_drafts_whose_parent_was_accepted_are_counted() -> None:
    """The fourth token says nothing of the drafter when the second one was wrong already."""
    budget = Budget(16)
    tree = chain(0.5, nodes=5)
    budget.observe(tree, [[1]])
    assert budget.learned.tried.sum() == 2
    assert budget.learned.hit.sum() == 1
    budget = Budget(16)
    budget.observe(fan(0.5, nodes=5), [[3]])
    assert budget.learned.tried.sum() == 4
    assert budget.learned.hit.sum() == 1


def test_what_is_padding_is_not_counted() -> None:
    budget = Budget(16)
    budget.observe(TokenTree.from_rows([[1, 2, 3]], [[-1, -1, 0]], [[0.0, 0.5, 0.5]]), [[2]])
    assert budget.learned.tried.sum() == 1
    assert budget.learned.hit.sum() == 1


def test_old_observations_are_forgotten() -> None:
    budget, tree = with_times(CPU), chain(0.9, nodes=16)
    feed(budget, tree, accepted=0, steps=500)
    feed(budget, tree, accepted=15, steps=150)
    assert budget.choose(tree).num_nodes == 16
    assert budget.learned.tried.sum() < 16 / 0.02


def test_drafting_is_tried_again_after_a_bad_time() -> None:
    """Text changes: what was not worth drafting some hundred tokens ago may be now."""
    budget, tree = with_times(CPU), chain(0.9, nodes=16)
    feed(budget, tree, accepted=0, steps=100)
    sizes = []
    for _ in range(2000):
        chosen = budget.choose(tree)
        sizes.append(chosen.num_nodes)
        budget.observe(chosen, [list(range(1, chosen.num_nodes))])  # from now on every draft is right
    assert sizes[0] == 1
    assert sizes[-1] == 16


def test_useless_drafts_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepTimes, "update", lambda self, nodes, seconds: set_times(self, CPU))
    model, inputs = tiny_model(), prompts(6)
    answers = reference(model, inputs, max_new_tokens=200, eos_token_id=None).answers
    reports = []
    for drafter in (AlwaysWrongDrafter(answers), OracleDrafter(answers, decoys=False)):
        fast = specdec.accelerate(model, drafter, strict=True)
        fast.generate(**inputs, max_new_tokens=200, eos_token_id=None)
        reports.append(fast.report)
    assert reports[0].num_drafts < reports[0].num_target_passes / 2
    assert reports[1].num_target_passes < 200 / 8


@pytest.mark.parametrize("max_nodes", [0, 3, 63, 256])
def test_sizes_are_those_of_the_buckets(max_nodes: int) -> None:
    with pytest.raises(
        ValueError, match=f"max_nodes={max_nodes} is not allowed; use one of 1, 2, 4, 8, 16, 32, 64, 128"
    ):
        Budget(max_nodes)


def test_drafting_that_costs_more_than_it_brings_pauses() -> None:
    budget, tree = with_times(CPU), chain(0.02, nodes=8)

    def passes(count: int, tree: TokenTree, spent: float) -> int:
        drafts = 0
        for _ in range(count):
            if budget.nodes_to_draft() > 1:
                drafts += 1
                budget.choose(tree, spent)
        return drafts

    assert passes(100, tree, spent=0.001) == 100, "a draft that costs nothing needs no rest"
    assert passes(6, tree, spent=8.0) <= 6
    assert passes(100, tree, spent=8.0) <= 6, "a fifth of a pass: ever fewer drafts"
    assert passes(80, chain(0.95, nodes=8), spent=8.0) >= 30, "a draft that pays ends the pause"
    assert passes(20, chain(0.95, nodes=8), spent=8.0) == 20
    assert Budget(64, fixed=True).nodes_to_draft() == 64


def test_a_draft_is_worth_more_nodes_the_dearer_it_was() -> None:
    tree = chain(0.8, nodes=32)
    assert with_times(CPU).choose(tree, spent=0.0).num_nodes <= with_times(CPU).choose(tree, spent=100.0).num_nodes


def test_last_choice_tells_why() -> None:
    budget, tree = with_times(GPU), chain(0.9)
    assert budget.last_choice is None
    chosen = budget.choose(tree, spent=0.5)
    choice = budget.last_choice
    assert choice is not None
    assert (choice.proposed, choice.nodes) == (64, chosen.num_nodes)
    assert choice.seconds == pytest.approx(GPU[chosen.num_nodes] + 0.5)
    assert (choice.plain_tokens, choice.plain_seconds) == (1, GPU[1])
    assert 5 < choice.tokens < 11
    assert budget.sizes == {chosen.num_nodes: 1}
