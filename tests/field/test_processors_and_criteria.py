"""Processors, criteria and scores of real programs see what plain decoding shows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import specdec
from specdec.budget import Budget
from specdec.drafters import LookaheadDrafter
from tests.conformance import OracleDrafter, reference
from tests.generate.common import PADDED, SINGLE
from tests.tiny_models import VOCAB, tiny_model, tiny_tokenizer

PROMPT = SINGLE["input_ids"].shape[1]


def oracle_beyond_the_end(new_tokens: int = 32, **kwargs: Any) -> OracleDrafter:
    """Proposes what plain decoding would say if no token ended it."""
    answers = reference(tiny_model(), SINGLE, max_new_tokens=new_tokens, eos_token_id=None, **kwargs).answers
    return OracleDrafter(answers)


def both(make: Callable[[], dict[str, Any]], drafter: Any, inputs: Any = SINGLE, **kwargs: Any) -> tuple[Any, Any, Any]:
    """Plain output, speculative output, and the report; `make` gives processors or criteria of one call."""
    model = tiny_model()
    fast = specdec.accelerate(model, drafter, strict=True, budget=Budget(64, fixed=True))
    outputs = []
    for target in (model, fast):
        torch.manual_seed(0)
        outputs.append((target.generate(**inputs, **kwargs, **make()), torch.get_rng_state()))
    (expected, state), (got, mine) = outputs
    assert torch.equal(mine, state)
    return expected, got, fast.report


class NeverAfter(tf.LogitsProcessor):
    """Asserts that each prefix comes once, in order, and none goes on behind an end."""

    def __init__(self, ends: set[int]) -> None:
        self.ends, self.length = ends, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert not self.ends & set(input_ids[0, PROMPT:].tolist()), "asked after the end"
        assert not self.length or input_ids.shape[1] == self.length + 1
        self.length = input_ids.shape[1]
        return scores


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("end", ["eos", "length", "string", "criterion"])
def test_no_processor_is_asked_past_the_end(end: str, do_sample: bool) -> None:
    drafter = oracle_beyond_the_end(do_sample=do_sample)
    token = drafter.answers[0][15]
    first = drafter.answers[0].index(token)
    kwargs: dict[str, Any] = {"max_new_tokens": 32, "eos_token_id": None, "do_sample": do_sample}
    criteria: list[Any] = []
    if end == "eos":
        kwargs["eos_token_id"] = token
    elif end == "length":
        kwargs["max_new_tokens"], first = 12, 11
    elif end == "string":
        kwargs |= {"stop_strings": [tiny_tokenizer().decode([token])], "tokenizer": tiny_tokenizer()}
    else:
        criteria = [EndsAt(PROMPT + first + 1)]

    def make() -> dict[str, Any]:
        watching = NeverAfter({token} if end in ("eos", "string") else set())
        made.append(watching)
        return {"logits_processor": [watching], "stopping_criteria": criteria}

    made: list[NeverAfter] = []
    expected, got, report = both(make, drafter, **kwargs)
    assert got.tolist() == expected.tolist()
    assert made[0].length == made[1].length == PROMPT + first
    assert report.num_accepted_tokens > 0
    assert report.fallback is None


class EndsAt(tf.StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        assert input_ids.shape[1] <= self.length, "asked past the end"
        return torch.tensor([input_ids.shape[1] >= self.length])


def test_text_in_the_memory_goes_on_where_this_call_ends() -> None:
    model = tiny_model()
    fast = specdec.accelerate(model, LookaheadDrafter(), strict=True, budget=Budget(64, fixed=True))
    answer = fast.generate(**SINGLE, max_new_tokens=32, eos_token_id=None)[0, PROMPT:].tolist()
    eos = answer[15]
    got = fast.generate(**SINGLE, max_new_tokens=32, eos_token_id=eos, logits_processor=[NeverAfter({eos})])
    assert got[0, PROMPT:].tolist() == answer[: answer.index(eos) + 1]
    assert fast.report.num_accepted_tokens > 0


class Judges(tf.StoppingCriteria):
    """Ends where the best score is high, and notes what it was given."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        assert scores is not None and len(scores) == input_ids.shape[1] - PROMPT
        assert scores[-1].shape == (1, VOCAB)
        self.seen.append(float(scores[-1].max()))
        return torch.tensor([len(self.seen) > 10 and self.seen[-1] < self.seen[-2]])


