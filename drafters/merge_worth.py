"""Whether asking a source is worth its time."""

from __future__ import annotations

from bisect import bisect
from collections import deque
from collections.abc import Sequence
from math import inf
from statistics import median
from typing import Any, NamedTuple

SURENESS = (0.5, 1.5, 4.0)
"""Draft tokens per row that are expected of the other sources: a source's worth is learned apart between these."""
DEAR_SHARE = 0.05
"""A source that takes less of a step's time is asked without further thought."""
FIRST_WORTH = 0.2
"""Tokens that a source is thought to bring above its cost before it was tried."""
LEARNING_RATE = 0.1
IDLE_DECAY = 0.98
"""What is left, per step in which it is not asked, of the belief that a source does not pay: one good try is enough."""
TRIAL_SHARE = 0.01
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
        self.tokens_above_cost = [[FIRST_WORTH] * (len(SURENESS) + 1) for _ in range(num_sources + 1)]
        self.asked_at = [0.0] * (num_sources + 1)
        self.tokens_per_step = 1.0
        self.step_seconds: deque[float] = deque(maxlen=STEPS)
        self.usual_step = inf
        """Seconds of a step, as it usually is."""

    def knowledge(self) -> dict[str, Any]:
        """What was measured, ready for JSON."""
        usual = self.usual_step if self.step_seconds else None
        worth = {"seconds": self.seconds, "tokens_above_cost": self.tokens_above_cost}
        return worth | {"tokens_per_step": self.tokens_per_step, "usual_step": usual}

    @classmethod
    def of_knowledge(cls, known: dict[str, Any]) -> Worth:
        """Of what `knowledge` has told."""
        worth = cls(len(known["seconds"]) - 1)
        worth.seconds, worth.tokens_above_cost = known["seconds"], known["tokens_above_cost"]
        worth.tokens_per_step = known["tokens_per_step"]
        if known["usual_step"] is not None:
            worth.usual_step = known["usual_step"]
            worth.step_seconds.extend([worth.usual_step] * STEPS)
        return worth

    def is_dear(self, source: int) -> bool:
        """Whether a source takes a part of a step that matters."""
        seconds = self.seconds[source]
        return seconds is not None and seconds > DEAR_SHARE * self.usual_step

    def by_cost(self, sources: Sequence[int]) -> list[int]:
        """The sources, cheap ones first, and those last that have not been asked yet."""
        seconds = [inf if taken is None else taken for taken in self.seconds]
        return sorted(sources, key=seconds.__getitem__)

    def pays(self, source: int, now: float) -> bool:
        """Whether something that is done on top, under a number of its own, is worth its time, however short."""
        worth, seconds = self.tokens_above_cost[source], self.seconds[source]
        if seconds is None or worth[0] >= 0.0:
            return True
        worth[0] *= IDLE_DECAY
        return (now - self.asked_at[source]) * CHAIN_TRIAL_SHARE >= seconds

    def is_asked(self, source: int, sureness: int, now: float) -> bool:
        """Whether a source is to be asked.

        Args:
            source: Its number.
            sureness: Class of what is expected of those asked so far.
            now: In seconds.
        """
        seconds = self.seconds[source]
        if seconds is None or not self.is_dear(source) or self.tokens_above_cost[source][sureness] >= 0.0:
            return True
        self.tokens_above_cost[source][sureness] *= IDLE_DECAY
        return (now - self.asked_at[source]) * TRIAL_SHARE >= seconds

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
        self.usual_step = median(self.step_seconds)
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
            worth = self.tokens_above_cost[source]
            worth[sureness] += LEARNING_RATE * ((gain - seconds * price) / rows - worth[sureness])


def sureness_of(expected: float) -> int:
    """Class of the draft tokens that are expected per row."""
    return bisect(SURENESS, expected)
