"""Which backend is used: by name, or the fastest."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

import specdec
from specdec.passes.attention import choice
from specdec.passes.attention.base import AttentionCall, TreeAttention, UnsupportedAttentionError
from specdec.passes.attention.choice import RUNS, AttentionChoice, candidates, seconds_of
from specdec.passes.attention.dense import SdpaAttention
from specdec.passes.attention.switch import switched_attention
from tests.attention.reference import Shape, call_of
from tests.capture.recorders import Replays
from tests.tiny_models import new_model, prompts, tiny_model


class Slow(SdpaAttention):
    name = "slow"

    def attend(self, call: AttentionCall) -> Tensor:
        time.sleep(0.001)
        return super().attend(call)


class Broken(TreeAttention):
    name = "broken"

    def attend(self, call: AttentionCall) -> Tensor:
        raise UnsupportedAttentionError("not today")


def test_the_fastest_is_measured_once_per_class_of_shapes() -> None:
    attention = AttentionChoice({"broken": Broken(), "slow": Slow(), "sdpa": SdpaAttention()})
    call = call_of(Shape())
    assert torch.equal(attention.attend(call), SdpaAttention().attend(call))
    assert list(attention.chosen.values()) == ["sdpa"]
    (seconds,) = attention.seconds.values()
    assert seconds["slow"] > 0.001
    assert attention.dropped == {"broken": "UnsupportedAttentionError: not today"}
    attention.attend(call_of(Shape(lengths=(21,)), seed=1))
    assert len(attention.chosen) == 1
    attention.attend(call_of(Shape(lengths=(200,))))
    attention.attend(call_of(Shape(nodes=16)))
    attention.attend(call_of(Shape(window=4)))
    assert len(attention.chosen) == 4
    assert attention.summary() == "the fastest of broken, slow, sdpa (so far sdpa for 4 classes of shapes)"

    assert attention.explanation().startswith(attention.summary() + "; measured last, for one layer: slow 1.")
    assert attention.explanation().endswith("; broken was left out: UnsupportedAttentionError: not today")


def test_launches_are_not_timed_where_calls_can_be_captured() -> None:
    calls, recorder = [], Replays(is_strict=False)
    seconds, reason = seconds_of(lambda: calls.append(1), torch.device("cpu"), recorder)
    assert seconds > 0
    assert reason is None
    assert len(calls) == 2 + RUNS, "to compile, and to record"
    assert recorder.num_replayed == 4


@pytest.mark.parametrize("recorder", [Replays(error_at=0), None], ids=["fails", "none"])
def test_what_cannot_be_captured_is_timed_as_it_is(recorder: Replays | None) -> None:
    calls: list[int] = []
    seconds, reason = seconds_of(lambda: calls.append(1), torch.device("cpu"), recorder)
    assert seconds > 0
    assert len(calls) == 2 + 3 * RUNS
    assert reason == (None if recorder is None else "RuntimeError: operation not permitted when stream is capturing")


def test_why_a_backend_was_not_captured_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "seconds_of", lambda *_: (0.001, "RuntimeError: it waits for the device"))
    attention = AttentionChoice({"slow": Slow(), "sdpa": SdpaAttention()})
    attention.attend(call_of(Shape()))
    assert "; sdpa could not be captured: RuntimeError: it waits" in attention.explanation()


def test_an_error_names_what_every_backend_lacks() -> None:
    attention = AttentionChoice({"broken": Broken(), "other": Broken()})
    with pytest.raises(UnsupportedAttentionError, match=r"broken: .*not today; other: .*not today"):
        attention.attend(call_of(Shape()))


def test_on_a_cpu_the_model_keeps_its_own() -> None:
    assert candidates("auto", "sdpa", torch.device("cpu")) == ["model"]
    assert specdec.accelerate(tiny_model()).capability.attention == ("model",)
    assert specdec.accelerate(tiny_model()).capability.choice(tiny_model()) is None


def test_on_a_gpu_what_is_installed_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.TritonTreeAttention, "missing", lambda self: None)
    monkeypatch.setattr(choice.FlashTreeAttention, "missing", lambda self: "flash-attn")
    gpu = torch.device("cuda")
    assert candidates("auto", "sdpa", gpu) == ["model", "triton", "sdpa"]
    assert candidates("auto", "eager", gpu) == ["triton", "sdpa"]
    assert candidates("auto", "flash_attention_2", gpu) == ["triton", "sdpa"]
    assert candidates("auto", "something of the user's", gpu) == ["model"]
    monkeypatch.setattr(choice.FlashTreeAttention, "missing", lambda self: None)
    assert candidates("auto", "flash_attention_3", gpu) == ["flash", "triton", "sdpa"]
    assert candidates("flex", "sdpa", gpu) == ["flex"]


@pytest.mark.parametrize("accelerate", [specdec.accelerate, lambda _, **kwargs: specdec.speculate(**kwargs)])
def test_wrong_names_are_refused_before_any_work(accelerate: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(attention: object, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            accelerate(tiny_model(), attention=attention)  # type: ignore[operator]

    refused("paged", ValueError, "attention='paged' is not known; use one of 'auto', 'model', 'sdpa', 'flex'")
    refused(["sdpa", "paged"], ValueError, "'paged' is not known")
    refused([], ValueError, "names nothing to choose of")
    refused(["auto", "sdpa"], ValueError, "names nothing to choose of")
    refused([SdpaAttention()], TypeError, "must be one of 'auto'")
    monkeypatch.setattr(choice.TritonTreeAttention, "missing", lambda self: "it needs the package triton")
    refused("triton", ImportError, "attention='triton' cannot be used: it needs the package triton")


def test_a_model_that_takes_no_trees_takes_no_backend() -> None:
    fast = specdec.accelerate(tiny_model(), attention="sdpa", capability="chain")
    with pytest.raises(ValueError, match="attention='sdpa' cannot be used with LlamaForCausalLM: demanded"):
        _ = fast.capability


def test_a_model_that_does_not_ask_the_interface_is_refused() -> None:
    call = call_of(Shape())
    attention = AttentionChoice({"sdpa": SdpaAttention()})
    with (
        pytest.raises(UnsupportedAttentionError, match="does not look attention up"),
        switched_attention(tiny_model(), call.plan, attention),
    ):
        pass


def test_a_model_outside_a_pass_of_this_thread_is_told_so() -> None:
    model = new_model("llama")
    model.config._attn_implementation = "specdec_tree_attention"
    with pytest.raises(RuntimeError, match="in another thread"):
        model.generate(**prompts(5), max_new_tokens=2)
