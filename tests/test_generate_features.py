"""What `generate` takes and gives, with speculation as without."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor

import specdec
from specdec import SpeculativeModel
from specdec.budget import Budget
from specdec.generation import FallbackWarning
from tests.conformance import (
    EOS,
    FIRST_TOKEN,
    PAD,
    OracleDrafter,
    RandomTreeDrafter,
    assert_identical,
    new_model,
    prompts,
    reference,
    tiny_model,
    tiny_tokenizer,
)

NEW_TOKENS = 24
SINGLE, PADDED = prompts(9), prompts(4, 9, 6)


def accelerated(model: Any, inputs: dict[str, Tensor], seed: int = 0, **kwargs: Any) -> SpeculativeModel:
    """`model` with a drafter that is right now and then, so that trees are accepted in part."""
    answers = reference(model, inputs, seed, **{"max_new_tokens": NEW_TOKENS} | kwargs).answers
    return specdec.accelerate(model, RandomTreeDrafter(answers), strict=True, budget=Budget(64, fixed=True))


@contextmanager
def one_fallback(match: str) -> Iterator[None]:
    with pytest.warns(FallbackWarning, match=match) as caught:
        yield
    assert len([w for w in caught if issubclass(w.category, FallbackWarning)]) == 1


# --- scores and the cache ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("settings", [{"top_k": 0}, {"top_p": 0.9, "temperature": 0.8}, {"repetition_penalty": 1.3}])
@pytest.mark.parametrize("inputs", [SINGLE, PADDED], ids=["single", "padded"])
def test_scores_and_logits_are_those_of_each_token(inputs: Any, settings: dict[str, Any], do_sample: bool) -> None:
    model = tiny_model()
    kwargs = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": do_sample,
        "eos_token_id": [2, 5, 9, 30],
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        **settings,
    }
    fast = accelerated(model, inputs, **kwargs | {"return_dict_in_generate": False})
    torch.manual_seed(0)
    expected = model.generate(**inputs, **kwargs)
    torch.manual_seed(0)
    got = fast.generate(**inputs, **kwargs)
    assert fast.report.num_accepted_tokens > 0
    assert type(got) is type(expected)
    assert got.keys() == expected.keys()
    assert got.sequences.tolist() == expected.sequences.tolist()
    for name in ("scores", "logits"):
        assert len(got[name]) == len(expected[name])
        assert got[name][0].dtype == expected[name][0].dtype
    for row, tokens in enumerate(expected.sequences[:, inputs["input_ids"].shape[1] :].tolist()):
        for position, token in enumerate(tokens):
            for name in ("scores", "logits"):
                torch.testing.assert_close(
                    got[name][position][row], expected[name][position][row], atol=1e-4, rtol=1e-4
                )
            if token in kwargs["eos_token_id"]:
                break


def test_only_what_is_asked_for_is_returned() -> None:
    model = tiny_model()
    for name, other in (("scores", "logits"), ("logits", "scores")):
        kwargs = {"max_new_tokens": 6, "return_dict_in_generate": True, f"output_{name}": True}
        got = accelerated(model, SINGLE).generate(**SINGLE, **kwargs)
        assert len(got[name]) == 6
        assert other not in got


def test_transition_scores_can_be_computed() -> None:
    model = tiny_model()
    kwargs = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_scores": True, "eos_token_id": None}
    fast = accelerated(model, SINGLE)
    got, expected = fast.generate(**SINGLE, **kwargs), model.generate(**SINGLE, **kwargs)
    scores = [
        m.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
        for m, out in ((fast, got), (model, expected))
    ]
    torch.testing.assert_close(scores[0], scores[1], atol=1e-4, rtol=1e-4)


def assert_same_cache(got: Any, expected: Any, lengths: list[int] | None = None) -> None:
    """Compares keys and values per layer, each row up to its length (counted from the left)."""
    assert type(got) is type(expected)
    assert got.get_seq_length() == expected.get_seq_length()
    assert len(got.layers) == len(expected.layers)
    for mine, theirs in zip(got.layers, expected.layers, strict=True):
        assert type(mine) is type(theirs)
        assert mine.get_seq_length() == theirs.get_seq_length()
        assert mine.keys.shape == theirs.keys.shape
        for row, length in enumerate(lengths or [mine.keys.shape[2]] * len(mine.keys)):
            for name in ("keys", "values"):
                torch.testing.assert_close(
                    getattr(mine, name)[row, :, :length], getattr(theirs, name)[row, :, :length], atol=1e-5, rtol=1e-4
                )


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window", "gemma3-mixed-windows"])
def test_cache_is_returned_as_plain_decoding_leaves_it(name: str) -> None:
    model = tiny_model(name)
    kwargs = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None, "return_dict_in_generate": True}
    for inputs in (SINGLE, PADDED):
        got = accelerated(model, inputs, eos_token_id=None).generate(**inputs, **kwargs)
        expected = model.generate(**inputs, **kwargs)
        assert got.sequences.tolist() == expected.sequences.tolist()
        assert_same_cache(got.past_key_values, expected.past_key_values)


def test_cache_of_a_row_that_ended_is_that_of_its_tokens() -> None:
    model = tiny_model()
    eos = [2, 5, 9, 30, 31, 32, 33]
    kwargs = {"max_new_tokens": NEW_TOKENS, "eos_token_id": eos}
    answers = reference(model, PADDED, **kwargs).answers
    assert len({len(answer) for answer in answers}) > 1
    got = accelerated(model, PADDED, **kwargs).generate(**PADDED, **kwargs, return_dict_in_generate=True)
    expected = model.generate(**PADDED, **kwargs, return_dict_in_generate=True)
    prompt = PADDED["input_ids"].shape[1]
    lengths = [prompt + len(answer) - 1 for answer in answers]
    assert_same_cache(got.past_key_values, expected.past_key_values, lengths)


def second_turn(generate: Callable[..., Any], model: Any, inputs: dict[str, Tensor], cache: Any) -> tuple[Any, Any]:
    """Two turns of a conversation on one cache: handed in (a cache), or taken from the first turn's output (None)."""
    kwargs = {"max_new_tokens": 12, "do_sample": True, "eos_token_id": None, "return_dict_in_generate": True}
    first = generate(**inputs, past_key_values=cache, **kwargs) if cache is not None else generate(**inputs, **kwargs)
    more = prompts(*[5] * len(first.sequences), seed=7)["input_ids"]
    ids = torch.cat([first.sequences, more], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), 12 + 5, dtype=torch.int64)], dim=1)
    second = generate(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **kwargs)
    return second.sequences, second.past_key_values


