"""The budget takes as many nodes as pay for themselves, and learns what drafts are worth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import specdec
from specdec import step_times
from specdec.budget import Budget
from specdec.step_times import StepTimes, Surroundings, length_class, times_of
from specdec.target import TargetModel
from specdec.tree import NODE_BUCKETS, TokenTree, bucket_of
from tests.conformance import AlwaysWrongDrafter, OracleDrafter, reference
from tests.tiny_models import new_model, prompts, tiny_model

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
    times.trials.update(seconds)
    times._known = None


def chain(score: float, nodes: int = 64, rows: int = 1) -> TokenTree:
    parents = torch.arange(-1, nodes - 1).expand(rows, -1)
    return TokenTree(torch.zeros(rows, nodes).long(), parents, torch.full((rows, nodes), score))


def fan(score: float, nodes: int = 64) -> TokenTree:
    parents = (torch.arange(nodes) > 0).long()[None] - 1
    return TokenTree(torch.zeros(1, nodes).long(), parents, torch.full((1, nodes), score))


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
    assert budget.tried.sum() == 2
    assert budget.hit.sum() == 1
    budget = Budget(16)
    budget.observe(fan(0.5, nodes=5), [[3]])
    assert budget.tried.sum() == 4
    assert budget.hit.sum() == 1


def test_what_is_padding_is_not_counted() -> None:
    budget = Budget(16)
    budget.observe(TokenTree.from_rows([[1, 2, 3]], [[-1, -1, 0]], [[0.0, 0.5, 0.5]]), [[2]])
    assert budget.tried.sum() == 1
    assert budget.hit.sum() == 1


def test_old_observations_are_forgotten() -> None:
    budget, tree = with_times(CPU), chain(0.9, nodes=16)
    feed(budget, tree, accepted=0, steps=500)
    feed(budget, tree, accepted=15, steps=150)
    assert budget.choose(tree).num_nodes == 16
    assert budget.tried.sum() < 16 / 0.02


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


def test_step_times_between_sizes_are_interpolated_and_never_fall() -> None:
    times = StepTimes(64)
    assert times.buckets == [1, 2, 4, 8, 16, 32, 64]
    times.seconds = {1: 10.0, 8: 9.0, 64: 30.0}
    assert times.of(8) == 9.0
    assert times.of(1) == 9.0, "a larger tree cannot be cheaper: the smaller one's time had noise in it"
    assert 10.0 < times.of(20) < times.of(40) < 30.0
    assert times.of(64) == 30.0


class Device:
    """Passes that take what a table says, on a clock of their own.

    Args:
        seconds: By number of nodes.
    """

    def __init__(self, seconds: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds, self.now, self.asked = seconds, 0.0, list[int]()
        monkeypatch.setattr("specdec.step_times.time.perf_counter", lambda: self.now)

    def run(self, nodes: int) -> None:
        self.asked.append(nodes)
        self.now += self.seconds[nodes]


def test_the_least_of_several_passes_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pass of a size may have to be prepared, and noise only ever adds."""
    device, times = Device({8: 1.0}, monkeypatch), StepTimes(16)
    stalls = iter([5.0, 0.0])

    def run(nodes: int) -> None:
        device.run(nodes)
        device.now += next(stalls)

    times.time(8, run)
    assert times.seconds == {8: 1.0}
    times.time_all(Device(CPU, monkeypatch).run)
    assert times.seconds == {nodes: CPU[nodes] for nodes in (1, 2, 4, 8, 16)}


