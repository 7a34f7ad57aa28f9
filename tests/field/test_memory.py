"""What one call teaches the next, and never another wrapper."""

from __future__ import annotations

from typing import Any

import pytest

import specdec
from specdec.budget import Budget
from specdec.drafters import LookaheadDrafter
from tests.generate.common import SINGLE
from tests.tiny_models import tiny_model

NEW = 24


def accepted(fast: specdec.SpeculativeModel) -> list[int]:
    """Accepted tokens of two calls with one prompt."""
    found = []
    for _ in range(2):
        fast.generate(**SINGLE, max_new_tokens=NEW)
        found.append(fast.report.num_accepted_tokens)
    return found


@pytest.mark.parametrize("drafter", ["lookahead", "auto", ["lookahead", "recycling"]])
def test_a_call_forgets_or_the_wrapper_remembers(drafter: Any) -> None:
    first, second = accepted(specdec.accelerate(tiny_model(), drafter, budget=Budget(64, fixed=True)))
    assert second > first
    forgets = specdec.accelerate(tiny_model(), drafter, memory="call", budget=Budget(64, fixed=True))
    assert max(accepted(forgets)) < second
    another = specdec.accelerate(tiny_model(), drafter, budget=Budget(64, fixed=True))
    assert accepted(another)[0] < second, "wrappers share nothing"


def test_what_was_in_the_memory_is_not_shown_to_calls_that_forget() -> None:
    drafter = LookaheadDrafter()
    answer = specdec.accelerate(tiny_model(), drafter).generate(**SINGLE, max_new_tokens=NEW)
    told = specdec.accelerate(tiny_model(), drafter, budget=Budget(64, fixed=True))
    forgets = specdec.accelerate(tiny_model(), drafter, memory="call", budget=Budget(64, fixed=True))
    assert accepted(told)[0] > accepted(forgets)[0]
    assert forgets.generate(**SINGLE, max_new_tokens=NEW).tolist() == answer.tolist()
    speculation = specdec.speculate(drafter, memory="call")
    tiny_model().generate(**SINGLE, max_new_tokens=NEW, custom_generate=speculation)
    assert speculation.drafter is drafter


def test_other_words_are_refused() -> None:
    with pytest.raises(ValueError, match="memory='thread' is not known; use 'process' or 'call'"):
        specdec.accelerate(tiny_model(), memory="thread")  # type: ignore[arg-type]