@pytest.mark.parametrize("handed_in", [False, True], ids=["cache-from-output", "cache-handed-in"])
@pytest.mark.parametrize("inputs", [SINGLE, PADDED], ids=["single", "padded"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window", "gemma3-mixed-windows"])
def test_second_turn_goes_on_from_the_first_turns_cache(name: str, inputs: Any, handed_in: bool) -> None:
    model = tiny_model(name)

    def cache() -> Any:
        return tf.DynamicCache(config=model.config) if handed_in else None

    torch.manual_seed(5)
    expected, expected_cache = second_turn(model.generate, model, inputs, cache())
    answers = [row[inputs["input_ids"].shape[1] :] for row in expected.tolist()]
    fast = specdec.accelerate(model, RandomTreeDrafter(answers), strict=True, budget=Budget(64, fixed=True))
    torch.manual_seed(5)
    got, got_cache = second_turn(fast.generate, model, inputs, cache())
    assert got.tolist() == expected.tolist()
    assert fast.report.fallback is None
    assert_same_cache(got_cache, expected_cache)


def test_second_turn_after_rows_of_different_lengths() -> None:
    """What stands behind the end of a row is hidden by the mask of the second turn."""
    model, eos = tiny_model(), [2, 5, 9, 30, 31, 32, 33]
    kwargs = {"max_new_tokens": NEW_TOKENS, "eos_token_id": eos, "return_dict_in_generate": True}
    texts = []
    for target in (model, accelerated(model, PADDED, eos_token_id=eos)):
        first = target.generate(**PADDED, **kwargs)
        new = first.sequences[:, PADDED["input_ids"].shape[1] :]
        is_end = torch.isin(new, torch.tensor(eos))
        mask = torch.cat([PADDED["attention_mask"], (is_end.cumsum(1) - is_end.long() == 0).long()], dim=1)
        more = prompts(5, 5, 5, seed=7)
        ids = torch.cat([first.sequences, more["input_ids"]], dim=1)
        mask = torch.cat([mask, more["attention_mask"]], dim=1)
        assert (mask[:, :-5] == 0).any(1).sum() > 1
        second = target.generate(
            input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **kwargs | {"eos_token_id": None}
        )
        texts.append(second.sequences.tolist())
    assert texts[0] == texts[1]


def test_cache_handed_in_is_filled_though_nothing_is_returned() -> None:
    model = tiny_model()
    mine, theirs = (tf.DynamicCache(config=model.config) for _ in range(2))
    got = accelerated(model, SINGLE).generate(**SINGLE, max_new_tokens=NEW_TOKENS, past_key_values=mine)
    expected = model.generate(**SINGLE, max_new_tokens=NEW_TOKENS, past_key_values=theirs)
    assert got.tolist() == expected.tolist()
    assert_same_cache(mine, theirs)


def test_prefill_in_chunks() -> None:
    assert_identical(tiny_model(), RandomTreeDrafter, prompts(21), max_new_tokens=16, prefill_chunk_size=8)


# --- limits and criteria ----------------------------------------------------------------------------------------------


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


# --- inputs -----------------------------------------------------------------------------------------------------------


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


# --- fallbacks --------------------------------------------------------------------------------------------------------

FALLBACKS: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 3}, "beam search"),
    "sampled beams": ({"num_beams": 2, "do_sample": True}, "beam sample"),
    "no cache": ({"use_cache": False}, "use_cache is False"),
    "hidden states": ({"return_dict_in_generate": True, "output_hidden_states": True}, "hidden states"),
    "static cache": ({"cache_implementation": "static"}, "StaticCache"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens is given"),
}


