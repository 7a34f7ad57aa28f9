"""How long passes take is timed where a proposal may be worth it, and kept true by real steps."""

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
from tests.conformance import OracleDrafter, reference
from tests.test_budget import CPU, GPU, chain, set_times, with_times
from tests.tiny_models import new_model, prompts


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


def test_a_size_that_seemed_dear_is_tried_again() -> None:
    times = StepTimes(8)
    times.seconds = {1: 1.0, 8: 50.0}
    for _ in range(20_000):
        times.update(1, 1.0)
    assert times.of(8) < 1.1


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
