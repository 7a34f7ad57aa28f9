"""Functions of tensors that are captured per shape; Medusa's heads are one."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from specdec.drafters import medusa
from specdec.passes.cuda_graphs.call import CapturedCall
from specdec.passes.cuda_graphs.graphs import Graphs, describe
from tests.capture.recorders import Replays
from tests.conformance import DRAFTERS, assert_identical
from tests.tiny_models import new_model, prompts

CPU = torch.device("cpu")


def scaled(values: Tensor) -> tuple[Tensor, Tensor]:
    return values * 2, values.argmax(-1)


def test_replays_give_what_the_function_gives() -> None:
    recorder = Replays()
    call = CapturedCall(scaled, CPU, limit=2, recorder=recorder)
    for seed in range(8):
        for rows in (1, 3):
            values = torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed))
            double, best = call(values)
            assert torch.equal(double, values * 2)
            assert torch.equal(best, values.argmax(-1))
    assert call.failure is None
    assert recorder.num_recorded == 2
    assert recorder.num_replayed > 10


def test_shapes_are_bounded() -> None:
    recorder = Replays()
    call = CapturedCall(scaled, CPU, limit=2, recorder=recorder)
    for rows in (1, 2, 3, 1):
        call(torch.ones(rows, 2))
    assert len(call.graphs) == len(call._known) == 2
    assert recorder.num_recorded == 4, "the first one was forgotten"
    call(torch.ones(1, 2), key="other")
    assert recorder.num_recorded == 5


@pytest.mark.parametrize("recorder", [Replays(error_at=0), Replays(wrong_at=0)])
def test_after_a_failure_the_function_is_called(recorder: Replays) -> None:
    call = CapturedCall(scaled, CPU, recorder=recorder)
    for value in (1.0, 2.0, 3.0):
        assert call(torch.full((2, 3), value))[0].tolist() == [[2 * value] * 3] * 2
    assert call.failure is not None
    assert recorder.num_recorded == 1


def test_on_a_cpu_nothing_is_captured() -> None:
    call = CapturedCall(scaled, CPU)
    assert call(torch.ones(1, 2))[0].tolist() == [[2.0, 2.0]]
    assert not call.graphs.is_recording


def test_errors_are_named_by_their_cause() -> None:
    error = RuntimeError("capture invalidated")
    error.__context__ = ValueError("the cause\nin two lines")
    assert describe(error) == "ValueError: the cause"


def test_functions_run_without_a_recorder() -> None:
    done = []
    Graphs(None).run("key", lambda: done.append(1), list)
    assert done == [1]


def test_medusa_heads_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Replays()
    monkeypatch.setattr(medusa, "CapturedCall", partial(CapturedCall, recorder=recorder))
    model = new_model("llama")
    for inputs in (prompts(12), prompts(3, 9)):
        assert_identical(model, DRAFTERS["medusa-taught"], inputs, max_new_tokens=24, do_sample=True)
    assert recorder.num_recorded >= 2
    assert recorder.num_replayed > recorder.num_recorded
