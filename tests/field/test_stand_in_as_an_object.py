"""The stand-in is set, copied, patched in and piped as programs do with models."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import peft
import pytest
import transformers as tf

import specdec
from specdec.budget import Budget
from specdec.drafters import LookaheadDrafter
from tests.generate.common import PADDED, SINGLE, one_fallback
from tests.tiny_models import new_model, tiny_tokenizer


def test_drafter_and_verifier_can_be_set_and_never_reach_the_model() -> None:
    model = new_model("llama")
    keys = set(model.state_dict())
    fast = specdec.accelerate(model, "lookahead")
    draft_model = new_model("llama", seed=1)
    fast.drafter = draft_model
    fast.verifier = "traversal"
    assert (fast.drafter.name, fast.verifier.name) == ("draft-model", "traversal")
    assert set(model.state_dict()) == keys and "drafter" not in vars(model)
    fast.verifier = "exact"
    got = fast.generate(**SINGLE, max_new_tokens=16)
    assert got.tolist() == model.generate(**SINGLE, max_new_tokens=16).tolist()
    assert fast.report.drafter == "draft-model" and fast.report.num_draft_tokens > 0
    fast.drafter = None
    assert fast.drafter is None
    fast.drafter = [LookaheadDrafter(), "recycling"]
    assert fast.drafter.name == "merged"


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("drafter", "lookahaed", ValueError, "drafter='lookahaed' is not known"),
        ("verifier", 3, TypeError, "verifier must be a name"),
        ("verifier", "step", ValueError, "judges reasoning steps"),
        ("model", None, AttributeError, "model cannot be replaced; call specdec.accelerate"),
        ("speculation", None, AttributeError, "speculation cannot be replaced"),
        ("report", None, AttributeError, "report"),
        ("capability", None, AttributeError, "capability"),
    ],
)
def test_what_cannot_be_set(name: str, value: Any, error: type[Exception], match: str) -> None:
    model = new_model("llama")
    fast = specdec.accelerate(model, "lookahead")
    with pytest.raises(error, match=match):
        setattr(fast, name, value)
    assert name not in vars(model)
    assert (fast.drafter.name, fast.verifier.name) == ("lookahead", "exact")
    fast.generate(**SINGLE, max_new_tokens=4)


@pytest.mark.parametrize("drafter", ["auto", "lookahead", "recycling", ["lookahead", "recycling"], None])
def test_deep_copies(drafter: Any) -> None:
    model = new_model("llama")
    fast = specdec.accelerate(model, drafter, budget=Budget(64, fixed=True))
    expected = fast.generate(**SINGLE, max_new_tokens=24).tolist()
    fast.generate(**SINGLE, max_new_tokens=24)
    learned = fast.report.num_accepted_tokens
    other = copy.deepcopy(fast)
    assert (other.model is not model and other.drafter is not fast.drafter) or drafter is None
    assert other.generate(**SINGLE, max_new_tokens=24).tolist() == expected
    assert other.report.num_accepted_tokens >= learned, "what was learned is copied"
    assert copy.copy(fast).model is model


def test_pickling_says_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"cannot be pickled; pickle its \.model"):
        pickle.dumps(specdec.accelerate(new_model("llama"), "lookahead"))


@pytest.mark.parametrize("kind", ["bare", "peft", "inside peft"])
def test_generate_can_be_put_in_the_models_place(kind: str) -> None:
    base = new_model("llama")
    model: Any = base
    if kind != "bare":
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    expected = [model.generate(**inputs, max_new_tokens=24).tolist() for inputs in (SINGLE, PADDED)]
    beams = model.generate(**SINGLE, max_new_tokens=8, num_beams=2).tolist()
    fast = specdec.accelerate(model, "lookahead", strict=True)
    (base if kind == "inside peft" else model).generate = fast.generate
    for inputs, ids in zip((SINGLE, PADDED), expected, strict=True):
        assert model.generate(**inputs, max_new_tokens=24).tolist() == ids
        assert fast.report.fallback is None and fast.report.num_target_passes > 0
        assert fast.generate(**inputs, max_new_tokens=24).tolist() == ids
    with one_fallback("beam search"):
        assert model.generate(**SINGLE, max_new_tokens=8, num_beams=2).tolist() == beams


def test_pipelines_take_it_for_the_model_it_is(caplog: pytest.LogCaptureFixture) -> None:
    fast = specdec.accelerate(new_model("llama"), "lookahead")
    tf.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            tf.pipeline("text-generation", model=fast, tokenizer=tiny_tokenizer())
    finally:
        tf.logging.disable_propagation()
    assert "not supported" not in caplog.text
    assert isinstance(fast, specdec.SpeculativeModel)


def test_budgets_of_different_sizes_share_a_model() -> None:
    """What one has measured up to 64 nodes is read by one of four."""
    model = new_model("llama")
    for max_nodes, do_sample in ((64, True), (4, False), (16, True)):
        fast = specdec.accelerate(model, LookaheadDrafter(), strict=True, max_nodes=max_nodes)
        for _ in range(3):
            fast.generate(**SINGLE, max_new_tokens=24, do_sample=do_sample)
