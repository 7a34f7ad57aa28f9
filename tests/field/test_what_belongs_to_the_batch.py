"""What was made for the batch at its start, and what changes in a model from call to call."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import specdec
from specdec.budget import Budget
from specdec.generation import FallbackWarning
from tests.conformance import RandomTreeDrafter, assert_identical, reference
from tests.generate.common import PADDED, SINGLE
from tests.tiny_models import new_model

NEW = 24


def ends(model: Any, inputs: Any = PADDED, **kwargs: Any) -> list[int]:
    """End-of-sequence ids that end the rows at different times."""
    answers = reference(model, inputs, max_new_tokens=NEW, eos_token_id=None, **kwargs).answers
    return [answer[5 * row + 3] for row, answer in enumerate(answers)]


class Steers:
    def __init__(self, steer: Tensor) -> None:
        self.steer = steer

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0] + self.steer, *output[1:]) if isinstance(output, tuple) else output + self.steer


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("fields", [{}, {"return_dict_in_generate": True, "output_scores": True}])
@pytest.mark.parametrize("patched", [False, True], ids=["hook", "patched forward"])
def test_hooks_with_one_entry_per_row(rows: int, fields: dict[str, Any], patched: bool) -> None:
    model = new_model("llama")
    fast = specdec.accelerate(model, "lookahead", strict=True, budget=Budget(16, fixed=True))
    fast.generate(**PADDED, max_new_tokens=NEW)
    assert fast.report.capability == "tree"
    steers = Steers(torch.randn((rows, 1, 32), generator=torch.Generator().manual_seed(0)))
    if patched:
        layer, right = model.model.layers[0].mlp, model.model.layers[0].mlp.forward
        layer.forward = lambda *args: steers(layer, args, right(*args))
    else:
        handle = model.model.layers[0].register_forward_hook(steers)
    kwargs = {"max_new_tokens": NEW, "eos_token_id": ends(model), **fields}
    expected = model.generate(**PADDED, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        got = fast.generate(**PADDED, **kwargs)
    ids, theirs = (out.sequences if fields else out for out in (got, expected))
    assert ids.tolist() == theirs.tolist()
    if fields:
        torch.testing.assert_close(got.scores, expected.scores, atol=1e-4, rtol=1e-4)
    assert (fast.report.fallback is None) == (rows == 1), "the probe's batch is another one"
    if patched:
        del layer.forward
    else:
        handle.remove()
    fast.generate(**PADDED, max_new_tokens=NEW)
    assert fast.report.fallback is None, "the model is not plain for good"


@pytest.mark.parametrize("keep_cache", [False, True])
def test_rows_that_have_ended_stay_in_the_batch(keep_cache: bool) -> None:
    """A hook that demands its batch, and says nothing: trees go on, over all rows."""
    model = new_model("llama")
    widths = []

    def counts(module: nn.Module, args: Any) -> None:
        widths.append(len(args[0]))

    handle = model.lm_head.register_forward_pre_hook(counts)
    kwargs: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": ends(model), "return_dict_in_generate": keep_cache}
    expected = model.generate(**PADDED, **kwargs)
    answers = reference(model, PADDED, max_new_tokens=NEW, eos_token_id=kwargs["eos_token_id"]).answers
    fast = specdec.accelerate(model, RandomTreeDrafter(answers), strict=True, budget=Budget(16, fixed=True))
    assert fast.capability.mode == "tree"
    widths.clear()
    got = fast.generate(**PADDED, **kwargs)
    handle.remove()
    assert set(widths) == {3} and fast.report.fallback is None
    assert fast.report.num_accepted_tokens > 0
    if not keep_cache:
        assert got.tolist() == expected.tolist()
        return
    assert got.sequences.tolist() == expected.sequences.tolist()
    for mine, theirs in zip(got.cache.layers, expected.cache.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-4, rtol=1e-4)


def test_adapters_per_row() -> None:
    model = new_model("llama")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, config, "a").eval()
    adapted.add_adapter("b", config)
    kwargs = {"max_new_tokens": NEW, "adapter_names": ["a", "b", "a"]}
    expected = adapted.generate(**PADDED, **kwargs, eos_token_id=(eos := ends(adapted, adapter_names=["a", "b", "a"])))
    fast = specdec.accelerate(adapted, "lookahead", strict=True, budget=Budget(16, fixed=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        for _ in range(2):
            assert fast.generate(**PADDED, **kwargs, eos_token_id=eos).tolist() == expected.tolist()
    assert not any(module._forward_pre_hooks for module in adapted.modules())
    fast.generate(**SINGLE, max_new_tokens=NEW)
    assert fast.report.fallback is None, "the model is not plain for good"
    adapted.set_adapter("b")
    assert (
        fast.generate(**SINGLE, max_new_tokens=NEW).tolist() == adapted.generate(**SINGLE, max_new_tokens=NEW).tolist()
    )


@pytest.mark.parametrize("where", ["model", "a layer"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_dropout_is_noticed_and_draws_as_plain_decoding_does(where: str, do_sample: bool) -> None:
    model = new_model("gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    specdec.accelerate(model, "lookahead").generate(**SINGLE, max_new_tokens=2)
    (model if where == "model" else model.transformer.h[1]).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        for inputs in (SINGLE, PADDED):
            report = assert_identical(model, "lookahead", inputs, max_new_tokens=12, do_sample=do_sample)
    assert "draw random numbers" in str(report.fallback)
    model.eval()
    assert assert_identical(model, "lookahead", SINGLE, max_new_tokens=12).fallback is None


def test_a_first_call_in_training_mode() -> None:
    model = new_model("gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        assert_identical(model, "lookahead", SINGLE, max_new_tokens=12)


def test_autocast_is_noticed() -> None:
    model = new_model("llama")
    fast = specdec.accelerate(model, "lookahead")
    assert fast.generate(**SINGLE, max_new_tokens=4).tolist()
    first = fast.capability
    with torch.autocast("cpu", torch.bfloat16):
        assert fast.capability is not first
