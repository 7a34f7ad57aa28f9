"""A source whose time matters is asked only while it earns that time."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from specdec.drafters import DraftContext, MergedDrafter, Step
from specdec.drafters.merging.worth import TRIAL_SHARE, Asked, Worth, sureness_of
from specdec.tree import TokenTree
from tests.drafters.merging import FakeClock, ScriptedDrafter, context_of, merging, paths_of, paths_tree

PASS = 10.0
"""Seconds of a target pass, by the clock of these tests."""
RIGHT = [1, 2, 3, 4]
"""What the target picks in every step."""


def tree_of(tokens: list[int], score: float) -> TokenTree:
    return paths_tree(9, {tuple(tokens[: i + 1]): score for i in range(len(tokens))})


class Setting:
    """A cheap and a dear source, and a target that always picks the same.

    Args:
        dear_seconds: What asking the dear source takes.
    """

    def __init__(self, dear_seconds: float) -> None:
        self.clock = FakeClock()
        self.cheap_tokens: list[int] = [8]
        self.dear_tokens: list[int] = [8]
        self.cheap = ScriptedDrafter(lambda _: tree_of(self.cheap_tokens, 0.9), "cheap")
        self.dear = ScriptedDrafter(lambda _: tree_of(self.dear_tokens, 0.9), "dear", self.clock, dear_seconds)
        self.drafter: MergedDrafter = merging(self.dear, self.cheap)
        self.drafter._clock = self.clock

    def run(self, steps: int) -> int:
        """Runs steps; returns how often the dear source was asked."""
        before = self.dear.calls
        for _ in range(steps):
            tree = self.drafter.propose(context_of([9]), 16)
            paths = paths_of(tree)
            accepted = 0
            while accepted < len(RIGHT) - 1 and tuple(RIGHT[: accepted + 1]) in paths:
                accepted += 1
            self.clock.now += PASS
            self.drafter.observe(context_of([9, *RIGHT[: accepted + 1]]), Step([0], tree, [accepted]))
        return self.dear.calls - before


def test_source_that_is_never_right_is_hardly_asked() -> None:
    setting = Setting(dear_seconds=5.0)
    setting.run(50)
    calls = setting.run(1000)
    assert 1 <= calls <= 1000 * TRIAL_SHARE * PASS / 5.0 + 1
    figures = setting.drafter.figures(context_of([9]))
    assert figures["dear"]["skipped"] == 1050 - figures["dear"]["calls"]
    assert figures["cheap"]["skipped"] == 0
    assert figures["dear"]["seconds"] == pytest.approx(5.0 * figures["dear"]["calls"])


def test_source_that_earns_its_time_is_always_asked() -> None:
    setting = Setting(dear_seconds=5.0)
    setting.dear_tokens = RIGHT
    setting.run(50)
    assert setting.run(200) == 200


def test_source_that_is_right_but_too_dear_is_not_asked() -> None:
    setting = Setting(dear_seconds=50.0)
    setting.dear_tokens = RIGHT[:1]
    setting.run(50)
    assert setting.run(200) <= 10


def test_source_that_becomes_useful_is_asked_again_and_one_that_ceases_to_be_is_not() -> None:
    setting = Setting(dear_seconds=2.0)
    setting.run(100)
    assert setting.run(100) <= 10
    setting.dear_tokens = RIGHT
    setting.run(100)
    assert setting.run(100) == 100
    setting.dear_tokens = [8]
    setting.run(60)
    assert setting.run(100) <= 10


def test_source_that_only_repeats_a_cheap_one_is_not_worth_its_time() -> None:
    setting = Setting(dear_seconds=2.0)
    setting.dear_tokens = setting.cheap_tokens = RIGHT
    setting.run(100)
    assert setting.run(200) <= 12
    setting.cheap_tokens = [8]
    setting.run(60)
    assert setting.run(100) == 100


def test_source_is_asked_where_the_cheap_ones_are_not_sure() -> None:
    """In every other step the cheap source knows the answer; the dear one always does."""
    setting = Setting(dear_seconds=3.0)
    setting.dear_tokens = RIGHT
    asked = {True: 0, False: 0}
    for step in range(600):
        is_sure = step % 2 == 0
        setting.cheap_tokens = RIGHT if is_sure else []
        calls = setting.run(1)
        if step >= 300:
            asked[is_sure] += calls
    assert asked[False] == 150
    assert asked[True] < 50


def test_source_that_costs_nothing_to_speak_of_is_always_asked() -> None:
    setting = Setting(dear_seconds=0.05)
    setting.run(20)
    assert setting.run(100) == 100


def test_dear_sources_come_last_and_the_first_time_of_one_is_not_held_against_it() -> None:
    worth = Worth(3)
    asked = {0: Asked(3.0, 0, 0), 1: Asked(0.1, 0, 0)}
    for step in range(12):
        worth.observe(asked, 1, 1, 11.0 * step, 11.0 * step + 10.0)
    assert worth.by_cost([0, 1, 2]) == [1, 0, 2], "one that was never asked is asked last"
    assert worth.is_asked(2, 0, 0.0)
    assert not worth.is_asked(0, 0, 140.0)
    assert worth.is_asked(0, 0, 140.0 + 3.0 / TRIAL_SHARE)
    slow_start = Worth(1)
    slow_start.observe({0: Asked(100.0, 0, 0)}, 1, 1, 0.0, 110.0)
    assert slow_start.is_asked(0, 0, 111.0)


def test_sureness_is_told_apart_by_expected_tokens() -> None:
    assert [sureness_of(expected) for expected in (0.0, 0.4, 0.6, 2.0, 9.0)] == [0, 0, 1, 2, 3]


def test_gain_is_what_would_be_missing_without_the_source() -> None:
    """Of three accepted tokens the second was named by one source alone: without it, one would have been accepted."""

    def source(paths: dict[tuple[int, ...], float]) -> Callable[[DraftContext], TokenTree]:
        return lambda _: paths_tree(9, paths)

    one = ScriptedDrafter(source({(1,): 0.8, (1, 2): 0.8, (1, 2, 3): 0.8}), "one")
    two = ScriptedDrafter(source({(1,): 0.8, (1, 7): 0.8}), "two")
    drafter, clock = merging(one, two), FakeClock()
    drafter._clock = clock
    seen: list[dict[int, Asked]] = []

    class Watching(Worth):
        def observe(self, asked: dict[int, Asked], rows: int, tokens: int, started: float, now: float) -> None:
            seen.append(asked)
            assert (rows, tokens) == (1, 4)

    drafter._known[False].worths[1] = Watching(2)
    tree = drafter.propose(context_of([9]), 16)
    drafter.observe(context_of([9, 1, 2, 3, 5]), Step([0], tree, [3]))
    assert {source: asked.gain for source, asked in seen[0].items() if source < 2} == {0: 2, 1: 0}
