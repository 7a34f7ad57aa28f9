"""The task of the reasoning example: problems and the answer checker."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.examples.scripts import imported


@pytest.fixture(scope="module")
def task() -> Iterator[ModuleType]:
    with imported(["reasoning"], ("task",)) as modules:
        yield modules["task"]


def test_problems_stay_in_range_and_are_the_same_each_time(task: ModuleType) -> None:
    problems = task.held_out_problems(50)
    assert problems == task.held_out_problems(50)
    assert len(set(map(str, problems))) == 50
    for problem in problems:
        assert 6 <= len(problem.operations) <= 9
        assert all(10 <= value <= 99 for value in problem.values)
        assert problem.answer == problem.values[-1]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("(a) 34+27=61.\n\n</think>\n\nThe result is 61.", 61),
        ("(a) 34+27=61.\n\nThe result is 61.", None),
        ("</think>\n\nThe result is", None),
        ("", None),
    ],
)
def test_the_answer_is_read_behind_the_thought(task: ModuleType, text: str, answer: int | None) -> None:
    assert task.written_answer(text) == answer
