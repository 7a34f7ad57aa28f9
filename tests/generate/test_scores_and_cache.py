"""Scores, logits and the kv cache, with speculation as without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import specdec
from specdec.budget import Budget
from specdec.compat import CACHE
from tests.conformance import RandomTreeDrafter, assert_identical, reference
from tests.generate.common import NEW_TOKENS, PADDED, SINGLE, accelerated
from tests.tiny_models import prompts, tiny_model


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
        for position in range(len(tokens)):
            for name in ("scores", "logits"):
                torch.testing.assert_close(
                    got[name][position][row], expected[name][position][row], atol=1e-4, rtol=1e-4
                )


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
        assert_same_cache(got[CACHE], expected[CACHE])


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
    assert_same_cache(got[CACHE], expected[CACHE], lengths)


def turns(generate: Callable[..., Any], inputs: dict[str, Tensor], cache: Any, spelling: str) -> tuple[Any, Any]:
    """Three turns of a conversation on one cache: handed in, or taken from the first turn's output (None)."""
    kwargs = {"max_new_tokens": 12, "do_sample": True, "eos_token_id": None, "return_dict_in_generate": True}
    out = generate(**inputs, **({spelling: cache} if cache is not None else {}), **kwargs)
    mask = inputs["attention_mask"]
    for turn in range(2):
        more = prompts(*[5] * len(out.sequences), seed=7 + turn)["input_ids"]
        ids = torch.cat([out.sequences, more], dim=1)
        mask = torch.cat([mask, torch.ones(len(ids), 12 + 5, dtype=torch.int64)], dim=1)
        out = generate(input_ids=ids, attention_mask=mask, **{spelling: out[CACHE]}, **kwargs)
    return out.sequences, out[CACHE]


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("spelling", sorted({"past_key_values", CACHE}))
@pytest.mark.parametrize("handed_in", [False, True], ids=["cache-from-output", "cache-handed-in"])
@pytest.mark.parametrize("inputs", [SINGLE, PADDED], ids=["single", "padded"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window", "gemma3-mixed-windows"])
def test_later_turns_continue_from_the_first_turns_cache(
    name: str, inputs: Any, handed_in: bool, spelling: str
) -> None:
    model = tiny_model(name)

    def cache() -> Any:
        return tf.DynamicCache(config=model.config) if handed_in else None

    torch.manual_seed(5)
    expected, expected_cache = turns(model.generate, inputs, cache(), spelling)
    answers = [row[inputs["input_ids"].shape[1] :] for row in expected.tolist()]
    fast = specdec.accelerate(model, RandomTreeDrafter(answers), strict=True, budget=Budget(64, fixed=True))
    torch.manual_seed(5)
    got, got_cache = turns(fast.generate, inputs, cache(), spelling)
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
            input_ids=ids, attention_mask=mask, **{CACHE: first[CACHE]}, **kwargs | {"eos_token_id": None}
        )
        texts.append(second.sequences.tolist())
    assert texts[0] == texts[1]


def test_cache_handed_in_is_filled_though_nothing_is_returned() -> None:
    model = tiny_model()
    mine, theirs = (tf.DynamicCache(config=model.config) for _ in range(2))
    got = accelerated(model, SINGLE).generate(**SINGLE, max_new_tokens=NEW_TOKENS, **{CACHE: mine})
    expected = model.generate(**SINGLE, max_new_tokens=NEW_TOKENS, **{CACHE: theirs})
    assert got.tolist() == expected.tolist()
    assert_same_cache(mine, theirs)


def test_prefill_in_chunks() -> None:
    assert_identical(tiny_model(), RandomTreeDrafter, prompts(21), max_new_tokens=16, prefill_chunk_size=8)