def test_sizes_are_timed_when_a_proposal_may_be_worth_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the smallest on, so that what cannot pay is never run: a large batch would wait for long."""
    seconds = {nodes: taken / 1000 for nodes, taken in CPU.items()}
    for score, expected in ((0.02, [1]), (0.3, [1, 2]), (0.97, [1, 2, 4, 8, 16, 32, 64])):
        device, budget = Device(seconds, monkeypatch), Budget(64)
        budget.learned.tried[:] = 100.0  # what the scores say is what happens
        budget.learned.hit[:] = 100.0 * (np.arange(12) + 0.5) / 12
        chosen = budget.choose(chain(score), trial=device.run)
        assert sorted(set(device.asked)) == expected, score
        assert chosen.num_nodes == with_times(seconds).choose(chain(score)).num_nodes
        device.asked.clear()
        budget.choose(chain(score), trial=device.run)
        assert not device.asked, "what is known is not timed again"


def test_impatience_leaves_the_rest_to_real_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    device, budget = Device(CPU, monkeypatch), Budget(64)  # 42 seconds for a pass
    assert budget.choose(chain(0.97), trial=device.run).num_nodes == 64
    assert set(device.asked) == {1}
    budget.record(64, CPU[64])
    assert budget.times.seconds == {1: CPU[1], 64: CPU[64]}
    assert budget.times.untimed(64) is None


def test_step_times_follow_what_is_seen_but_not_one_stall() -> None:
    times = StepTimes(8)
    times.seconds = {1: 1.0, 8: 2.0}
    times.update(1, 1000.0)
    assert times.seconds[1] < 1.3
    for _ in range(200):
        times.update(5, 3.0)
    assert times.seconds[8] == pytest.approx(3.0, rel=0.01)
    times.update(2, 1.5)
    assert times.seconds[2] == 1.5


def test_sizes_not_used_yet_take_as_much_more_than_measured_as_those_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was timed are passes alone; a step has sampling, commit and learning besides."""
    times, device = StepTimes(8), Device({1: 1.0, 2: 1.5, 4: 2.0, 8: 4.0}, monkeypatch)
    times.time_all(device.run)
    for _ in range(100):
        times.update(1, 1.2)
    assert times.seconds[4] == pytest.approx(2.2, rel=0.05)
    assert times.seconds[8] == pytest.approx(4.2, rel=0.05)
    for _ in range(100):
        times.update(8, 4.0)
    assert times.seconds[8] == pytest.approx(4.0, rel=0.01)
    assert times.seconds[1] == pytest.approx(1.2, rel=0.01), "what is known of a size in use stays"


