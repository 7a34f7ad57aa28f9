"""No decoding method is ever replaced by another one; models with a `generate` of their own."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.generation import GenerationMixin

import specdec
from specdec.generation import FallbackWarning
from tests.generate.common import PADDED, SINGLE, one_fallback
from tests.tiny_models import MODELS, new_model, tiny_model

METHODS: dict[str, dict[str, Any]] = {
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "dola": {"dola_layers": "low"},
    "constrained": {"num_beams": 2, "force_words_ids": [[5]]},
    "group beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "beams": {"num_beams": 3},
    "in a config": {"generation_config": tf.GenerationConfig(penalty_alpha=0.6, top_k=4, max_new_tokens=8)},
}


def outcome(target: Any, **kwargs: Any) -> Any:
    """Token ids, or what was raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        try:
            return target.generate(**SINGLE, **kwargs).tolist()
        except Exception as error:
            return type(error), str(error)


@pytest.mark.parametrize("case", METHODS)
def test_another_method_is_what_plain_generate_makes_of_it(case: str) -> None:
    kwargs = {"max_new_tokens": 8, **METHODS[case]}
    fast = specdec.accelerate(tiny_model(), "lookahead")
    assert outcome(fast, **kwargs) == outcome(tiny_model(), **kwargs)
    assert "the decoding method is" in str(fast.report.fallback)


def test_a_method_of_the_models_config() -> None:
    model = new_model("llama")
    model.generation_config.num_beams = 3
    fast = specdec.accelerate(model, "lookahead")
    with one_fallback("beam search"):
        assert fast.generate(**SINGLE, max_new_tokens=8).tolist() == outcome(model, max_new_tokens=8)
    assert fast.generate(**SINGLE, max_new_tokens=8, num_beams=1).shape[1] == SINGLE["input_ids"].shape[1] + 8
    assert fast.report.fallback is None


def test_the_hook_refuses_a_method_that_it_would_replace() -> None:
    with pytest.raises(ValueError, match="contrastive search cannot be combined with custom_generate"):
        tiny_model().generate(
            **SINGLE, max_new_tokens=8, penalty_alpha=0.6, top_k=4, custom_generate=specdec.speculate("lookahead")
        )


class ValueHead(nn.Module):
    """As trainers wrap a model: forwards and generation are delegated."""

    def __init__(self, pretrained_model: Any) -> None:
        super().__init__()
        self.pretrained_model, self.v_head = pretrained_model, nn.Linear(32, 1)
        self.config = pretrained_model.config

    def forward(self, **kwargs: Any) -> Any:
        output = self.pretrained_model(**kwargs, output_hidden_states=True)
        return output.logits, self.v_head(output.hidden_states[-1])

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.pretrained_model.generate(*args, **kwargs)


class Deaf(ValueHead):
    def generate(self, input_ids: Tensor, max_new_tokens: int = 8) -> Any:  # type: ignore[override]
        return self.pretrained_model.generate(input_ids, max_new_tokens=max_new_tokens)


class Willful(ValueHead):
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("custom_generate", None)
        return self.pretrained_model.generate(*args, **kwargs)


@pytest.mark.parametrize("inputs", [SINGLE, PADDED], ids=["single", "padded"])
def test_wrappers_that_delegate(inputs: Any) -> None:
    model = tiny_model()
    fast = specdec.accelerate(ValueHead(model), "lookahead", strict=True)
    got = fast.generate(**inputs, max_new_tokens=24)
    assert got.tolist() == model.generate(**inputs, max_new_tokens=24).tolist()
    assert fast.report.fallback is None
    assert fast.capability.mode == "tree"


def test_wrappers_that_do_not_delegate() -> None:
    with pytest.raises(TypeError, match=r"generate\(\) of Deaf takes input_ids, max_new_tokens only"):
        specdec.accelerate(Deaf(tiny_model()))
    fast = specdec.accelerate(Willful(tiny_model()), "lookahead")
    with one_fallback("of Willful decodes in a way of its own"):
        got = fast.generate(**SINGLE, max_new_tokens=8)
    assert got.tolist() == outcome(tiny_model(), max_new_tokens=8)

    class Stranger(nn.Module):
        config = tiny_model().config

        def generate(self, **kwargs: Any) -> Any:
            return None

    with pytest.raises(TypeError, match="Stranger, whose generate"):
        specdec.accelerate(Stranger())


class OwnLoop(tf.LlamaForCausalLM):
    """Never says 7."""

    def _sample(self, input_ids: Tensor, logits_processor: Any, **kwargs: Any) -> Any:
        suppressed = tf.SuppressTokensLogitsProcessor([7, 9, 11], device="cpu")
        processors = tf.LogitsProcessorList([*logits_processor, suppressed])
        return GenerationMixin._sample(self, input_ids, logits_processor=processors, **kwargs)


def test_a_sampling_loop_of_its_own_is_not_ignored() -> None:
    torch.manual_seed(0)
    model = OwnLoop(MODELS["llama"]()[1]).eval()
    fast = specdec.accelerate(model, "lookahead")
    with one_fallback("OwnLoop has a sampling loop of its own"):
        got = fast.generate(**SINGLE, max_new_tokens=24)
    assert got.tolist() == model.generate(**SINGLE, max_new_tokens=24).tolist()
