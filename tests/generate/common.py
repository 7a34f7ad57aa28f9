"""What the tests of `generate` share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import transformers as tf
from torch import Tensor

import specdec
from specdec import SpeculativeModel
from specdec.budget import Budget
from specdec.generation import FallbackWarning
from tests.conformance import RandomTreeDrafter, reference
from tests.tiny_models import prompts

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