@pytest.mark.parametrize("case", FALLBACKS)
@pytest.mark.parametrize("do_batch", [False, True], ids=["single", "padded"])
def test_what_cannot_be_speculated_on_is_left_to_the_model(case: str, do_batch: bool) -> None:
    kwargs, reason = FALLBACKS[case]
    if do_batch and case == "prompt lookup":
        pytest.skip("transformers takes one row only")
    model, inputs = tiny_model(), PADDED if do_batch else SINGLE
    fast = accelerated(model, inputs)
    with one_fallback(reason):
        for _ in range(2):
            torch.manual_seed(0)
            got = fast.generate(**inputs, max_new_tokens=12, **kwargs)
    torch.manual_seed(0)
    expected = model.generate(**inputs, max_new_tokens=12, **kwargs)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        fast.generate(**inputs, max_new_tokens=12, **kwargs)  # one warning is enough
    assert torch.equal(torch.get_rng_state(), state)
    assert type(got) is type(expected)
    ids, expected_ids = (out if isinstance(out, Tensor) else out.sequences for out in (got, expected))
    assert ids.tolist() == expected_ids.tolist()
    if "return_dict_in_generate" in kwargs:
        assert len(got.hidden_states) == len(expected.hidden_states)
    assert reason in str(fast.report.fallback)
    assert fast.report.capability == "plain"


def test_assistant_model_is_left_to_the_model() -> None:
    model = tiny_model()
    fast = accelerated(model, SINGLE)
    with one_fallback("assistant_model is given"):
        got = fast.generate(**SINGLE, max_new_tokens=12, assistant_model=new_model("llama", seed=1))
    assert got.tolist() == model.generate(**SINGLE, max_new_tokens=12).tolist()


def test_encoder_decoder_is_left_to_the_model() -> None:
    torch.manual_seed(0)
    config = tf.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    model = tf.T5ForConditionalGeneration(config).eval()
    fast = specdec.accelerate(model, "lookahead")
    with one_fallback("encoder-decoder"):
        got = fast.generate(**SINGLE, max_new_tokens=12)
    assert got.tolist() == model.generate(**SINGLE, max_new_tokens=12).tolist()


# --- streamers --------------------------------------------------------------------------------------------------------


class Recorder(tf.generation.streamers.BaseStreamer):
    def __init__(self) -> None:
        self.put_in: list[list[int]] = []
        self.ends = 0

    def put(self, value: Tensor) -> None:
        assert not self.ends
        assert value.device.type == "cpu"
        self.put_in.append(value.tolist())

    def end(self) -> None:
        self.ends += 1


