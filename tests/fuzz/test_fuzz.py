"""Random calls of `generate`, against plain decoding: same tokens, same generator state, same fields, same errors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor
from transformers.cache_utils import DynamicCache

import specdec
from specdec.budget import Budget
from specdec.compat import CACHE
from specdec.drafters import LookaheadDrafter, RecyclingDrafter
from tests.conformance import AlwaysWrongDrafter, OracleDrafter, RandomTreeDrafter, draft_of, lookahead
from tests.tiny_models import FIRST_TOKEN, VOCAB, prompts, tiny_model, tiny_tokenizer

ARCHITECTURES = ("llama", "gpt2", "gemma3-mixed-windows")
FEW, MANY = 24, 300


class Remembers(tf.LogitsProcessor):
    """Depends on how often it was called, and refuses what no plain call shows it."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        return scores.roll(self.calls % 3, dims=-1)


class Rounds(tf.LogitsProcessor):
    """Returns half precision."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.to(torch.bfloat16)


class Overwrites(tf.LogitsProcessor):
    """Writes into what it is given."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, 7:30] -= 3.0
        return scores


class Exhausts(tf.LogitsProcessor):
    """Leaves nothing after some tokens."""

    def __init__(self) -> None:
        self.left = 6

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.left -= 1
        return scores if self.left else torch.full_like(scores, -torch.inf)


class EndsLate(tf.StoppingCriteria):
    """Ends a batch after so many calls."""

    def __init__(self) -> None:
        self.left = 9

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.left -= 1
        assert scores is None or len(scores) == 9 - self.left
        return torch.full((len(input_ids),), self.left <= 0)


PROCESSORS: tuple[Callable[[], tf.LogitsProcessor], ...] = (Remembers, Rounds, Overwrites, Exhausts)
DRAFTERS: dict[str, Callable[[str, list[list[int]]], Any]] = {
    "none": lambda name, answers: None,
    "lookahead": lambda name, answers: LookaheadDrafter(),
    "taught lookahead": lambda name, answers: lookahead(answers),
    "recycling": lambda name, answers: RecyclingDrafter(),
    "oracle": lambda name, answers: OracleDrafter(answers),
    "oracle chain": lambda name, answers: OracleDrafter(answers, decoys=False),
    "random": lambda name, answers: RandomTreeDrafter(answers),
    "wrong": lambda name, answers: AlwaysWrongDrafter(answers),
    "draft model": lambda name, answers: draft_of(name),
    "auto": lambda name, answers: "auto",
    "merged": lambda name, answers: [RandomTreeDrafter(answers), LookaheadDrafter()],
}


