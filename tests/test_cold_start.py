"""A new process decodes at full speed from its first call on: nothing is compiled or timed within it."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
from numba.core.dispatcher import Dispatcher

import specdec
from specdec.budget import Budget
from specdec.budgeting import pass_times as step_times
from specdec.budgeting import priors
from specdec.budgeting.pass_times import StepTimes, Surroundings, times_of
from tests.test_budget import CPU
from tests.tiny_models import new_model, prompts


def compiled_loops() -> dict[str, int]:
    """Signatures of our own loops that are ready to run."""
    found = (thing for thing in gc.get_objects() if issubclass(type(thing), Dispatcher))
    return {
        f"{loop.py_func.__module__}.{loop.py_func.__name__}": len(loop.overloads)
        for loop in found
        if loop.py_func.__module__.startswith("specdec")
    }


@pytest.mark.parametrize("rows", [1, 2])
def test_no_loop_is_compiled_or_loaded_within_a_call(rows: int) -> None:
    fast = specdec.accelerate(new_model("llama"), "auto", strict=True, capability="tree")
    ready = compiled_loops()
    fast.generate(**prompts(*[9, 5][:rows]), max_new_tokens=40, eos_token_id=None)
    assert compiled_loops() == ready


def as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_times, "TIMES", type(step_times.TIMES)())


def here(model: Any) -> Surroundings:
    return Surroundings(1, 0, False, f"{model.device} {model.dtype}")


def test_a_new_process_starts_from_the_times_of_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model("llama")
    times = times_of(model, here(model), 64)
    for nodes in (1, 1, 8, 8, 8):
        times.update(nodes, CPU[nodes])
    step_times.keep_times(model)
    as_in_a_new_process(monkeypatch)
    again, other = new_model("llama"), new_model("llama", rms_norm_eps=0.1)
    assert times_of(again, here(model), 64).of(8) == pytest.approx(times.of(8))
    assert times_of(other, here(model), 64).of(8) < 1.0, "another model is not known"


def test_calls_keep_what_they_measured() -> None:
    fast = specdec.accelerate(new_model("llama"), "auto", capability="tree")
    fast.generate(**prompts(9), max_new_tokens=20, eos_token_id=None)
    (file,) = (priors.cache_folder() / "step_times").iterdir()
    assert json.loads(file.read_text())["times"]


@pytest.mark.parametrize("content", ["", "{}", "[1]", "null", '{"format": "specdec step times", "version": 1}', "\x00"])
def test_a_damaged_file_is_ignored(content: str) -> None:
    model = new_model("llama")
    file = priors._file(model)
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert times_of(model, here(model), 8).of(1) > 0
    whole = {"format": priors.FORMAT, "version": priors.VERSION, "times": [[[1, 0, False, "x"], {"1": -1.0}]]}
    file.write_text(json.dumps(whole))
    assert priors.load_entries(model) == []


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "file"))
    fast = specdec.accelerate(new_model("llama"), "auto", capability="tree")
    assert fast.generate(**prompts(9), max_new_tokens=5, eos_token_id=None).shape == (1, 14)


def test_the_prior_has_the_shape_of_the_device_and_counts_rows() -> None:
    model = new_model("llama")
    one, eight = priors.first_seconds(model, 1, 128), priors.first_seconds(model, 8, 64)
    assert list(one) == [1, 2, 4, 8, 16, 32, 64, 128]
    assert one[64] / one[1] == pytest.approx(146 / 42)
    assert one[128] > one[64]
    assert eight[8] == pytest.approx(one[64]), "eight rows of eight nodes are sixty-four tokens"
    half = priors.first_seconds(new_model("llama").bfloat16(), 1, 64)
    assert half[8] / half[1] == pytest.approx(25 / 22)


def test_the_first_real_step_sets_the_scale_of_a_guess() -> None:
    times = StepTimes(64, CPU)
    times.update(8, 2 * CPU[8])
    assert times.of(64) == pytest.approx(2 * CPU[64], rel=1e-3)
    assert times.of(1) == pytest.approx(2 * CPU[1])


def test_a_budget_without_a_model_takes_what_is_proposed() -> None:
    assert Budget(64).step_seconds is None
