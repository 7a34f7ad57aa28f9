"""Limits, criteria and kinds of input, with speculation as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import specdec
from specdec.budget import Budget
from tests.conformance import OracleDrafter, RandomTreeDrafter, assert_identical, reference
from tests.generate.common import NEW_TOKENS, PADDED, SINGLE, accelerated, one_fallback
from tests.tiny_models import EOS, FIRST_TOKEN, PAD, new_model, prompts, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("inputs", [SINGLE, PADDED], ids=["single", "padded"])
def test_limits(inputs: Any) -> None:
    for kwargs in (
        {"max_length": 20},
        {"max_length": 20, "min_length": 18},
        {"max_new_tokens": 16, "min_new_tokens": 12, "eos_token_id": list(range(2, 60))},
        {"max_new_tokens": 16, "max_time": 1000.0},
        {"max_new_tokens": 16, "forced_eos_token_id": EOS},
        {"max_new_tokens": 16, "suppress_tokens": list(range(20, 60)), "bad_words_ids": [[5], [7, 8]]},
        {"max_new_tokens": 16, "exponential_decay_length_penalty": (4, 1.5)},
        {"max_new_tokens": 16, "sequence_bias": [[[7], 4.0], [[8, 9], -8.0]]},
        {"max_new_tokens": 16, "encoder_repetition_penalty": 1.5},
        {"max_new_tokens": 16, "renormalize_logits": True, "remove_invalid_values": True},
        {"max_new_tokens": 16, "begin_suppress_tokens": [7, 8]},
    ):
        for do_sample in (False, True):
            report = assert_identical(tiny_model(), RandomTreeDrafter, inputs, do_sample=do_sample, **kwargs)
            assert report.fallback is None, kwargs


def test_no_time_is_one_token() -> None:
    fast = accelerated(tiny_model(), SINGLE)
    assert fast.generate(**SINGLE, max_new_tokens=NEW_TOKENS, max_time=0.0).shape[1] == SINGLE["input_ids"].shape[1] + 1


class EndsOnToken(tf.StoppingCriteria):
    """Ends a row at one of some tokens; remembers what it was asked."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = tokens
        self.asked: list[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.asked += input_ids.tolist()
        return torch.tensor([row[-1] in self.tokens for row in input_ids.tolist()])


def test_criterion_of_the_user_is_asked_once_per_token() -> None:
    model = tiny_model()
    answer = reference(model, SINGLE, max_new_tokens=NEW_TOKENS).answers[0]
    mine, theirs = EndsOnToken(answer[12]), EndsOnToken(answer[12])
    kwargs = {"max_new_tokens": NEW_TOKENS}
    fast = specdec.accelerate(model, OracleDrafter([answer]), strict=True, budget=Budget(64, fixed=True))
    got = fast.generate(**SINGLE, **kwargs, stopping_criteria=[mine])
    expected = model.generate(**SINGLE, **kwargs, stopping_criteria=[theirs])
    assert got.tolist() == expected.tolist()
    assert mine.asked == theirs.asked
    assert fast.report.fallback is None
    assert fast.report.num_accepted_tokens > 0


def test_criterion_of_the_user_in_a_batch_falls_back() -> None:
    model = tiny_model()
    fast = accelerated(model, PADDED)
    with one_fallback("EndsOnToken may look at the whole batch"):
        for _ in range(2):
            got = fast.generate(**PADDED, max_new_tokens=NEW_TOKENS, stopping_criteria=[EndsOnToken(5, 6, 7, 8, 9)])
    expected = model.generate(**PADDED, max_new_tokens=NEW_TOKENS, stopping_criteria=[EndsOnToken(5, 6, 7, 8, 9)])
    assert got.tolist() == expected.tolist()
    assert "EndsOnToken" in str(fast.report.fallback)


class Counting(tf.LogitsProcessor):
    """Depends on how often it was called, and on the last token."""

    def __init__(self) -> None:
        self.calls: list[list[list[int]]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls.append(input_ids.tolist())
        return scores.roll(len(self.calls), dims=-1) + (input_ids[:, -1:] % 3 == 0) * scores.flip(-1)


@pytest.mark.parametrize("do_sample", [False, True])
def test_processor_with_a_memory_is_called_as_by_plain_decoding(do_sample: bool) -> None:
    model = tiny_model()
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": do_sample}
    mine, theirs = Counting(), Counting()
    torch.manual_seed(0)
    expected = model.generate(**SINGLE, **kwargs, logits_processor=[theirs])
    answers = [expected[0, SINGLE["input_ids"].shape[1] :].tolist()]
    fast = specdec.accelerate(model, OracleDrafter(answers), strict=True, budget=Budget(64, fixed=True))
    torch.manual_seed(0)
    got = fast.generate(**SINGLE, **kwargs, logits_processor=[mine])
    assert got.tolist() == expected.tolist()
    assert mine.calls == theirs.calls
    assert fast.report.num_accepted_tokens > 0


def test_processor_with_a_memory_in_a_batch_falls_back() -> None:
    model = tiny_model()
    fast = accelerated(model, PADDED)
    with one_fallback("Counting may look at the whole batch"):
        got = fast.generate(**PADDED, max_new_tokens=NEW_TOKENS, logits_processor=[Counting()])
    expected = model.generate(**PADDED, max_new_tokens=NEW_TOKENS, logits_processor=[Counting()])
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("inputs", [SINGLE, PADDED], ids=["single", "padded"])
@pytest.mark.filterwarnings("ignore::specdec.generation.FallbackWarning")
def test_allowed_tokens_follow_each_rows_prefix(inputs: Any) -> None:
    def allowed(batch: int, ids: Tensor) -> list[int]:
        return [token for token in range(FIRST_TOKEN, 97) if (token + int(ids[-1]) + batch) % 4]

    for do_sample in (False, True):
        assert_identical(
            tiny_model(),
            RandomTreeDrafter,
            inputs,
            max_new_tokens=16,
            do_sample=do_sample,
            prefix_allowed_tokens_fn=allowed,
        )


@pytest.mark.parametrize("inputs", [SINGLE, PADDED], ids=["single", "padded"])
@pytest.mark.filterwarnings("ignore::specdec.generation.FallbackWarning")
def test_classifier_free_guidance(inputs: Any) -> None:
    negative = prompts(*[5] * len(inputs["input_ids"]), seed=3)["input_ids"]
    for extra in ({}, {"negative_prompt_ids": negative}):
        assert_identical(tiny_model(), RandomTreeDrafter, inputs, max_new_tokens=16, guidance_scale=1.5, **extra)


@pytest.mark.parametrize("inputs", [SINGLE, PADDED], ids=["single", "padded"])
def test_prompt_as_embeddings(inputs: Any) -> None:
    model = tiny_model()
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    embedded = {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}
    for do_sample in (False, True):
        kwargs = {"max_new_tokens": 16, "do_sample": do_sample}
        report = assert_identical(model, RandomTreeDrafter, embedded, **kwargs)
        assert report.fallback is None
        assert_identical(model, RandomTreeDrafter, embedded, **kwargs, repetition_penalty=1.3)
        both = {**inputs, "inputs_embeds": embeddings}
        assert_identical(model, RandomTreeDrafter, both, **kwargs)


def test_prompt_without_a_mask_and_by_position() -> None:
    model = tiny_model()
    fast = accelerated(model, SINGLE)
    for ids in (SINGLE["input_ids"], PADDED["input_ids"]):
        assert fast.generate(ids, max_new_tokens=12).tolist() == model.generate(ids, max_new_tokens=12).tolist()
        by_name = fast.generate(inputs=ids, max_new_tokens=12)
        assert by_name.tolist() == model.generate(ids, max_new_tokens=12).tolist()


def test_prompts_with_holes_in_the_mask() -> None:
    inputs = prompts(9, 9, 9)
    inputs["attention_mask"][1, 3:5] = 0
    inputs["attention_mask"][2, -2:] = 0  # padded on the wrong side
    for do_sample in (False, True):
        assert_identical(tiny_model(), RandomTreeDrafter, inputs, max_new_tokens=NEW_TOKENS, do_sample=do_sample)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_positions_given_by_the_user(name: str) -> None:
    positions = torch.arange(9)[None] * 2 + torch.tensor([[5], [0], [7]])
    inputs = {**PADDED, "position_ids": positions}
    report = assert_identical(tiny_model(name), RandomTreeDrafter, inputs, max_new_tokens=NEW_TOKENS, do_sample=True)
    assert report.fallback is None


def test_inside_and_outside_of_inference_mode() -> None:
    model = new_model("llama")
    expected = reference(model, PADDED, max_new_tokens=NEW_TOKENS)
    fast = specdec.accelerate(model, "lookahead", strict=True, budget=Budget(16, fixed=True))
    for _ in range(2):
        with torch.inference_mode():
            assert fast.generate(**PADDED, max_new_tokens=NEW_TOKENS).tolist() == expected.ids.tolist()
        assert fast.generate(**PADDED, max_new_tokens=NEW_TOKENS).tolist() == expected.ids.tolist()


def test_no_prompt_at_all() -> None:
    model = tiny_model()
    assert accelerated(model, SINGLE).generate(max_new_tokens=8).tolist() == model.generate(max_new_tokens=8).tolist()


def test_settings_as_an_object() -> None:
    config = tf.GenerationConfig(max_new_tokens=20, do_sample=True, temperature=0.8, pad_token_id=PAD, eos_token_id=EOS)
    before = config.to_dict()
    assert_identical(tiny_model(), RandomTreeDrafter, SINGLE, generation_config=config)
    assert_identical(tiny_model(), RandomTreeDrafter, PADDED, generation_config=config, max_new_tokens=10)
    config.stop_strings = ["z", "b"]
    assert_identical(tiny_model(), RandomTreeDrafter, PADDED, generation_config=config, tokenizer=tiny_tokenizer())
    outputs = []
    for model in (tiny_model(), accelerated(tiny_model(), PADDED)):
        torch.manual_seed(0)
        outputs.append(model.generate(PADDED["input_ids"], config, tokenizer=tiny_tokenizer()).tolist())
    assert outputs[0] == outputs[1], "the settings may be given by position too"
    assert config.to_dict() == before | {"stop_strings": ["z", "b"]}


def test_defaults_of_the_model() -> None:
    model = new_model("llama")
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.8
    model.generation_config.max_new_tokens = 20
    assert_identical(model, RandomTreeDrafter, SINGLE)
    model.generation_config.stop_strings = ["z", "b"]
    fast = specdec.accelerate(model, None)
    with one_fallback("stop_strings are set in the model's generation_config"):
        torch.manual_seed(0)
        got = fast.generate(**SINGLE, tokenizer=tiny_tokenizer())
    torch.manual_seed(0)
    assert got.tolist() == model.generate(**SINGLE, tokenizer=tiny_tokenizer()).tolist()


def test_wrong_arguments_raise_as_they_do_without() -> None:
    fast = accelerated(tiny_model(), SINGLE)
    with pytest.raises(ValueError, match="not_an_argument"):
        fast.generate(**SINGLE, not_an_argument=1)
    with pytest.raises(ValueError, match="tokenizer"):
        fast.generate(**SINGLE, stop_strings=["z"])
    with pytest.raises(ValueError, match="custom_generate cannot be combined"):
        fast.generate(**SINGLE, custom_generate=specdec.speculate("lookahead"))
