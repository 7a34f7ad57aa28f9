"""The task of the reasoning test bed: chains of arithmetic, thought through in steps that can be judged.

A problem names a start and six to nine operations on it; the values between stay within 10 to 99. A thought has
one step an operation, and the steps end with a blank line:

    Start with 34.
    (a) add 27
    (b) halve
    ...
    What is left?
    <think>
    (a) Now add 27 to 34, so 34+27=61. That is the new value.

    (b) ...

    </think>

    The result is 46.

A step may be said in many ways that mean the same, in full or in short: `(a) 34+7=41.`
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any, Literal

LOWEST, HIGHEST = 10, 99
STEPS = (6, 9)
BREAK = "\n\n"
JUDGE_PROMPT = "Score of this step:"
"""What the target is shown after a step; it answers with one digit."""
HELD_OUT = 1000
"""Number of problems that the pair was not trained on."""
MAX_NEW_TOKENS = 320
STEP = re.compile(
    r"\((?P<label>[a-z])\) (?P<opener>.*?)(?P<value>\d+)(?P<sign>[-+*/])(?P<number>\d+)"
    r"=(?P<result>\d+)\.(?P<closer>.*)",
    re.DOTALL,
)
ANSWER = re.compile(r"</think>\s*The result is (\d+)\.")
NUMBERS = {"double": 2, "triple": 3, "halve": 2}
Kind = Literal["add", "take", "double", "triple", "halve"]


@dataclass(frozen=True)
class Operation:
    """One operation of a problem.

    Args:
        kind: What is done.
        number: The other operand; 2 or 3 where `kind` implies it.
    """

    kind: Kind
    number: int

    def apply(self, value: int) -> int | None:
        """The result, or None where it leaves the range or is no whole number."""
        if self.kind == "halve":
            result = value // 2 if value % 2 == 0 else 0
        elif self.kind in NUMBERS:
            result = value * self.number
        else:
            result = value + (self.number if self.kind == "add" else -self.number)
        return result if LOWEST <= result <= HIGHEST else None

    def __str__(self) -> str:
        return f"{self.kind} {self.number}" if self.kind in ("add", "take") else self.kind


@dataclass(frozen=True)
class Problem:
    """A start and the operations on it, which are labelled (a), (b), ..."""

    start: int
    operations: tuple[Operation, ...]

    @property
    def values(self) -> tuple[int, ...]:
        """The right values: the start and each result."""
        values = [self.start]
        for operation in self.operations:
            result = operation.apply(values[-1])
            assert result is not None
            values.append(result)
        return tuple(values)

    @property
    def answer(self) -> int:
        return self.values[-1]

    def __str__(self) -> str:
        listed = "".join(f"({label(i)}) {operation}\n" for i, operation in enumerate(self.operations))
        return f"Start with {self.start}.\n{listed}What is left?"


def label(index: int) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[index]


def draw_operation(value: int, rng: random.Random) -> Operation:
    """An operation that keeps `value` in range; about half of them are hard."""
    while True:
        kind: Kind = rng.choices(("add", "take", "double", "triple", "halve"), (35, 35, 10, 10, 10))[0]
        number = NUMBERS.get(kind) or (rng.randint(2, 9) if rng.random() < 0.4 else rng.randint(11, 59))
        operation = Operation(kind, number)
        if operation.apply(value) is not None:
            return operation


def draw_problem(rng: random.Random) -> Problem:
    start = value = rng.randint(LOWEST, HIGHEST)
    operations: list[Operation] = []
    for _ in range(rng.randint(*STEPS)):
        operations.append(draw_operation(value, rng))
        result = operations[-1].apply(value)
        assert result is not None
        value = result
    return Problem(start, tuple(operations))


def held_out_problems(count: int, first: int = 0) -> list[Problem]:
    """Held-out problems, from number `first` on."""
    return [draw_problem(random.Random(f"held-out {number}")) for number in range(first, first + count)]


def prompt_text(problem: Problem, tokenizer: Any) -> str:
    """The problem in the chat template, whose thinking block stays open."""
    message = [{"role": "user", "content": str(problem)}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def written_answer(text: str) -> int | None:
    """The answer in a model's output, or None."""
    found = ANSWER.findall(text)
    return int(found[-1]) if found else None
