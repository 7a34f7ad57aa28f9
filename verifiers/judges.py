"""Judges of a reasoning step: what its score is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepText:
    """The text of a drafted step, decoded when it is asked for.

    Args:
        tokens: The step's, in the target's vocabulary.
        before: All tokens of the row before the step, the prompt's included.
        decode: Text of tokens.
    """

    tokens: Iterable[int]
    before: Iterable[int]
    decode: Callable[[Iterable[int]], str]

    @cached_property
    def text(self) -> str:
        """The step itself."""
        return self.decode(self.tokens)

    @cached_property
    def prefix(self) -> str:
        """Everything before the step, the prompt included."""
        return self.decode(self.before)


@dataclass(frozen=True)
class JudgedStep:
    """All that one pass of the target tells of a step.

    Args:
        tokens: The step's, `[tokens]`.
        log_probs: Log-probability of each under the target, `[tokens]`, float32.
        digit_probs: Probability of each digit as the answer to the question behind the step, `[10]`, float32; None
            where nothing was asked.
        words: The step's text and what stands before it, decoded when asked for.
    """

    tokens: Tensor
    log_probs: Tensor
    digit_probs: Tensor | None = None
    words: StepText | None = None

    @property
    def text(self) -> str:
        """The step itself."""
        assert self.words is not None
        return self.words.text

    @property
    def prefix(self) -> str:
        """Everything before the step, the prompt included."""
        assert self.words is not None
        return self.words.prefix


class Judge(ABC):
    """Gives a step a score: the higher, the better."""

    name: str = "judge"
    asks_target: bool = False
    """Whether the target is asked for a digit behind the step."""
    needs_digit: bool = False
    """Whether there is no score where the target answers with something else."""
    lowest: float = float("-inf")
    highest: float = float("inf")

    @abstractmethod
    def score(self, step: JudgedStep) -> float:
        """The step's score."""


class ExpectedDigit(Judge):
    """The digit that the target gives on average: sum of d P(d), over the digits' probability in all."""

    name = "expectation"
    asks_target = needs_digit = True
    lowest, highest = 0.0, 9.0

    def score(self, step: JudgedStep) -> float:
        probs = _digits(step)
        return float((probs * torch.arange(10, device=probs.device)).sum() / probs.sum())


class LikeliestDigit(Judge):
    """The digit that the target finds likeliest."""

    name = "argmax"
    asks_target = needs_digit = True
    lowest, highest = 0.0, 9.0

    def score(self, step: JudgedStep) -> float:
        return float(_digits(step).argmax())


class MeanLogProb(Judge):
    """Mean log-probability of the step's tokens under the target: minus the log of its perplexity. Asks nothing."""

    name = "log-prob"
    highest = 0.0

    def score(self, step: JudgedStep) -> float:
        return float(step.log_probs.mean())


@dataclass(frozen=True)
class CalledJudge(Judge):
    """Any function of a step, such as one that asks a process reward model about `step.prefix` and `step.text`.

    Args:
        function: Takes a `JudgedStep`, returns a number. If it has an attribute `asks_target` that is true, the target
            is asked for a digit too.
    """

    function: Callable[[JudgedStep], Any]

    @property
    def name(self) -> str:  # type: ignore[override]
        """The function's name."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def asks_target(self) -> bool:  # type: ignore[override]
        """As the function says."""
        return bool(getattr(self.function, "asks_target", False))

    def score(self, step: JudgedStep) -> float:
        return float(self.function(step))


def _digits(step: JudgedStep) -> Tensor:
    assert step.digit_probs is not None
    return step.digit_probs


JUDGES: dict[str, type[Judge]] = {judge.name: judge for judge in (ExpectedDigit, LikeliestDigit, MeanLogProb)}
"""Judges by name."""


def resolve_judge(judge: Any) -> Judge:
    """A judge from its name, one that calls a function, or the judge itself.

    Raises:
        ValueError: The name is not known.
        TypeError: It is neither a name nor can it be called.
    """
    if isinstance(judge, Judge):
        return judge
    known = ", ".join(map(repr, JUDGES))
    if isinstance(judge, str):
        if judge not in JUDGES:
            raise ValueError(f"judge={judge!r} is not known; use one of {known}, or a function of a JudgedStep")
        return JUDGES[judge]()
    if isinstance(judge, type) and issubclass(judge, Judge):
        raise TypeError(f"judge={judge.__name__} is a class; pass an instance: {judge.__name__}()")
    if callable(judge):
        return CalledJudge(judge)
    raise TypeError(f"judge must be a name ({known}), a Judge or a function of a JudgedStep, not {judge!r:.200}")
