"""Generation through each backend: ids as of `generate`, and the model as it was."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import specdec
from specdec.passes.attention import choice
from specdec.passes.attention.base import AttentionCall, UnsupportedAttentionError
from specdec.passes.attention.dense import SdpaAttention
from specdec.passes.attention.flash import FlashTreeAttention
from tests.attention.reference import flash_attn_in_torch, needs_triton
from tests.conformance import DRAFTERS, assert_identical, reference
from tests.tiny_models import new_model, prompts, tiny_model


@pytest.fixture(autouse=True)
def flash_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(choice.BACKENDS, "flash", lambda: FlashTreeAttention(flash_attn_in_torch))


CASES = [(a, name) for a in ("sdpa", "flash") for name in ("llama", "qwen3", "gpt2", "gemma2-softcap")]
INTERPRETED = [
    pytest.param("triton", "llama", marks=needs_triton),
    *(pytest.param("triton", n, marks=[needs_triton, pytest.mark.slow]) for n in ("qwen3", "gpt2", "gemma2-softcap")),
]


@pytest.mark.parametrize(("attention", "name"), [*CASES, *INTERPRETED])
def test_tokens_are_those_of_generate(attention: str, name: str) -> None:
    if attention == "sdpa" and name == "gemma2-softcap":
        with pytest.raises(ValueError, match=r"attention='sdpa' cannot be used with Gemma2ForCausalLM.*cap"):
            _ = specdec.accelerate(tiny_model(name), attention=attention).capability
        return
    model = tiny_model(name)
    loaded_with = model.config._attn_implementation
    calls = [((12,), False, 30), ((12, 3, 9), True, 30)]
    if attention == "triton":  # interpreted on a CPU: a call of a layer takes a hundredth of a second or two
        calls = [((9, 4), True, 8)]
    for lengths, do_sample, new in calls:
        kwargs: dict[str, Any] = {"do_sample": do_sample, "max_new_tokens": new}
        expected = reference(model, prompts(*lengths), **kwargs)
        assert_identical(
            model, DRAFTERS["random-tree"], prompts(*lengths), expected=expected, attention=attention, **kwargs
        )
    capability = specdec.accelerate(model, attention=attention).capability
    assert capability.attention == attention
    assert f"attention by {attention}" in str(capability)
    assert model.config._attn_implementation == loaded_with


@pytest.mark.parametrize("attention", ["model", "sdpa"])
@pytest.mark.parametrize("name", ["mistral-window", "gemma3-mixed-windows", "llama4-chunks"])
def test_windows_and_chunks_pass_the_same(name: str, attention: str) -> None:
    assert_identical(tiny_model(name), DRAFTERS["random-tree"], prompts(12, 5), attention=attention, max_new_tokens=24)


def test_a_mixture_of_windows_is_told_apart_by_layer() -> None:
    seen = []

    class Watching(SdpaAttention):
        def attend(self, call: AttentionCall) -> torch.Tensor:
            seen.append(call.layer_type)
            return super().attend(call)

    model = new_model("gemma3-mixed-windows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(choice.BACKENDS, "sdpa", Watching)
        specdec.accelerate(model, "lookahead", attention="sdpa").generate(**prompts(12), max_new_tokens=4)
    assert set(zip(seen[::3], seen[1::3], seen[2::3], strict=True)) == {
        ("sliding_attention", "full_attention", "sliding_attention")
    }


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), KeyboardInterrupt()])
def test_the_config_is_as_it_was_after_an_error(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model("llama")
    fast = specdec.accelerate(model, "lookahead", attention="sdpa")
    expected = model.generate(**prompts(12), max_new_tokens=8)
    assert torch.equal(fast.generate(**prompts(12), max_new_tokens=8), expected)

    def fail(self: SdpaAttention, call: AttentionCall) -> torch.Tensor:
        assert model.config._attn_implementation == "sdpa"
        raise error

    monkeypatch.setattr(SdpaAttention, "attend", fail)
    with pytest.raises(type(error)):
        fast.generate(**prompts(12), max_new_tokens=8)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model.generate(**prompts(12), max_new_tokens=8), expected)


def test_the_prompt_goes_through_what_the_model_was_loaded_with(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    right = SdpaAttention.attend

    def watch(self: SdpaAttention, call: AttentionCall) -> torch.Tensor:
        widths.append(call.query.shape[2])
        return right(self, call)

    fast = specdec.accelerate(tiny_model(), None, attention="sdpa")
    _ = fast.capability
    monkeypatch.setattr(SdpaAttention, "attend", watch)
    fast.generate(**prompts(12), max_new_tokens=8)
    assert set(widths) == {1}


@needs_triton
def test_padding_inside_rows_goes_through_sdpa_or_is_refused_by_name() -> None:
    inputs = prompts(12, 12)
    inputs["attention_mask"][1, 4:6] = 0
    assert_identical(tiny_model(), "lookahead", inputs, attention="triton", max_new_tokens=8)
    fast = specdec.accelerate(tiny_model(), "lookahead", attention="flash")
    with pytest.raises(UnsupportedAttentionError, match="padding on the left only; use attention='sdpa'"):
        fast.generate(**inputs, max_new_tokens=8)


@pytest.mark.parametrize("attention", ["model", "sdpa"])  # Triton's interpreter is for one thread
def test_threads_share_a_wrapper_and_never_see_the_model_change(attention: str) -> None:
    model = new_model("llama")
    layer = model.model.layers[0].self_attn
    keys, seen = list(model.state_dict()), set()
    inputs = [prompts(9 + i) for i in range(8)]
    expected = [model.generate(**one, max_new_tokens=24).tolist() for one in inputs]

    def look(*_: Any) -> None:
        seen.add((model.config._attn_implementation, layer.config._attn_implementation))

    handle = layer.register_forward_pre_hook(look)
    fast = specdec.accelerate(model, "lookahead", attention=attention, strict=True)
    assert fast.capability.mode == "tree"
    start = threading.Barrier(8)

    def call(one: Any) -> Any:
        start.wait()
        found = [fast.generate(**one, max_new_tokens=24).tolist() for _ in range(3)]
        look()
        return found

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(call, inputs))
    handle.remove()
    assert all(ids == right for many, right in zip(found, expected, strict=True) for ids in many)
    assert seen == {("sdpa", "sdpa")}
    assert list(model.state_dict()) == keys
