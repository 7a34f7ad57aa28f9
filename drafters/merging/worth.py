"""Whether asking a source is worth its time."""

from __future__ import annotations

from bisect import bisect
from collections import deque
from collections.abc import Iterable, Sequence
from math import inf
from typing import Any, NamedTuple

SURENESS = (0.5, 1.5, 4.0)
"""Draft tokens per row that are expected of the other sources: a source's worth is learned apart between these."""
DEAR_SHARE = 0.01
"""A source that takes less of a step's time is asked without further thought."""
HEAVY_SHARE = 0.2
"""One that takes more than so much of it, and does not earn it, takes no part in most calls: it learns nothing then."""
FIRST_WORTH = 0.1
"""Tokens that a source is thought to bring above its cost before it was tried."""
LEARNING_RATE = 0.1
FIRST_STANDING, STANDING_RATE = 0.01, 0.4
"""Share of a call's time that a source is thought to save, above what it takes, before one was seen; learning rate."""
STANDING_SHARE = 0.005
"""Share of the time of a call that it takes to keep a source ready which wants to know more than tokens."""
IDLE_DECAY = 0.98
"""What is left, per step in which it is not asked, of the belief that a source does not pay: one good try is enough."""
TRIAL_SHARE = 0.004
"""Share of the time that goes into asking a source that does not pay, to see when it does again."""
CHAIN_TRIAL_SHARE = 0.002
STEPS = 9
"""Steps over which the usual time of one is taken."""


class Asked(NamedTuple):
    """A source that was asked.

    Args:
        seconds: What it took.
        sureness: Class of what was expected of the others.
        gain: Tokens that were accepted because of it, over all rows.
    """

    seconds: float
    sureness: int
    gain: int


