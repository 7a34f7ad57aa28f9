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

A step may be said in many ways that mean the same, in full or, as the draft model is taught for easy operations,
in short: `(a) 34+7=41.`
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from typing import Literal

LOWEST, HIGHEST = 10, 99
STEPS = (6, 9)
BREAK = "\n\n"
JUDGE_PROMPT = "Score of this step:"
"""What the target is shown after a step; it answers with one digit."""

OPENERS: dict[str, tuple[str, ...]] = {
    "add": (
        "Now add {n} to {v}, so ",
        "We put {n} on top of {v}: ",
        "Here {v} grows by {n}, which makes ",
        "The value {v} and {n} more are ",
        "Adding {n} to {v} gives ",
        "It says to add {n} to the {v} we have: ",
    ),
    "take": (
        "Now take {n} from {v}, so ",
        "We remove {n} of the {v}: ",
        "Here {v} falls by {n}, which makes ",
        "The value {v} less {n} is ",
        "Taking {n} from {v} gives ",
        "It says to take {n} from the {v} we have: ",
    ),
    "double": (
        "Now double {v}, so ",
        "Two times {v} is wanted: ",
        "Here {v} comes twice, which makes ",
        "Doubling {v} gives ",
        "It says to double the {v} we have: ",
    ),
    "triple": (
        "Now triple {v}, so ",
        "Three times {v} is wanted: ",
        "Here {v} comes three times, which makes ",
        "Tripling {v} gives ",
        "It says to triple the {v} we have: ",
    ),
    "halve": (
        "Now halve {v}, so ",
        "Half of {v} is wanted: ",
        "Here {v} is cut in two, which makes ",
        "Halving {v} gives ",
        "It says to halve the {v} we have: ",
    ),
}


def without_numbers(words: str) -> str:
    return re.sub(r"\d+|\{[nv]\}", "#", words)


CLOSERS = (
    " That is the new value.",
    " So we go on with this.",
    " This looks right to me.",
    " Keep it for the next step.",
    " All is well so far.",
    " Good, the sum is done.",
)
STEP = re.compile(
    r"\((?P<label>[a-z])\) (?P<opener>.*?)(?P<value>\d+)(?P<sign>[-+*/])(?P<number>\d+)"
    r"=(?P<result>\d+)\.(?P<closer>.*)",
    re.DOTALL,
)
ANSWER = re.compile(r"</think>\s*The result is (\d+)\.")
SIGNS = {"add": "+", "take": "-", "double": "*", "triple": "*", "halve": "/"}
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

    @property
    def easy(self) -> bool:
        """Whether the draft model is taught to write it in short."""
        return self.kind == "halve" or (self.kind in ("add", "take") and self.number < 10)

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


@dataclass(frozen=True)
class Step:
    """A step as it is written, right or wrong.

    Args:
        opener: The words before the sum, empty in a short step.
        sum: Such as `34+27=`.
        result: What it says the sum is.
        closer: The words after the sum, empty in a short step.
    """

    label: str
    opener: str
    sum: str
    result: int
    closer: str

    def __str__(self) -> str:
        return f"({self.label}) {self.opener}{self.sum}{self.result}.{self.closer}{BREAK}"


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


def write_step(index: int, operation: Operation, value: int, result: int, rng: random.Random, short: bool) -> Step:
    total = f"{value}{SIGNS[operation.kind]}{operation.number}="
    if short:
        return Step(label(index), "", total, result, "")
    opener = rng.choice(OPENERS[operation.kind]).format(n=operation.number, v=value)
    return Step(label(index), opener, total, result, rng.choice(CLOSERS))


def score(text: str, index: int, operation: Operation, value: int) -> int:
    """The rubric: how good the step `text` is when `operation` is to be done to `value`.

    9: right. 6 or 5: only the tens of the result are wrong, in full or in short. 4 or 3: only the units are.
    2 or 1: both are. 0: not this step, not this sum, or no step at all.
    """
    match = STEP.fullmatch(text.strip())
    right = operation.apply(value)
    wanted = (label(index), str(value), SIGNS[operation.kind], str(operation.number))
    if match is None or match.group("label", "value", "sign", "number") != wanted or right is None:
        return 0
    result = int(match["result"])
    if result == right:
        return 9
    points = 6 if result % 10 == right % 10 else 4 if result // 10 == right // 10 else 2
    return points - (not match["opener"])


def corrupt(
    operation: Operation, value: int, others: tuple[Operation, ...], rng: random.Random
) -> tuple[Operation, int, int]:
    """An operation, a value and a result that make a wrong step out of a right one.

    Returns:
        What is done, to which value, with which result.
    """
    right = operation.apply(value)
    assert right is not None
    kind = rng.choices(("tens", "units", "both", "number", "operation", "value"), (26, 26, 12, 14, 10, 12))[0]
    tens, units = divmod(right, 10)
    other_tens = rng.choice([t for t in (tens - 1, tens + 1) if 1 <= t <= 9])
    other_units = (units + rng.choice((-2, -1, 1, 2, rng.randint(1, 9)))) % 10
    other_units = other_units if other_units != units else (units + 1) % 10
    if kind == "tens":
        return operation, value, 10 * other_tens + units
    if kind == "units":
        return operation, value, 10 * tens + other_units
    if kind == "both":
        return operation, value, 10 * other_tens + other_units
    if kind == "operation":
        misread = rng.choice(others)
    elif kind == "number" and operation.kind not in NUMBERS:
        digits = list(str(operation.number))
        digits[rng.randrange(len(digits))] = str(rng.randint(1, 9))
        misread = replace(operation, number=int("".join(digits)))
    else:
        misread = operation
    read = value if misread != operation else rng.randint(LOWEST, HIGHEST)
    result = misread.apply(read)
    if result is None or (misread, read) == (operation, value):
        return operation, value, 10 * other_tens + units
    return misread, read, result


def written_answer(text: str) -> int | None:
    """The answer in a model's output, or None."""
    found = ANSWER.findall(text)
    return int(found[-1]) if found else None
