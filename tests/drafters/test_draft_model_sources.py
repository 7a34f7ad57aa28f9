"""Which models draft: one of its own, a name, the target's first layers; and which are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf

import specdec
from specdec.drafters import DraftModelDrafter
from specdec.drafters.small_model import loading as draft_loading
from specdec.passes.capability import Capability
from tests.conformance import assert_identical, draft_of
from tests.drafters.test_draft_model import drafter_of
from tests.tiny_models import VOCAB, new_model, prompts, tiny_model

# --- the target's own layers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3-mixed-windows"])
def test_first_layers_of_the_target_draft(name: str) -> None:
    model = new_model(name, num_hidden_layers=3) if name == "llama" else new_model(name)
    total = model.config.num_hidden_layers
    state = {key: value.clone() for key, value in model.state_dict().items()}
    config = model.config.to_dict()
    drafter = DraftModelDrafter("self", layers=total - 1)
    for inputs in (prompts(12), prompts(3, 9)):
        assert_identical(model, drafter, inputs, max_new_tokens=16, do_sample=True)
    part = drafter._bound.model
    assert part is not model
    assert model.config.to_dict() == config
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    shared = {weight.data_ptr() for weight in model.parameters()}
    assert {weight.data_ptr() for weight in part.parameters()} < shared


def test_first_layers_are_the_model_without_the_others() -> None:
    model = new_model("llama", num_hidden_layers=3)
    drafter = DraftModelDrafter("self", layers=2)
    drafter.bind(model)
    shorter = copy.deepcopy(model)
    shorter.model.layers = shorter.model.layers[:2]
    ids = prompts(9)["input_ids"]
    assert torch.equal(drafter._bound.model(ids).logits, shorter(ids).logits)
    assert not torch.equal(drafter._bound.model(ids).logits, model(ids).logits)


# --- a model, a name, errors ------------------------------------------------------------------------------------------


def test_a_model_is_a_drafter(tmp_path: Any) -> None:
    fast = specdec.accelerate(tiny_model(), draft_of("llama"))
    assert isinstance(fast.drafter, DraftModelDrafter)
    draft_of("llama").save_pretrained(tmp_path)
    report = assert_identical(tiny_model(), DraftModelDrafter(str(tmp_path)), prompts(9), max_new_tokens=16)
    assert report.num_accepted_tokens > 0


def test_draft_model_is_as_it_was() -> None:
    draft = copy.deepcopy(draft_of("llama"))
    before = {key: value.clone() for key, value in draft.state_dict().items()}
    expected, config = draft.generate(**prompts(9), max_new_tokens=8), draft.config.to_dict()
    assert_identical(tiny_model(), drafter_of("dynamic", draft), prompts(9, 4), max_new_tokens=16, do_sample=True)
    assert draft.generate(**prompts(9), max_new_tokens=8).tolist() == expected.tolist()
    assert draft.config.to_dict() == config
    assert all(torch.equal(value, before[key]) for key, value in draft.state_dict().items())


def test_nothing_is_drafted_beyond_the_draft_models_positions() -> None:
    draft = new_model("gpt2", n_positions=20)
    for inputs in (prompts(9), prompts(3, 9), prompts(19), prompts(20), prompts(25)):
        report = assert_identical(tiny_model(), drafter_of("dynamic", draft), inputs, max_new_tokens=24)
        assert (report.num_draft_tokens > 0) == (inputs["input_ids"].shape[1] < 19)


def encoder() -> Any:
    return tf.BertForMaskedLM(
        tf.BertConfig(vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )


def encoder_decoder() -> Any:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )


REFUSED: dict[str, tuple[Any, str]] = {
    "none": (lambda: DraftModelDrafter(), "no draft model is given; pass"),
    "itself": (lambda: DraftModelDrafter(tiny_model()), "draft_model is the target itself"),
    "encoder": (lambda: DraftModelDrafter(encoder()), "encoder|cannot generate text"),
    "encoder-decoder": (lambda: DraftModelDrafter(encoder_decoder()), "is an encoder-decoder"),
    "vocabulary": (
        lambda: DraftModelDrafter(new_model("llama", vocab_size=1000)),
        rf"LlamaForCausalLM \(unnamed\) has a vocabulary of 1000 tokens and the target LlamaForCausalLM .* {VOCAB}",
    ),
    "all layers": (lambda: DraftModelDrafter("self", layers=2), "layers=2 must be at least 1 and below the target's 2"),
    "growth": (lambda: DraftModelDrafter(growth="wide"), "growth='wide' is not known; use one of 'chain'"),  # type: ignore[arg-type]
    "auto": (lambda: DraftModelDrafter(growth="auto"), "growth='auto' is gone: 'dynamic' does its work"),  # type: ignore[arg-type]
    "static": (lambda: DraftModelDrafter(growth="static"), "use one of 'chain', 'dynamic', 'paced'"),  # type: ignore[arg-type]
    "layers": (lambda: DraftModelDrafter(layers=2), "layers=2 has a meaning with draft_model='self' only"),
    "acceptances": (lambda: DraftModelDrafter(acceptances=(0.2, 0.5)), "leave it out, and use growth='dynamic'"),
    "depth": (lambda: DraftModelDrafter(max_depth=0), "max_depth=0 must be at least 1"),
    "confidence": (lambda: DraftModelDrafter(min_confidence=1.5), "min_confidence=1.5 must be"),
    "nodes": (lambda: DraftModelDrafter(max_nodes=0), "max_nodes=0 must be at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_draft_is_refused_before_any_work(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        specdec.accelerate(tiny_model(), make())


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="draft_model must be a transformers causal LM or a name, not int"):
        specdec.accelerate(tiny_model(), DraftModelDrafter(3))


def test_a_draft_model_that_takes_nothing_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_loading, "probe", lambda model: Capability("plain", "its states are recurrent"))
    with pytest.raises(ValueError, match=r"cannot draft, because .* \(its states are recurrent\)"):
        specdec.accelerate(tiny_model(), drafter_of())


def test_settings_name_the_model() -> None:
    settings = drafter_of("chain").settings()
    assert settings["draft_model"] == "LlamaForCausalLM"
    assert settings["growth"] == "chain"