@pytest.mark.parametrize("inputs", [SINGLE, PADDED], ids=["single", "padded"])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("settings", [{}, {"eos_token_id": [2, 5, 9, 30, 31, 32, 33]}, {"num_beams": 1}])
def test_streamer_is_fed_as_by_plain_decoding(inputs: Any, do_sample: bool, settings: dict[str, Any]) -> None:
    model = tiny_model()
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": do_sample, **settings}
    fast = accelerated(model, inputs, **kwargs)
    mine, theirs = Recorder(), Recorder()
    torch.manual_seed(0)
    fast.generate(**inputs, **kwargs, streamer=mine)
    torch.manual_seed(0)
    model.generate(**inputs, **kwargs, streamer=theirs)
    assert mine.put_in == theirs.put_in
    assert mine.ends == theirs.ends == 1


def test_text_streamer_in_a_thread() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    fast = accelerated(model, SINGLE)
    streamer = tf.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60.0)
    thread = Thread(target=fast.generate, kwargs={**SINGLE, "max_new_tokens": NEW_TOKENS, "streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    new = model.generate(**SINGLE, max_new_tokens=NEW_TOKENS)[0, SINGLE["input_ids"].shape[1] :]
    assert text == tokenizer.decode(new)


def test_streamer_of_a_fallback() -> None:
    fast = accelerated(tiny_model(), SINGLE)
    mine, theirs = Recorder(), Recorder()
    with one_fallback("use_cache"):
        fast.generate(**SINGLE, max_new_tokens=6, use_cache=False, streamer=mine)
    tiny_model().generate(**SINGLE, max_new_tokens=6, use_cache=False, streamer=theirs)
    assert mine.put_in == theirs.put_in
    assert mine.ends == 1


def test_streamer_of_one_call_is_not_that_of_the_next() -> None:
    fast = accelerated(tiny_model(), SINGLE)
    recorder = Recorder()
    fast.generate(**SINGLE, max_new_tokens=6, streamer=recorder)
    count = len(recorder.put_in)
    fast.generate(**SINGLE, max_new_tokens=6)
    assert len(recorder.put_in) == count


# --- ways to call -----------------------------------------------------------------------------------------------------


def test_hook_of_transformers() -> None:
    model = tiny_model()
    speculation = specdec.speculate("lookahead", strict=True, budget=Budget(16, fixed=True))
    for do_sample in (False, True, True):
        for inputs in (SINGLE, PADDED):
            expected = reference(model, inputs, max_new_tokens=NEW_TOKENS, do_sample=do_sample)
            torch.manual_seed(0)
            got = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=do_sample, custom_generate=speculation)
            assert got.tolist() == expected.ids.tolist()
            assert torch.equal(torch.get_rng_state(), expected.rng_state)
    assert speculation.report.num_accepted_tokens > 0


def test_hook_of_transformers_with_a_streamer() -> None:
    model = tiny_model()
    mine, theirs = Recorder(), Recorder()
    model.generate(**SINGLE, max_new_tokens=6, custom_generate=specdec.speculate(None, streamer=mine))
    model.generate(**SINGLE, max_new_tokens=6, streamer=theirs)
    # The prompt is put in by `generate` itself, which does not know the streamer.
    assert mine.put_in == theirs.put_in[1:]
    assert mine.ends == 1


def test_pipeline() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    fast = specdec.accelerate(model, "lookahead", strict=True)
    texts = ["hello world", "speculative decoding"]
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "return_full_text": False}
    outputs = []
    for target in (model, fast):
        pipe = tf.pipeline("text-generation", model=target, tokenizer=tokenizer)
        torch.manual_seed(0)
        outputs.append([pipe(texts[0], **kwargs), pipe(texts, batch_size=2, **kwargs)])
    assert outputs[0] == outputs[1]
    assert fast.report.num_target_passes > 0
    assert fast.report.fallback is None