@pytest.mark.parametrize("do_sample", [False, True])
def test_criteria_are_given_the_scores(do_sample: bool) -> None:
    made: list[Judges] = []

    def make() -> dict[str, Any]:
        made.append(Judges())
        return {"stopping_criteria": [made[-1]]}

    kwargs = {"max_new_tokens": 32, "eos_token_id": None, "do_sample": do_sample}
    fields = {"return_dict_in_generate": True, "output_scores": True}
    expected, got, report = both(make, oracle_beyond_the_end(do_sample=do_sample), **kwargs, **fields)
    assert got.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(made[1].seen, made[0].seen, atol=1e-4, rtol=1e-4)
    assert report.num_accepted_tokens > 0


class Masks(tf.LogitsProcessor):
    """Leaves nothing at one length."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf) if input_ids.shape[1] == PROMPT + 8 else scores


def test_nothing_left_to_sample_raises_as_plain_decoding_does() -> None:
    model, drafter = tiny_model(), oracle_beyond_the_end(do_sample=True)
    fast = specdec.accelerate(model, drafter, strict=True, budget=Budget(64, fixed=True))
    errors, states = [], []
    for target in (model, fast):
        torch.manual_seed(0)
        with pytest.raises(RuntimeError, match="probability tensor contains") as caught:
            target.generate(**SINGLE, max_new_tokens=32, do_sample=True, eos_token_id=None, logits_processor=[Masks()])
        errors.append(str(caught.value))
        states.append(torch.get_rng_state())
    assert errors[0] == errors[1]
    # With a greedy choice plain decoding takes the first token.
    expected, got, _ = both(lambda: {"logits_processor": [Masks()]}, oracle_beyond_the_end(), max_new_tokens=32)
    assert got.tolist() == expected.tolist()


class Half(tf.LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.to(torch.bfloat16) if input_ids.shape[1] % 3 else scores


@pytest.mark.parametrize("do_sample", [False, True])
def test_processors_may_return_another_dtype(do_sample: bool) -> None:
    kwargs = {"max_new_tokens": 40, "do_sample": do_sample, "eos_token_id": None}
    fields = {"return_dict_in_generate": True, "output_scores": True}
    make = lambda: {"logits_processor": [Half()]}  # noqa: E731
    drafter = oracle_beyond_the_end(40, do_sample=do_sample)
    expected, got, report = both(make, drafter, **kwargs, **fields)
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert [s.dtype for s in got.scores] == [s.dtype for s in expected.scores]
    assert report.num_target_passes < 40


@pytest.mark.parametrize("inputs", [SINGLE, PADDED], ids=["single", "padded"])
def test_default_dtype_does_not_change_the_draws(inputs: Any) -> None:
    kwargs = {"max_new_tokens": 40, "do_sample": True}
    torch.set_default_dtype(torch.bfloat16)
    try:
        expected, got, _ = both(dict, LookaheadDrafter(), inputs, **kwargs)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.tolist() == expected.tolist()


class Inplace(tf.LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, 5:40] = -5.0
        return scores


def test_processor_that_writes_into_the_scores() -> None:
    fields = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected, got, _ = both(
        lambda: {"logits_processor": [Inplace()]}, oracle_beyond_the_end(), max_new_tokens=24, **fields
    )
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.cat(got[name]), torch.cat(expected[name]), atol=1e-4, rtol=1e-4)
