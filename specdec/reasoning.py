"""Drafted reasoning steps: what a tree says of them, and what the target said."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property


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
class DraftedSteps:
    """Which rows of a tree hold a step that is to be judged as a whole; one entry per row.

    Such a row is a chain: the root, the step's tokens, and then those of a question about the step. The question is
    never accepted: what the target says behind it is the judgement.

    Args:
        lengths: Tokens of the step, 0 in a row that is not judged.
        questions: Tokens of the question.
        is_forced: The step is kept whatever the target says of it.
        digits: For each of the digits 0 to 9 the tokens that mean it behind the question; empty if there are none.
        texts: The step in words; None in a row that is not judged.
    """

    lengths: tuple[int, ...]
    questions: tuple[int, ...]
    is_forced: tuple[bool, ...]
    digits: tuple[tuple[int, ...], ...] = ()
    texts: tuple[StepText | None, ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest step."""
        return max(self.lengths)


@dataclass(frozen=True)
class Verdict:
    """What was said of a step.

    Args:
        accepted: The step is kept.
        score: What the judge gave; None for a step that was kept by force.
        digit_mass: Probability of all digits together where a digit was asked for.
        log_prob: Mean log-probability of the step's tokens under the target.
    """

    accepted: bool
    score: float | None = None
    digit_mass: float | None = None
    log_prob: float | None = None
