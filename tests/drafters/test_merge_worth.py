"""A source whose time matters is asked only while it earns that time."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from specdec.budgeting.ledger import LONGEST_PAUSE, PATIENCE, TRIAL_SHARE
from specdec.drafters import DraftContext
from specdec.drafters.merging.known import RATE, SourceWorth
from specdec.tree import TokenTree
from tests.drafters.merging import FakeClock, ScriptedDrafter, context_of, paths_of, paths_tree, session_of, step_of

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
        self.session = session_of(self.dear, self.cheap, clock=self.clock)

    def run(self, steps: int) -> int:
        """Runs steps; returns how often the dear source was asked."""
        before = self.dear.calls
        for _ in range(steps):
            tree = self.session.propose(context_of([9]), 16)
            paths = paths_of(tree)
            accepted = 0
            while accepted < len(RIGHT) - 1 and tuple(RIGHT[: accepted + 1]) in paths:
                accepted += 1
            self.clock.now += PASS
            self.session.observe(context_of([9, *RIGHT[: accepted + 1]]), step_of(tree, RIGHT[: accepted + 1]))
        return self.dear.calls - before


def test_source_that_is_never_right_is_hardly_asked() -> None:
    setting = Setting(dear_seconds=5.0)
    setting.run(50)
    calls = setting.run(1000)
    assert 1 <= calls <= 1000 / LONGEST_PAUSE + 2
    figures = setting.session.figures(context_of([9]))
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


def test_source_that_costs_nothing_to_speak_of_is_always_asked() -> None:
    setting = Setting(dear_seconds=0.9 * TRIAL_SHARE * PASS)
    setting.run(20)
    assert setting.run(100) == 100


def test_the_first_time_of_a_source_is_not_held_against_it() -> None:
    """In it, things are made ready: a prompt is read, loops are compiled."""
    worth = SourceWorth()
    for _ in range(PATIENCE + 1):
        worth.record(gain=0, seconds=100.0, step_tokens=1.0, step_seconds=10.0)
        worth.seconds = None
    assert worth.net == 0.0 and not worth.skips()


def test_one_stall_is_not_taken_for_the_usual() -> None:
    worth = SourceWorth(seconds=1.0)
    worth.record(gain=1, seconds=1000.0, step_tokens=2.0, step_seconds=10.0)
    assert worth.seconds == pytest.approx(1.3)
    assert worth.net > -1.0


@pytest.mark.parametrize(("seconds", "gains"), [((0.1, 0.2), (3, 0)), ((0.2, 0.1), (2, 1))])
def test_gain_is_what_cheaper_sources_do_not_bring(seconds: tuple[float, ...], gains: tuple[int, ...]) -> None:
    """Of three accepted tokens the first was proposed by both, the others by one alone."""

    def source(paths: dict[tuple[int, ...], float]) -> Callable[[DraftContext], TokenTree]:
        return lambda _: paths_tree(9, paths)

    one = ScriptedDrafter(source({(1,): 0.8, (1, 2): 0.8, (1, 2, 3): 0.8}), "one")
    two = ScriptedDrafter(source({(1,): 0.8, (1, 7): 0.8}), "two")
    session = session_of(one, two)
    for worth, taken in zip(session.known.sources, seconds, strict=True):
        worth.seconds = taken
    tree = session.propose(context_of([9]), 16)
    session.observe(context_of([9, 1, 2, 3, 5]), step_of(tree, [1, 2, 3, 5]))
    assert [worth.net for worth in session.known.sources] == pytest.approx([RATE * gain for gain in gains])


def test_of_two_sources_that_propose_the_same_one_is_kept() -> None:
    """Neither brings anything beside the other one; while one pauses, the other one brings all."""
    clock = FakeClock()
    same = [ScriptedDrafter(lambda _: tree_of(RIGHT, 0.9), name, clock, 2.0) for name in ("one", "two")]
    session, accepted = session_of(*same, clock=clock), 0
    for _ in range(400):
        tree = session.propose(context_of([9]), 16)
        new = RIGHT if tree.num_nodes > 1 else RIGHT[:1]
        accepted += len(new) - 1
        clock.now += PASS
        session.observe(context_of([9, *new]), step_of(tree, new))
    assert accepted > 0.9 * 400 * (len(RIGHT) - 1)
