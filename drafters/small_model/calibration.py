"""How often a draft model's drafts are right, and whether one more level of a draft pays."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

import numpy as np

from specdec.drafters.small_model.growth import DraftNodes
from specdec.drafters.small_model.lists import Kind
from specdec.kernels import Floats, Ints

PROB_CLASSES = 16
"""Classes of the draft model's probability over which hits are counted. More follow it more closely, and need more
counts."""
RANK_CLASSES = 3
"""Ranks with counts of their own: the first, the second, and all others."""
MAX_DEPTH = 64
"""Depths with counts of their own."""
FIRST_HIT_RATE = 0.7
"""P(one of a node's children is right | it is right) before any is counted; raise it for deeper first drafts."""
RECENT_LEVELS = 9
"""Levels whose median time is that of the next; raise it to be moved less by outliers, and to follow changes later."""


class Counts(NamedTuple):
    """Decayed counts of one kind of list; see `growth.follow`."""

    tried: Floats
    hit: Floats
    by_depth: Floats


@dataclass
class Calibration:
    """What the calls of one drafter have learned. It holds no text.

    Args:
        prior_weight: How many counted lists the draft model's own probabilities are worth.
        memory: Lists after which a count is worth 1/e.
    """

    prior_weight: float
    memory: float
    counts: dict[Kind, Counts] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        self.decay = float(np.exp(-1.0 / self.memory))
        middles = (np.arange(PROB_CLASSES) + 0.5) / PROB_CLASSES
        self._prior = np.tile(middles**2, (RANK_CLASSES, 1))  # the classes are of the probability's root

    def of_kind(self, kind: Kind) -> Counts:
        """The counts of a kind of list. Change them under `lock` only."""
        with self.lock:
            empty = np.zeros_like(self._prior), np.zeros_like(self._prior), np.zeros((2, MAX_DEPTH))
            return self.counts.setdefault(kind, Counts(*empty))

    def rates(self, kind: Kind) -> Floats:
        """P(accepted | parent accepted) by class of rank and of probability, `[rank classes, classes]`."""
        tried, hit, _ = self.of_kind(kind)
        rates: Floats = (hit + self.prior_weight * self._prior) / (tried + self.prior_weight)
        return rates

    def hit_rates(self, kind: Kind) -> Floats:
        """P(one of a node's children is right | it is right) by the node's depth, `[depths]`."""
        tried, hit = self.of_kind(kind).by_depth
        rates: Floats = (hit + self.prior_weight * FIRST_HIT_RATE) / (tried + self.prior_weight)
        return rates


class LevelTimes:
    """Seconds of the levels of one call.

    Args:
        typical: Of a level; 0 before the first.
        spent: Since the last `begin`.
    """

    def __init__(self) -> None:
        self.typical = self.spent = 0.0
        self._recent: deque[float] = deque(maxlen=RECENT_LEVELS)

    def begin(self) -> None:
        """A draft begins."""
        self.spent = 0.0

    def observe(self, seconds: float) -> None:
        """Takes in a level."""
        self._recent.append(seconds)
        self.typical = median(self._recent)
        self.spent += seconds


def is_worth_a_level(
    nodes: DraftNodes,
    level: Ints,
    size: int,
    hit_rates: Floats,
    times: LevelTimes,
    step_seconds: tuple[Ints, Floats],
) -> bool:
    """Whether one more level should raise the tokens per second of this step.

    With `E` the tokens that the step should make without the level, in the seconds of the levels so far and of the
    target pass, and `g` what the level should add, it pays if `g / level seconds > E / those seconds`.

    Args:
        nodes: The draft so far.
        level: The nodes that would be fed, -1 at padding, `[rows, width]`.
        size: Nodes that are proposed at most.
        hit_rates: See `Calibration.hit_rates`.
        times: Of the levels.
        step_seconds: See `DraftContext`.
    """
    best = [np.sort(paths[1:count])[::-1][: size - 1] for paths, count in zip(nodes.paths, nodes.counts, strict=True)]
    expected = len(best) + sum(float(paths.sum()) for paths in best)
    at = level.clip(0)
    paths, depths = (np.take_along_axis(array, at, 1) for array in (nodes.paths, nodes.depths))
    gain = float((paths * hit_rates[depths.clip(max=len(hit_rates) - 1)] * (level >= 0)).sum())
    pass_seconds = float(np.interp(1 + max(map(len, best)), *step_seconds))
    return gain * (times.spent + pass_seconds) > expected * times.typical