class Draw:
    """One random call.

    Args:
        seed: Decides on everything.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = np.random.default_rng(seed)
        self.name = str(self.random.choice(ARCHITECTURES))
        rows = int(self.random.choice([1, 1, 2, 3]))
        self.inputs: dict[str, Any] = prompts(*self.random.integers(1, 13, rows).tolist(), seed=seed)
        self.kwargs = self._lengths() | self._sampling() | self._penalties() | self._fields()
        self.processors = [p for p in PROCESSORS if self._may(0.08)]
        self.criteria = [EndsLate] if self._may(0.08) else []
        self.has_past = self._may(0.2)
        self.drafter = str(self.random.choice(list(DRAFTERS)))
        self.settings: dict[str, Any] = {
            "capability": str(self.random.choice(["auto", "auto", "auto", "chain"])),
            "memory": str(self.random.choice(["process", "call"])),
            "deterministic": self._may(0.1),
            "budget": Budget(int(self.random.choice([4, 16, 64])), fixed=self._may(0.7)),
        }

    def _may(self, share: float) -> bool:
        return bool(self.random.random() < share)

    def _lengths(self) -> dict[str, Any]:
        new = int(self.random.integers(1, 25))
        kwargs: dict[str, Any] = {"max_new_tokens": new}
        if self._may(0.15):
            kwargs["min_new_tokens"] = int(self.random.integers(1, new + 1))
        if self._may(0.7):
            count = int(self.random.integers(0, 12))
            eos = self.random.choice(np.arange(FIRST_TOKEN, VOCAB), count, replace=False).tolist()
            kwargs["eos_token_id"] = eos or None
        if self._may(0.1):
            kwargs |= {"stop_strings": ["a", "bc"], "tokenizer": tiny_tokenizer()}
        if self._may(0.1):
            kwargs["prefill_chunk_size"] = int(self.random.integers(1, 8))
        return kwargs

    def _sampling(self) -> dict[str, Any]:
        if self._may(0.4):
            return {"do_sample": False}
        options: dict[str, Any] = {
            "temperature": float(self.random.uniform(0.3, 1.5)),
            "top_k": int(self.random.choice([0, 1, 5, 50])),
            "top_p": float(self.random.uniform(0.5, 1.0)),
            "min_p": 0.05,
            "typical_p": 0.9,
            "epsilon_cutoff": 0.01,
            "num_return_sequences": 2,
            "renormalize_logits": True,
        }
        return {"do_sample": True} | {name: value for name, value in options.items() if self._may(0.3)}

    def _penalties(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "repetition_penalty": 1.3,
            "no_repeat_ngram_size": 2,
            "suppress_tokens": list(range(20, 40)),
            "begin_suppress_tokens": [5, 6],
            "bad_words_ids": [[7], [8, 9]],
            "sequence_bias": [[[11], 3.0], [[12, 13], -4.0]],
            "exponential_decay_length_penalty": (3, 1.4),
            "forced_eos_token_id": 44,
        }
        return {name: value for name, value in options.items() if self._may(0.12)}

    def _fields(self) -> dict[str, Any]:
        if self._may(0.6):
            return {}
        names = ("output_scores", "output_logits")
        return {"return_dict_in_generate": True} | {name: True for name in names if self._may(0.5)}

    def given(self) -> dict[str, Any]:
        """Arguments of one of the two calls: caches and processors are its own."""
        given = {**self.inputs, **copy.copy(self.kwargs)}
        if self.processors:
            given["logits_processor"] = [make() for make in self.processors]
        if self.criteria:
            given["stopping_criteria"] = [make() for make in self.criteria]
        if self.has_past:
            model = tiny_model(self.name)
            past = DynamicCache(config=model.config)
            first = model.generate(**self.inputs, max_new_tokens=3, eos_token_id=None, **{CACHE: past})
            mask = torch.cat([self.inputs["attention_mask"], torch.ones((len(first), 3), dtype=torch.long)], 1)
            given |= {"input_ids": first, "attention_mask": mask, CACHE: past}
            if "num_return_sequences" in given:
                del given["num_return_sequences"]  # a cache is not repeated
        return given

    def run(self, target: Any, given: dict[str, Any]) -> tuple[Any, Tensor]:
        """What a model returns or raises, and the generator's state afterwards."""
        torch.manual_seed(self.seed)
        try:
            return target.generate(**given), torch.get_rng_state()
        except Exception as error:
            return error, torch.get_rng_state()

    def answers(self) -> list[list[int]]:
        """What plain decoding goes on to say, also behind the ends: drafts for it."""
        left_out = ("logits_processor", "stopping_criteria", "stop_strings", "min_new_tokens", "forced_eos_token_id")
        given = {name: value for name, value in self.given().items() if name not in left_out}
        given |= {"eos_token_id": None, "max_new_tokens": 30, "return_dict_in_generate": False}
        output, _ = self.run(tiny_model(self.name), given)
        if isinstance(output, Exception):
            return [[]]
        return output[:, given["input_ids"].shape[1] :].tolist()

    def __repr__(self) -> str:
        made = [make.__name__ for make in (*self.processors, *self.criteria)]
        return f"{self.seed}: {self.name}, {self.drafter}, {self.kwargs}, {made}, {self.has_past}, {self.settings}"


def assert_same_output(got: Any, expected: Any) -> None:
    assert type(got) is type(expected)
    if isinstance(expected, Exception):
        return
    if isinstance(expected, Tensor):
        assert got.tolist() == expected.tolist()
        return
    assert got.keys() == expected.keys()
    assert got.sequences.tolist() == expected.sequences.tolist()
    for name in ("scores", "logits"):
        assert (got[name] is None) == (expected[name] is None) if name in expected else True
        if name in expected and expected[name] is not None:
            assert [part.dtype for part in got[name]] == [part.dtype for part in expected[name]]
            torch.testing.assert_close(got[name], expected[name], atol=1e-3, rtol=1e-2)
    assert got[CACHE].get_seq_length() == expected[CACHE].get_seq_length()


def check(seed: int) -> None:
    draw = Draw(seed)
    model = tiny_model(draw.name)
    mine, theirs = draw.given(), draw.given()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, state = draw.run(model, theirs)
        drafter = DRAFTERS[draw.drafter](draw.name, draw.answers())
        fast = specdec.accelerate(model, drafter, strict=True, **draw.settings)
        got, my_state = draw.run(fast, mine)
    if isinstance(got, Exception) and not isinstance(expected, Exception):
        raise AssertionError(f"raised, in draw {draw}") from got
    try:
        assert_same_output(got, expected)
        if not isinstance(expected, Exception):
            assert torch.equal(my_state, state), "the generator's state differs"
    except AssertionError as error:
        raise AssertionError(f"draw {draw}: {error}") from error
    if draw.has_past and not isinstance(expected, Exception):
        assert mine[CACHE].get_seq_length() == theirs[CACHE].get_seq_length(), draw


@pytest.mark.parametrize("seed", range(FEW))
def test_a_random_call(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_many_random_calls(part: int) -> None:
    for seed in range(1000 + part, 1000 + MANY, 10):
        check(seed)