def test_passes_are_compared_with_passes_and_not_with_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a pass without a draft is known from real steps when the first proposal comes."""
    budget, device = Budget(8), Device({1: 1.0, 2: 1.5, 4: 1.6, 8: 1.7}, monkeypatch)
    device.seconds = {nodes: taken / 100 for nodes, taken in device.seconds.items()}
    for _ in range(8):
        budget.record(1, 0.015)
    budget.choose(chain(0.9), trial=device.run)
    assert budget.times.of(1) == pytest.approx(0.015)
    assert budget.times.of(8) == pytest.approx(0.017 + 0.005)


def test_times_are_measured_once_per_model(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []
    monkeypatch.setattr(StepTimes, "time", lambda self, n, _: timed.append(n) or set_times(self, {n: GPU[n]}))
    model, inputs = new_model("llama"), prompts(6)
    answers = reference(model, inputs, max_new_tokens=12).answers
    for _ in range(2):
        fast = specdec.accelerate(model, OracleDrafter(answers), strict=True)
        fast.generate(**inputs, max_new_tokens=12)
        fast.generate(**inputs, max_new_tokens=12)
    assert timed and len(timed) == len(set(timed))


def test_measuring_leaves_no_trace() -> None:
    model, inputs = new_model("llama"), prompts(6, 9, 3)
    expected = reference(model, inputs, max_new_tokens=24, do_sample=True)
    fast = specdec.accelerate(model, OracleDrafter(expected.answers), strict=True, max_nodes=16)
    torch.manual_seed(0)
    got = fast.generate(**inputs, max_new_tokens=24, do_sample=True)
    assert fast.report.seconds["calibrate"] > 0
    assert got.tolist() == expected.ids.tolist()
    assert torch.equal(torch.get_rng_state(), expected.rng_state)


def test_useless_drafts_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Budget.record
    monkeypatch.setattr(StepTimes, "time", lambda self, *_: set_times(self, CPU))
    monkeypatch.setattr(StepTimes, "update", lambda self, nodes, seconds: None)
    monkeypatch.setattr(Budget, "record", lambda self, nodes, seconds: right(self, nodes, CPU[bucket_of(nodes)]))
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


def test_a_size_that_seemed_dear_is_tried_again() -> None:
    times = StepTimes(8)
    times.seconds = {1: 1.0, 8: 50.0}
    for _ in range(20_000):
        times.update(1, 1.0)
    assert times.of(8) < 1.1


def test_drafting_that_costs_more_than_it_brings_rests() -> None:
    budget, tree = with_times(CPU), chain(0.02, nodes=8)

    def passes(count: int, tree: TokenTree, spent: float) -> int:
        drafts = 0
        for _ in range(count):
            if budget.nodes_to_draft() > 1:
                drafts += 1
                budget.choose(tree, spent)
        return drafts

    assert passes(100, tree, spent=0.001) == 100, "a draft that costs nothing needs no rest"
    assert passes(4, tree, spent=8.0) <= 4
    assert passes(100, tree, spent=8.0) <= 6, "a fifth of a pass: one draft in twenty"
    assert passes(64, chain(0.95, nodes=8), spent=8.0) >= 40, "a draft that pays ends the rest"
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


# --- surroundings that change -----------------------------------------------------------------------------------------


def test_at_another_length_what_is_known_is_taken_over_until_real_steps_tell_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timed: list[int] = []
    monkeypatch.setattr(StepTimes, "time", lambda self, n, _: timed.append(n) or set_times(self, GPU))
    monkeypatch.setattr(step_times, "FIRST_LENGTH", 16)
    model, inputs = new_model("llama"), prompts(10)
    expected = reference(model, inputs, max_new_tokens=60, eos_token_id=None)
    for _ in range(2):  # the second call knows all of them
        fast = specdec.accelerate(model, OracleDrafter(expected.answers, max_nodes=4), strict=True)
        assert fast.generate(**inputs, max_new_tokens=60, eos_token_id=None).tolist() == expected.ids.tolist()
    assert len(timed) == 1
    known = step_times.TIMES[model]
    assert sorted(at.length for at in known) == [0, 1, 2, 3], "up to 16 tokens, 32, 64 and beyond"
    times = next(times for at, times in known.items() if at.length == 3)
    assert set(times.uses) <= {1, 4}
    assert times.seconds[64] > 4.0, "not used there: about as it was"
    assert times.seconds[4] < 1.0, "used there: as it is"


def test_the_nearest_known_surroundings_are_taken_over() -> None:
    model, here = new_model("llama"), Surroundings(1, 5, True, "cpu")
    for length, is_sampled, manner, rows, seconds in (
        (4, False, "cpu", 1, 1.0),
        (1, True, "cpu", 1, 2.0),
        (3, True, "cpu", 1, 3.0),
        (5, True, "cuda", 1, 4.0),
        (5, True, "cpu", 2, 5.0),
    ):
        set_times(times_of(model, Surroundings(rows, length, is_sampled, manner), 8), {1: seconds})
    assert times_of(model, here, 8).seconds == {1: 3.0}
    larger = times_of(model, here, 16)
    assert larger.seconds == {1: 3.0} and larger.buckets[-1] == 16, "a larger budget knows what a smaller one did"
    assert times_of(model, here._replace(rows=4), 8).seconds == {}


def test_lengths_are_told_apart_by_doublings() -> None:
    classes = [length_class(tokens) for tokens in (1, 1024, 1025, 2048, 2049, 4096, 4097, 130_000)]
    assert classes == [0, 0, 1, 1, 2, 2, 3, 7]


def test_trial_passes_run_text_and_not_one_token_over_and_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture of experts would take the same experts for all of them, and seem cheaper than it is."""
    seen: list[tuple[Any, int]] = []
    right = TargetModel.trial_pass
    monkeypatch.setattr(
        TargetModel, "trial_pass", lambda self, tokens, n: seen.append((tokens, n)) or right(self, tokens, n)
    )
    model, inputs = new_model("llama"), prompts(12, 5)
    answers = reference(model, inputs, max_new_tokens=8, eos_token_id=None).answers
    fast = specdec.accelerate(model, OracleDrafter(answers), strict=True, max_nodes=16)
    fast.generate(**inputs, max_new_tokens=8, eos_token_id=None)
    tokens = next(tokens for tokens, nodes in seen if nodes == 16)
    assert tokens.shape == (2, 16)
    text = [*inputs["input_ids"][0].tolist(), answers[0][0]]
    assert tokens[0, :13].tolist() == text[::-1]
    assert tokens[1, :6].tolist() == tokens[1, 6:12].tolist(), "a short text is run over again"