def test_adapters() -> None:
    model = new_model("llama")
    before = model.generate(**SINGLE, max_new_tokens=NEW_TOKENS)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, config).eval()
    for inputs in (SINGLE, PADDED):
        for do_sample in (False, True):
            report = assert_identical(
                adapted, RandomTreeDrafter, inputs, max_new_tokens=NEW_TOKENS, do_sample=do_sample
            )
            assert report.fallback is None
            assert report.num_accepted_tokens > 0
    fast = specdec.accelerate(adapted, "lookahead")
    assert fast.capability.mode == "tree"
    assert fast.generate(**SINGLE, max_new_tokens=NEW_TOKENS).tolist() != before.tolist()
    with adapted.disable_adapter():
        assert fast.generate(**SINGLE, max_new_tokens=NEW_TOKENS).tolist() == before.tolist()


def test_training_mode_is_left_as_it_is() -> None:
    model = new_model("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    assert_identical(model, RandomTreeDrafter, SINGLE, max_new_tokens=12)
    assert model.training


# --- a stand-in for the model -----------------------------------------------------------------------------------------


def test_everything_else_is_the_models_own() -> None:
    model = new_model("llama")
    fast = specdec.accelerate(model, "lookahead")
    assert fast.model is model
    assert fast.config is model.config
    assert fast.generation_config is model.generation_config
    assert fast.device == model.device
    assert fast.dtype == model.dtype
    assert fast.can_generate()
    assert fast.eval() is fast
    assert fast.to("cpu") is fast
    assert fast.train() is fast and model.training
    assert fast.eval() is fast and not model.training
    assert fast.get_input_embeddings() is model.get_input_embeddings()
    torch.testing.assert_close(fast(**SINGLE).logits, model(**SINGLE).logits)
    torch.testing.assert_close(fast.forward(**SINGLE).logits, model(**SINGLE).logits)
    assert [name for name, _ in fast.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert "generate" in dir(fast) and "lm_head" in dir(fast)
    assert "LlamaForCausalLM" in repr(fast) and "lookahead" in repr(fast)
    fast.note = "kept by the model"
    assert model.note == "kept by the model"
    with pytest.raises(AttributeError):
        _ = fast.no_such_attribute


def test_the_dtype_can_be_changed_between_calls() -> None:
    model = new_model("llama")
    fast = accelerated(model, SINGLE)
    fast.generate(**SINGLE, max_new_tokens=4)
    assert fast.to(torch.float64) is fast
    expected = model.generate(**SINGLE, max_new_tokens=NEW_TOKENS)
    assert fast.generate(**SINGLE, max_new_tokens=NEW_TOKENS).tolist() == expected.tolist()


def test_settings_of_the_stand_in_reach_the_model() -> None:
    model = new_model("llama")
    fast = specdec.accelerate(model, None)
    fast.generation_config = tf.GenerationConfig(max_new_tokens=5, eos_token_id=None, pad_token_id=PAD)
    assert fast.generate(**SINGLE).shape[1] == SINGLE["input_ids"].shape[1] + 5


def test_model_is_not_changed() -> None:
    model = new_model("llama")
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")

    def state() -> Any:
        modules = {name: set(module.__dict__) for name, module in model.named_modules()}
        hooked = {name: [len(getattr(module, hook)) for hook in hooks] for name, module in model.named_modules()}
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        settings = copy.deepcopy((model.config.to_dict(), model.generation_config.to_dict()))
        return modules, hooked, weights, settings

    before = state()
    fast = accelerated(model, PADDED)
    fast.generate(**PADDED, max_new_tokens=NEW_TOKENS, do_sample=True, return_dict_in_generate=True, output_scores=True)
    fast.generate(**SINGLE, max_new_tokens=NEW_TOKENS)
    after = state()
    assert after[0] == before[0]
    assert after[1] == before[1]
    assert after[2].keys() == before[2].keys()
    assert all(torch.equal(after[2][name], weight) for name, weight in before[2].items())
    assert after[3] == before[3]


def test_report_tells_what_was_done() -> None:
    fast = accelerated(tiny_model(), PADDED)
    fast.generate(**PADDED, max_new_tokens=NEW_TOKENS)
    report = fast.report
    figures = report.to_dict()
    assert figures["drafter"] == "random-tree"
    assert figures["guarantee"] == "token-identical"
    assert sum(report.num_accepted_tokens_per_pos) == report.num_accepted_tokens
    assert report.tokens_per_pass > 1
    assert "tokens_per_pass" in str(report)
    fast.generate(**PADDED, max_new_tokens=1)
    assert fast.report is not report
    assert fast.report.num_generated_tokens == 3
