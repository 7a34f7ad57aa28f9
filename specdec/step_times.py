"""How long target passes take, by the number of nodes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from torch import nn

from specdec.kernels import Floats, Ints, seconds_of
from specdec.tree import NODE_BUCKETS, bucket_of

DRIFT = 0.0005
"""Share per step by which a size that seems dear comes nearer to one in use, so that it is tried again."""
UPDATES_PER_LOOK = 8
"""Steps between two looks at the sizes that are not in use."""
TRIALS = 2
"""Passes by which a size is timed: the first one may take longer."""
PATIENCE = 2.0
"""Seconds that go into trial passes in all; the sizes that are left are known once they have been used."""
FIRST_LENGTH = 1024
"""Tokens in the kv cache up to which step times count as the same; from there on they are told apart by doublings."""


class Surroundings(NamedTuple):
    """What step times are true for.

    Args:
        rows: Of the batch, a power of two.
        length: Tokens in the kv cache: 0 up to `FIRST_LENGTH`, one more for each doubling.
        is_sampled: Whether tokens are sampled, which takes its time at each node.
        manner: Where, in what type, and how the model runs.
    """

    rows: int
    length: int
    is_sampled: bool
    manner: str


class StepTimes:
    """Seconds a target pass takes by node count, for one model and its surroundings: timed, then kept up to date.

    Args:
        max_nodes: Largest node count of interest.
    """

    def __init__(self, max_nodes: int) -> None:
        self.buckets = [n for n in NODE_BUCKETS if n <= max_nodes]
        self.seconds: dict[int, float] = {}
        self.uses: Counter[int] = Counter()
        self.trials: dict[int, float] = {}
        """Seconds of trial passes."""
        self.extra = 0.0
        """Seconds by which real steps took longer than that, of late."""
        self.patience = PATIENCE
        """Seconds that may still go into trial passes."""
        self._until_look = 0
        self._known: tuple[Ints, Floats] | None = None

    def untimed(self, nodes: int) -> int | None:
        """The smallest size that is to be timed before so many nodes are verified, or None."""
        if len(self.seconds) == len(self.buckets) or (self.seconds and self.patience <= 0.0):
            return None
        upto = bucket_of(nodes, self.buckets)
        untimed = next((size for size in self.buckets if size <= upto and size not in self.seconds), None)
        return 1 if untimed is not None and 1 not in self.trials else untimed  # the two are to be compared

    def time(self, nodes: int, run: Callable[[int], None]) -> None:
        """Times one size by trial passes.

        Args:
            nodes: The size.
            run: One pass with this many nodes, ending when the device has finished.
        """
        started, taken = time.perf_counter(), float("inf")
        for _ in range(TRIALS):
            before = time.perf_counter()
            run(nodes)
            taken = min(taken, time.perf_counter() - before)
        self.patience -= time.perf_counter() - started
        self.trials[nodes] = taken
        if self.uses[nodes]:
            self.extra = max(self.seconds[nodes] - taken, 0.0)
        else:
            self.seconds[nodes] = taken + self.extra
        self._known = None

    def time_all(self, run: Callable[[int], None]) -> None:
        """Times all sizes, however long it takes."""
        for nodes in self.buckets:
            self.time(nodes, run)

    def take_over(self, before: StepTimes) -> None:
        """Supposes what is known of like surroundings; real steps tell what has changed."""
        self.seconds = {nodes: seconds for nodes, seconds in before.seconds.items() if nodes in self.buckets}
        self.trials, self.extra, self.patience = dict(before.trials), before.extra, before.patience
        self._known = None

    def known(self) -> tuple[Ints, Floats]:
        """Node counts whose time is known, ascending, and their seconds, `[sizes]` each."""
        if self._known is not None:
            return self._known
        sizes = sorted(self.seconds)
        times = [self.seconds[n] for n in sizes]
        # A larger tree cannot be cheaper; where it seems so, the smaller one's time had noise, which only ever adds.
        for i in range(len(times) - 2, -1, -1):
            times[i] = min(times[i], times[i + 1])
        self._known = np.array(sizes), np.array(times)
        return self._known

    def of(self, nodes: int) -> float:
        """Seconds of a pass over a tree of this size, at least; some size must be known."""
        return float(seconds_of(nodes, *self.known()))

    def update(self, nodes: int, seconds: float) -> None:
        """Takes in the time of a real step, faster while few of this size were seen.

        Sizes that were not used yet were timed without what comes before and after a pass, or in other surroundings;
        they are supposed to take as much longer as the others did of late.
        """
        bucket = bucket_of(nodes, self.buckets)
        old = self.seconds.setdefault(bucket, seconds)
        taken = min(seconds, 1.5 * old)
        new = self.seconds[bucket] = old + max(0.5 / (1 + self.uses[bucket]), 0.05) * (taken - old)
        self._known = None
        self.uses[bucket] += 1
        if bucket in self.trials:
            self.extra += 0.1 * (taken - self.trials[bucket] - self.extra)
        self._until_look -= 1
        if self._until_look >= 0:
            return
        self._until_look = UPDATES_PER_LOOK - 1
        for other in self.seconds:
            drift = UPDATES_PER_LOOK * DRIFT * (new - self.seconds[other]) if other > bucket else 0.0
            if self.uses[other] or other not in self.trials:
                self.seconds[other] += drift
            else:
                self.trials[other] += drift
                self.seconds[other] = max(self.trials[other] + self.extra, 0.5 * self.trials[other])


TIMES: WeakKeyDictionary[nn.Module, dict[Surroundings, StepTimes]] = WeakKeyDictionary()
"""What is known of each model."""


def times_of(model: nn.Module, at: Surroundings, max_nodes: int) -> StepTimes:
    """What is known of a model in some surroundings, at first what is known of the nearest other ones.

    Batches of another size, and another manner, are too far away.
    """
    known = TIMES.setdefault(model, {})
    if at not in known or known[at].buckets[-1] < max_nodes:
        near = [
            (other.is_sampled != at.is_sampled, abs(other.length - at.length), other)
            for other, times in known.items()
            if (other.rows, other.manner) == (at.rows, at.manner) and times.seconds
        ]
        times = StepTimes(max_nodes)
        if near:
            times.take_over(known[min(near)[-1]])
        known[at] = times
    return known[at]


def length_class(tokens: int) -> int:
    """The class of a kv cache of so many tokens; see `Surroundings`."""
    return max(-(-tokens // FIRST_LENGTH) - 1, 0).bit_length()


def size_class(rows: int) -> int:
    """Batch sizes are told apart by powers of two."""
    return 1 << (rows - 1).bit_length()
