"""Compiled passes of the target: the same tokens, by one function for all sizes, or the model as it is."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import specdec
from specdec.budget import Budget
from specdec.budgeting.pass_times import StepTimes
from specdec.drafters import LookaheadDrafter
from specdec.kv_cache import GROWTH
from specdec.passes.compiled import package
from specdec.passes.compiled.passes import compiled_passes
from tests.compiled.builders import built_by, exported, uncompiled
from tests.conformance import DRAFTERS, assert_identical, random_heads
from tests.tiny_models import WINDOW, new_model, prompts, tiny_model

MODELS = ("llama", "gpt2", "qwen3", "mistral-window", "gemma3-mixed-windows", "gemma2-softcap", "llama4-chunks")


@pytest.mark.parametrize("name", MODELS)
def test_same_tokens_on_every_kind_of_model(name: str) -> None:
    with built_by(exported) as built:
        for inputs in (prompts(2 * WINDOW), prompts(2 * WINDOW, 3, 7)):
            for do_sample in (False, True):
                report = assert_identical(
                    tiny_model(name), DRAFTERS["random-tree"], inputs, compiled=True, max_new_tokens=24,
                    do_sample=do_sample,
                )  # fmt: skip
                assert (report.compiled or "").startswith("yes")
    assert len(built) == 1


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_same_tokens_with_every_drafter(drafter: str) -> None:
    with built_by(uncompiled) as built:
        for inputs in (prompts(12), prompts(3, 11, 5)):
            report = assert_identical(
                tiny_model(), DRAFTERS[drafter], inputs, compiled=True, max_new_tokens=24, do_sample=True
            )
            assert (report.compiled or "").startswith("yes")
    assert built == ["LlamaForCausalLM"]


def test_nothing_is_built_anew_as_the_cache_grows() -> None:
    model = tiny_model()
    with built_by(exported) as built:
        for inputs, new in ((prompts(3), 9), (prompts(40), 2 * GROWTH), (prompts(5, 60), 30), (prompts(3, 4, 5), 9)):
            for drafter in (None, "oracle"):
                assert_identical(
                    model, DRAFTERS[drafter] if drafter else None, inputs, compiled=True, max_new_tokens=new,
                    do_sample=False,
                )  # fmt: skip
    assert built == ["LlamaForCausalLM"]


def test_building_is_over_before_any_step_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def noted(module: nn.Module, *args: Any) -> package.Function:
        events.append("build")
        return uncompiled(module, *args)

    for owner, name in ((StepTimes, "update"), (Budget, "record")):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, _name=name, _original=original: (events.append(_name), _original(*args))[1]
        )
    with built_by(noted):
        fast = specdec.accelerate(new_model("llama"), LookaheadDrafter(), compiled=True)
        fast.generate(**prompts(3, 9), max_new_tokens=30)
    assert events[0] == "build" and events.count("build") == 1 and "update" in events
    assert fast.report.seconds["compile"] > 0


def test_step_times_of_compiled_passes_are_kept_apart() -> None:
    model, asked = new_model("llama"), []
    with built_by(uncompiled):
        for compiled in (False, True):
            budget = Budget(8)
            specdec.accelerate(model, LookaheadDrafter(), budget=budget, compiled=compiled).generate(
                **prompts(9), max_new_tokens=20
            )
            asked.append(budget.times)
    assert asked[0] is not asked[1]


def test_hidden_states_reach_medusa_heads() -> None:
    model = tiny_model()
    heads = random_heads(model)
    accepted = []
    with built_by(exported):
        for compiled in (False, True):
            for inputs in (prompts(12), prompts(3, 11, 5)):
                drafter = specdec.drafters.MedusaDrafter(heads)
                report = assert_identical(model, drafter, inputs, compiled=compiled, max_new_tokens=30, do_sample=False)
                accepted.append((report.num_draft_tokens, report.num_accepted_tokens))
    assert accepted[:2] == accepted[2:]


def test_with_an_adapter_of_peft() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(new_model("llama"), config)
    with built_by(exported) as built:
        with_adapter = assert_identical(model, DRAFTERS["random-tree"], prompts(9), compiled=True, max_new_tokens=16)
        assert (with_adapter.compiled or "").startswith("yes")
        with model.disable_adapter():
            assert_identical(model, DRAFTERS["random-tree"], prompts(9), compiled=True, max_new_tokens=16)
    assert len(built) == 2


def test_with_static_steps() -> None:
    with built_by(exported) as built:
        for inputs in (prompts(12), prompts(3, 11, 5)):
            report = assert_identical(
                new_model("llama"), DRAFTERS["random-tree"], inputs, compiled=True, max_new_tokens=24,
                cuda_graphs="eager",
            )  # fmt: skip
            assert (report.compiled or "").startswith("yes")
    assert len(built) == 2


def test_weights_that_change_are_followed() -> None:
    model = new_model("llama")
    with built_by(exported) as built:
        assert_identical(model, None, prompts(9), compiled=True, max_new_tokens=16)
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)
        assert_identical(model, None, prompts(9), compiled=True, max_new_tokens=16)
        assert len(built) == 1
        model.lm_head.weight = nn.Parameter(-model.lm_head.weight.detach())
        assert_identical(model, None, prompts(9), compiled=True, max_new_tokens=16)
        assert len(built) == 2


def test_the_model_is_left_as_it_was() -> None:
    model = new_model("llama")
    before = {name: set(vars(part)) for name, part in model.named_modules()}
    with built_by(exported):
        assert_identical(model, None, prompts(9), compiled=True, max_new_tokens=16)
    assert {name: set(vars(part)) for name, part in model.named_modules()} == before
    assert model.config._attn_implementation == "sdpa"
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_compiler_that_fails_is_told_of_once() -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler here")

    model = new_model("llama")
    with built_by(broken):
        fast = specdec.accelerate(model, None, compiled=True)
        expected = model.generate(**prompts(9), max_new_tokens=16)
        with pytest.warns(RuntimeWarning, match=r"LlamaForCausalLM are not compiled.*leave out.*no compiler here"):
            assert torch.equal(fast.generate(**prompts(9), max_new_tokens=16), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(fast.generate(**prompts(9), max_new_tokens=16), expected)
        assert fast.report.compiled == "no, because RuntimeError: no compiler here"
        assert "compiled: no, because RuntimeError" in str(fast.capability)


@pytest.mark.parametrize("nodes", [1, 2])
def test_other_logits_are_noticed_at_any_size(nodes: int) -> None:
    def wrong(module: nn.Module, *args: Any) -> package.Function:
        right = uncompiled(module, *args)

        def function(*inputs: Tensor) -> Sequence[Tensor]:
            logits, *others = right(*inputs)
            return (-logits if inputs[0].shape[1] == nodes else logits, *others)

        return function

    with built_by(wrong), pytest.warns(RuntimeWarning, match="other logits than the model itself"):
        assert_identical(new_model("llama"), DRAFTERS["random-tree"], prompts(9), compiled=True, max_new_tokens=16)


def test_other_hidden_states_are_noticed() -> None:
    def wrong(module: nn.Module, *args: Any) -> package.Function:
        right = uncompiled(module, *args)
        return lambda *inputs: (right(*inputs)[0], -right(*inputs)[1])

    model = new_model("llama")
    drafter = specdec.drafters.MedusaDrafter(random_heads(model))
    with built_by(wrong), pytest.warns(RuntimeWarning, match="than the model itself"):
        assert_identical(model, drafter, prompts(9), compiled=True, max_new_tokens=16)


def test_a_function_that_fails_later_costs_no_token() -> None:
    calls = []

    def fails(module: nn.Module, *args: Any) -> package.Function:
        right = uncompiled(module, *args)

        def function(*inputs: Tensor) -> Sequence[Tensor]:
            calls.append(1)
            if len(calls) > 6:
                raise RuntimeError("out of order")
            return right(*inputs)

        return function

    with built_by(fails), pytest.warns(RuntimeWarning, match="out of order"):
        assert_identical(new_model("llama"), DRAFTERS["random-tree"], prompts(9), compiled=True, max_new_tokens=16)
    assert len(calls) == 7


def hooked(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(("change", "reason"), [(hooked, "forward hooks"), (lambda model: model.train(), "training")])
def test_what_stands_in_the_way_is_named(change: Any, reason: str) -> None:
    model = new_model("llama")
    change(model)
    with built_by(exported) as built, pytest.warns(RuntimeWarning, match=reason):
        report = assert_identical(model, None, prompts(9), compiled=True, max_new_tokens=16)
    assert not built and reason in (report.compiled or "")


def test_attention_that_is_asked_for_stands_in_the_way() -> None:
    with built_by(exported), pytest.warns(RuntimeWarning, match="attention is computed by sdpa"):
        assert_identical(
            new_model("llama"), DRAFTERS["random-tree"], prompts(9), compiled=True, max_new_tokens=16, attention="sdpa"
        )


def test_models_that_are_not_run_on_trees_are_named() -> None:
    with built_by(exported) as built, pytest.warns(RuntimeWarning, match="not run on trees"):
        report = assert_identical(
            new_model("llama"), DRAFTERS["oracle"], prompts(9), compiled=True, max_new_tokens=16, capability="chain"
        )
    assert not built and report.capability == "chain"


def test_as_transformers_own_hook() -> None:
    model = new_model("llama")
    with built_by(uncompiled) as built:
        method = specdec.speculate("lookahead", compiled=True)
        ids = model.generate(**prompts(9), max_new_tokens=16, custom_generate=method)
    assert torch.equal(ids, model.generate(**prompts(9), max_new_tokens=16))
    assert built


@pytest.mark.slow
def test_compiled_for_real(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    model = new_model("llama")
    for inputs in (prompts(12), prompts(3, 11, 5)):
        for do_sample in (False, True):
            report = assert_identical(
                model, DRAFTERS["random-tree"], inputs, compiled=True, max_new_tokens=24, do_sample=do_sample
            )
            assert (report.compiled or "").startswith("yes")
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    assert_identical(model, None, prompts(9), compiled=True, max_new_tokens=16)
    model.lm_head.weight = nn.Parameter(-model.lm_head.weight.detach())
    assert_identical(model, None, prompts(9), compiled=True, max_new_tokens=16)
    assert compiled_passes(model).is_ready and len(list(tmp_path.glob("*.pt2"))) == 1
