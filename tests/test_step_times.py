"""Times of passes start from a prior, and real steps correct it."""

from __future__ import annotations

import pytest

import specdec
from specdec.budgeting import pass_times as step_times
from specdec.budgeting.pass_times import StepTimes, Surroundings, length_class, times_of
from tests.conformance import OracleDrafter, reference
from tests.test_budget import CPU, GPU, set_times
from tests.tiny_models import new_model, prompts


def feed(times: StepTimes, nodes: int, seconds: float, steps: int) -> None:
    for _ in range(steps):
        times.update(nodes, seconds)


def test_step_times_between_sizes_are_interpolated_and_never_fall() -> None:
    times = StepTimes(64, CPU)
    assert times.buckets == [1, 2, 4, 8, 16, 32, 64]
    times.seconds = {1: 100.0, 8: 90.0, 64: 300.0}
    assert times.of(8) == 90.0
    assert times.of(1) == 90.0, "a larger tree cannot be cheaper: the smaller one's time had noise in it"
    assert 90.0 < times.of(20) < times.of(40) < 300.0
    assert times.of(64) == 300.0


def test_sizes_not_measured_keep_the_prior_s_ratio_to_those_around_them() -> None:
    times = StepTimes(64, CPU, is_guess=False)
    times.seconds = {1: 2 * CPU[1], 16: 4 * CPU[16]}
    assert times.of(64) == pytest.approx(4 * CPU[64])
    assert times.of(4) == pytest.approx(3 * CPU[4]), "half way between 1 and 16, by doublings"


def test_the_first_step_of_a_size_may_have_to_prepare_and_is_left_out() -> None:
    times = StepTimes(8, GPU, is_guess=False)
    times.update(8, 1000.0)
    assert times.of(8) == GPU[8]
    times.update(8, 9.0)
    assert times.of(8) == 9.0


def test_step_times_follow_what_is_seen_but_not_one_stall() -> None:
    times = StepTimes(8, {1: 1.0, 2: 1.0, 4: 1.0, 8: 2.0}, is_guess=False)
    feed(times, 1, 1.0, 20)
    times.update(1, 1000.0)
    assert times.of(1) < 1.05
    feed(times, 5, 3.0, 200)
    assert times.of(8) == pytest.approx(3.0, rel=0.01)


def test_a_size_that_seemed_expensive_is_tried_again() -> None:
    for measured in ({1: 1.0, 8: 50.0}, {}):
        times = StepTimes(8, {1: 1.0, 2: 50.0, 4: 50.0, 8: 50.0}, is_guess=False)
        times.seconds = dict(measured)
        feed(times, 1, 1.0, 20_000)
        assert times.of(8) < 1.1


# --- surroundings that change -----------------------------------------------------------------------------------------


def test_at_another_length_what_is_known_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_times, "FIRST_LENGTH", 16)
    model, inputs = new_model("llama"), prompts(10)
    expected = reference(model, inputs, max_new_tokens=60, eos_token_id=None)
    fast = specdec.accelerate(model, OracleDrafter(expected.answers, max_nodes=4), strict=True)
    assert fast.generate(**inputs, max_new_tokens=60, eos_token_id=None).tolist() == expected.ids.tolist()
    known = step_times.TIMES[model]
    assert sorted(at.length for at in known) == [0, 1, 2, 3], "up to 16 tokens, 32, 64 and beyond"


def test_the_nearest_known_surroundings_are_taken_over() -> None:
    model, here = new_model("llama"), Surroundings(1, 5, True, "cpu")
    for length, is_sampled, manner, rows, seconds in (
        (4, False, "cpu", 1, 1.0),
        (1, True, "cpu", 1, 2.0),
        (3, True, "cpu", 1, 3.0),
        (5, True, "cuda", 1, 4.0),
        (5, True, "cpu", 2, 5.0),
    ):
        times = times_of(model, Surroundings(rows, length, is_sampled, manner), 8)
        set_times(times, dict.fromkeys((1, 2, 4, 8), seconds))
    assert times_of(model, here, 8).of(1) == 3.0
    larger = times_of(model, here, 16)
    assert larger.of(1) == 3.0 and larger.of(16) > 3.0, "a larger budget knows what a smaller one did"
    assert times_of(model, here._replace(rows=4), 8).of(1) < 1.0


def test_lengths_are_told_apart_by_doublings() -> None:
    classes = [length_class(tokens) for tokens in (1, 1024, 1025, 2048, 2049, 4096, 4097, 130_000)]
    assert classes == [0, 0, 1, 1, 2, 2, 3, 7]
