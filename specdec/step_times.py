"""How long target passes take, by their number of nodes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import numpy as np

from specdec.kernels import Floats, Ints, seconds_of
from specdec.tree import NODE_BUCKETS, bucket_of

DRIFT = 0.0005
"""Share per step by which a size that seems dear comes nearer to one in use, so that it is tried again."""
UPDATES_PER_LOOK = 8
"""Steps between two looks at the sizes that are not in use."""


class StepTimes:
    """Seconds a target pass takes by node count, for one model and batch size: measured, then kept up to date.

    Args:
        max_nodes: Largest node count of interest.
    """

    def __init__(self, max_nodes: int) -> None:
        self.buckets = [n for n in NODE_BUCKETS if n <= max_nodes]
        self.seconds: dict[int, float] = {}
        self.uses: Counter[int] = Counter()
        self.measured: dict[int, float] = {}
        """What was known of each size before the first real step."""
        self.extra = 0.0
        """Seconds by which real steps took longer than that."""
        self._until_look = 0
        self._known: tuple[Ints, Floats] | None = None

    def measure(self, run: Callable[[int], None], patience: float = 2.0) -> None:
        """Times `run(nodes)` for the buckets, a few rounds, as long as `patience` seconds are not used up.

        Args:
            run: One pass with this many nodes, ending when the device has finished.
            patience: Seconds after which the rest is interpolated.
        """
        start = time.perf_counter()
        run(self.buckets[-1])  # warm-up
        for _ in range(3):
            for nodes in sorted(self.buckets, key=lambda n: (n not in (1, 8, self.buckets[-1]), n)):
                before = time.perf_counter()
                run(nodes)
                taken = time.perf_counter() - before
                self.seconds[nodes] = min(taken, self.seconds.get(nodes, taken))
                self._known = None
                if time.perf_counter() - start > patience and len(self.seconds) > 1:
                    return

    def measure_change(self, run: Callable[[int], None], before: StepTimes) -> None:
        """Takes over what is known at another length of the kv cache, and times what has changed.

        A longer cache adds something to every pass, and something for each node, so that two sizes tell all others.

        Args:
            run: One pass with this many nodes, ending when the device has finished.
            before: Times of the same sizes.
        """
        old = StepTimes(self.buckets[-1])
        old.seconds = {**before.seconds, **before.measured}
        ends = self.buckets[0], self.buckets[-1]
        taken: dict[int, list[float]] = {nodes: [] for nodes in ends}
        for nodes in 2 * ends:
            started = time.perf_counter()
            run(nodes)
            taken[nodes].append(time.perf_counter() - started)
        change = [min(taken[nodes]) - old.of(nodes) for nodes in ends]
        for nodes in self.buckets:
            self.seconds[nodes] = max(old.of(nodes) + float(np.interp(nodes, ends, change)), min(taken[ends[0]]))
        self._known = None

    def known(self) -> tuple[Ints, Floats]:
        """Node counts that were measured, ascending, and their seconds, `[sizes]` each."""
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
        """Seconds of a pass over a tree of this size; some size must have been measured."""
        return float(seconds_of(nodes, *self.known()))

    def update(self, nodes: int, seconds: float) -> None:
        """Takes in the time of a real step, faster while few of this size were seen.

        Sizes that were not used yet were measured without what comes before and after a pass; they are supposed to take
        as much longer than measured as the others did of late.
        """
        bucket = bucket_of(nodes, self.buckets)
        old = self.seconds.setdefault(bucket, seconds)
        if len(self.measured) < len(self.seconds):
            self.measured = {**self.seconds, **self.measured}
        taken = min(seconds, 1.5 * old)
        new = self.seconds[bucket] = old + max(0.3 / (1 + self.uses[bucket]), 0.05) * (taken - old)
        self._known = None
        self.uses[bucket] += 1
        self.extra += 0.1 * (taken - self.measured[bucket] - self.extra)
        self._until_look -= 1
        if self._until_look >= 0:
            return
        self._until_look = UPDATES_PER_LOOK - 1
        for other in self.seconds:
            drift = UPDATES_PER_LOOK * DRIFT * (new - self.seconds[other]) if other > bucket else 0.0
            if self.uses[other]:
                self.seconds[other] += drift
            else:
                self.measured[other] += drift
                self.seconds[other] = max(self.measured[other] + self.extra, 0.5 * self.measured[other])
