"""Which backend is used: by name, or by the rule."""

from __future__ import annotations

import pytest
import torch

import specdec
from specdec.passes.attention import choice
from specdec.passes.attention.base import AttentionCall, UnsupportedAttentionError
from specdec.passes.attention.choice import candidates
from specdec.passes.attention.dense import SdpaAttention
from specdec.passes.attention.switch import switched_attention
from specdec.passes.replica import replica_of
from tests.attention.reference import Shape, call_of
from tests.tiny_models import new_model, tiny_model


def test_on_a_cpu_the_model_keeps_its_own() -> None:
    assert candidates("auto", "sdpa", torch.device("cpu")) == ["model"]
    assert specdec.accelerate(tiny_model()).capability.attention == "model"
    assert specdec.accelerate(tiny_model()).capability.backend() is None


def test_on_a_gpu_triton_comes_first_then_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.TritonTreeAttention, "missing", lambda self: None)
    gpu = torch.device("cuda")
    assert candidates("auto", "sdpa", gpu) == candidates("auto", "eager", gpu) == ["triton", "sdpa", "model"]
    assert candidates("auto", "flash_attention_3", gpu) == ["triton", "sdpa"]
    assert candidates("auto", "something of the user's", gpu) == ["model"]
    assert candidates("sdpa", "eager", gpu) == ["sdpa"]
    monkeypatch.setattr(choice.TritonTreeAttention, "missing", lambda self: "triton")
    assert candidates("auto", "sdpa", gpu) == ["sdpa", "model"]


def test_the_first_that_is_right_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(SdpaAttention):
        name = "triton"

        def attend(self, call: AttentionCall) -> torch.Tensor:
            return super().attend(call) * 1.1

    monkeypatch.setitem(choice.BACKENDS, "triton", Broken)
    monkeypatch.setattr("specdec.passes.capability.candidates", lambda *_: ["triton", "sdpa", "model"])
    found = specdec.accelerate(new_model("llama")).capability
    assert found.attention == "sdpa"
    assert found.rejected == {"triton": "a tree's logits differ from plain decoding's"}
    assert "attention by sdpa; not by triton (a tree's logits differ" in str(found)


@pytest.mark.parametrize("accelerate", [specdec.accelerate, lambda _, **kwargs: specdec.speculate(**kwargs)])
def test_wrong_names_are_refused_before_any_work(accelerate: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(attention: object, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            accelerate(tiny_model(), attention=attention)  # type: ignore[operator]

    refused("paged", ValueError, "attention='paged' is not known; use one of 'auto', 'model', 'sdpa', 'triton'")
    refused("flex", ValueError, "attention='flex' was removed; use 'triton'")
    refused(["model", "sdpa"], TypeError, "must be one of 'auto', 'model', .*not chosen by measurement")
    refused(SdpaAttention(), TypeError, "must be one of 'auto'")
    monkeypatch.setattr(choice.TritonTreeAttention, "missing", lambda self: "it needs the package triton")
    refused("triton", ImportError, "attention='triton' cannot be used: it needs the package triton")


def test_a_model_that_takes_no_trees_takes_no_backend() -> None:
    fast = specdec.accelerate(tiny_model(), attention="sdpa", capability="chain")
    with pytest.raises(ValueError, match="attention='sdpa' cannot be used with LlamaForCausalLM: demanded"):
        _ = fast.capability


def test_a_model_that_does_not_ask_the_interface_is_refused() -> None:
    call = call_of(Shape())
    with (
        pytest.raises(UnsupportedAttentionError, match="does not look attention up"),
        switched_attention(replica_of(tiny_model()), call.plan, SdpaAttention()),
    ):
        pass