class Worth:
    """What asking each source costs and brings at one batch size: measured, with decay.

    A source brings the tokens that would not have been accepted if it had named nothing, and costs those that could
    have been made in its time. Which of them is more is learned apart for steps in which the other sources are sure of
    themselves and for those in which they are not.

    Args:
        num_sources: How many there are. The number after theirs is that of going on behind leaves.
    """

    def __init__(self, num_sources: int) -> None:
        self.seconds: list[float | None] = [None] * (num_sources + 1)
        self.tokens_above_cost: list[list[float | None]] = [
            [None] * (len(SURENESS) + 1) for _ in range(num_sources + 1)
        ]
        """By source and class of sureness; None where it was not asked yet."""
        self.standings = [FIRST_STANDING] * num_sources
        """By source the share of a call's time that it saves, above what it takes, with decay."""
        self.idle: set[int] = set()
        """Sources that take no part in calls, but for a trial now and then."""
        self.asked_at = [0.0] * (num_sources + 1)
        self.tokens_per_step = 1.0
        self.step_seconds: deque[float] = deque(maxlen=STEPS)
        self.usual_step = inf
        """Seconds of a step, as it usually is."""

    def state_dict(self) -> dict[str, Any]:
        """What was measured, ready for JSON."""
        usual = self.usual_step if self.step_seconds else None
        names = ("seconds", "tokens_above_cost", "standings")
        worth = {name: getattr(self, name) for name in names}
        return worth | {"tokens_per_step": self.tokens_per_step, "usual_step": usual}

    @classmethod
    def of_knowledge(cls, known: dict[str, Any]) -> Worth:
        """Of what `knowledge` has told."""
        worth = cls(len(known["seconds"]) - 1)
        worth.seconds, worth.tokens_above_cost = known["seconds"], known["tokens_above_cost"]
        worth.standings = known["standings"]
        worth.idle = {source for source, standing in enumerate(worth.standings) if standing < 0.0}
        worth.tokens_per_step = known["tokens_per_step"]
        if known["usual_step"] is not None:
            worth.usual_step = known["usual_step"]
            worth.step_seconds.extend([worth.usual_step] * STEPS)
        return worth

    def idle_among(self, sources: Iterable[int]) -> set[int]:
        """Those of some sources that do not earn what they take.

        They become idle one by one, the worst first: of tokens that two of them have named, neither was the only one,
        and what the other one brings is another matter afterwards.
        """
        losing = {source for source in sources if self.standings[source] < 0.0}
        self.idle &= losing
        if found := losing - self.idle:
            self.idle.add(min(found, key=self.standings.__getitem__))
            for source in found - self.idle:
                self.standings[source] = 0.0
        return set(self.idle)

    def is_dear(self, source: int, share: float = DEAR_SHARE) -> bool:
        """Whether a source takes a part of a step that matters."""
        seconds = self.seconds[source]
        return seconds is not None and seconds > share * self.usual_step

    def by_cost(self, sources: Sequence[int]) -> list[int]:
        """The sources, cheap ones first, and those last that have not been asked yet."""
        seconds = [inf if taken is None else taken for taken in self.seconds]
        return sorted(sources, key=seconds.__getitem__)

    def expected(self, source: int, sureness: int) -> float:
        """Tokens above cost of asking a source; where the others are surer, not more than where they are less sure."""
        worth = self.tokens_above_cost[source]
        for at in range(sureness, -1, -1):
            if (known := worth[at]) is not None:
                return known if at == sureness else min(known, FIRST_WORTH)
        return FIRST_WORTH

    def pays(self, source: int, now: float) -> bool:
        """Whether something that is done on top, under a number of its own, is worth its time, however short."""
        seconds = self.seconds[source]
        return seconds is None or self._pays(source, 0, seconds, CHAIN_TRIAL_SHARE, now)

    def is_asked(self, source: int, sureness: int, now: float) -> bool:
        """Whether a source is to be asked.

        Args:
            source: Its number.
            sureness: Class of what is expected of those asked so far.
            now: In seconds.
        """
        seconds = self.seconds[source]
        return seconds is None or not self.is_dear(source) or self._pays(source, sureness, seconds, TRIAL_SHARE, now)

    def _pays(self, source: int, sureness: int, seconds: float, share: float, now: float) -> bool:
        expected = self.expected(source, sureness)
        if expected >= 0.0:
            return True
        self.tokens_above_cost[source][sureness] = IDLE_DECAY * expected
        return (now - self.asked_at[source]) * share >= seconds

    def observe(self, asked: dict[int, Asked], rows: int, tokens: int, started: float, now: float) -> None:
        """Takes in a step.

        Args:
            asked: What was asked, by number.
            rows: Rows of the batch.
            tokens: Tokens that were committed, over all rows.
            started: When the step began, in seconds.
            now: When it was over.
        """
        self.step_seconds.append(now - started)
        self.usual_step = sorted(self.step_seconds)[len(self.step_seconds) // 2]
        self.tokens_per_step += LEARNING_RATE * (tokens - self.tokens_per_step)
        price = self.tokens_per_step / max(self.usual_step, 1e-9)
        for source, (seconds, sureness, gain) in asked.items():
            self.asked_at[source] = now
            before = self.seconds[source]
            if before is None:  # the first time, in which things are made ready
                self.seconds[source] = seconds
                continue
            seconds = min(seconds, 4 * before)  # one stall is not taken for the usual
            usual = before + LEARNING_RATE * (seconds - before)
            self.seconds[source] = min(seconds, usual) if len(self.step_seconds) < STEPS else usual
            above_cost = (gain - seconds * price) / rows
            expected = self.expected(source, sureness)
            self.tokens_above_cost[source][sureness] = expected + LEARNING_RATE * (above_cost - expected)

    def close_call(self, source: int, saved: float, taken: float) -> None:
        """Takes in a call that is over.

        Args:
            source: One that took part.
            saved: Share of the call's time that was saved by tokens which no other source had named.
            taken: Share of the call's time that went into asking it.
        """
        self.standings[source] += STANDING_RATE * (saved - taken - STANDING_SHARE - self.standings[source])


def sureness_of(expected: float) -> int:
    """Class of the draft tokens that are expected per row."""
    return bisect(SURENESS, expected)
