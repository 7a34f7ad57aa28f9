"""How long target passes take, by the number of nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from torch import nn

from specdec.budgeting.priors import Entry, first_seconds, load_entries, save_entries
from specdec.kernels import Floats, Ints
from specdec.tree import NODE_BUCKETS, bucket_of

DRIFT = 0.0005
"""Share per step by which the time of a larger, unused size moves towards that of the size in use; raise it to retry
expensive sizes earlier."""
CLIP = 1.5
"""Clips outlier step times to this multiple of the expected time."""
LEAST_RATE = 0.05
"""Learning rate of the moving average of step times, once that many steps were averaged."""
FIRST_LENGTH = 1024
"""Largest kv cache, in tokens, of the first length class; each further class doubles it."""


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
    """Seconds of a target pass by node count, for one model and its surroundings.

    Starts from a prior and learns from real steps alone. A size that was not measured yet takes its prior time, times
    the ratio of measured to prior time at the sizes around it.

    Args:
        max_nodes: Largest node count of interest.
        prior: Seconds by node count; None for flat times of unknown scale.
        is_guess: The prior's scale is a guess, which the first real step replaces.
    """

    def __init__(self, max_nodes: int, prior: Mapping[int, float] | None = None, is_guess: bool = True) -> None:
        self.buckets = [n for n in NODE_BUCKETS if n <= max_nodes]
        self.seconds: dict[int, float] = {}
        """Measured, by node count."""
        self.uses: Counter[int] = Counter()
        """Real steps seen in this process."""
        self.is_known = prior is not None
        self._is_guess = is_guess or prior is None
        self.prior = {n: 1.0 if prior is None else prior[n] for n in self.buckets}
        self._known: tuple[Ints, Floats] | None = None

    def known(self) -> tuple[Ints, Floats]:
        """All node counts, ascending, and their expected seconds, `[sizes]` each."""
        if self._known is None:
            times = np.array([self.prior[n] for n in self.buckets])
            if measured := [n for n in self.buckets if n in self.seconds]:
                ratios = [self.seconds[n] / self.prior[n] for n in measured]
                times *= np.interp(np.log2(self.buckets), np.log2(measured), ratios)
            # A larger tree cannot be cheaper; where it seems so, the smaller one's time had noise, which only adds.
            times = np.minimum.accumulate(times[::-1])[::-1].copy()
            self._known = np.array(self.buckets), times
        return self._known

    def of(self, nodes: int) -> float:
        """Expected seconds of a pass over a tree of this size."""
        sizes, seconds = self.known()
        return float(np.interp(np.log2(nodes), np.log2(sizes), seconds))

    def update(self, nodes: int, seconds: float) -> None:
        """Learns from the time of a real step: the mean of the first ones, then a moving average.

        The first step of a size in a process may have to prepare kernels. It is left out, unless even the scale of the
        times is unknown.
        """
        bucket = bucket_of(nodes, self.buckets)
        self.uses[bucket] += 1
        if self._is_guess:
            self.prior = {n: prior * seconds / self.prior[bucket] for n, prior in self.prior.items()}
            self.is_known, self._is_guess = True, False
        elif self.uses[bucket] > 1:
            old = float(self.known()[1][self.buckets.index(bucket)])
            rate = max(1.0 / (self.uses[bucket] - 1), LEAST_RATE)
            self.seconds[bucket] = old + rate * (min(seconds, CLIP * old) - old)
        self._known = None
        for times in (self.seconds, self.prior):  # what was slow once is tried again
            for other in times:
                if other > bucket and bucket in times:
                    times[other] += DRIFT * (times[bucket] - times[other])


TIMES: WeakKeyDictionary[nn.Module, dict[Surroundings, StepTimes]] = WeakKeyDictionary()
"""What is known of each model."""


def times_of(model: nn.Module, at: Surroundings, max_nodes: int) -> StepTimes:
    """What is known of a model in some surroundings, at first what is known of the nearest other ones.

    The first time a model is asked about, what earlier processes have measured is read. Batches of another size, and
    another manner, are too far away to be compared: their times start from the shape of this kind of device.
    """
    if model not in TIMES:
        TIMES[model] = _earlier_times(model)
    known = TIMES[model]
    if at not in known or known[at].buckets[-1] < max_nodes:
        near = [
            (other.is_sampled != at.is_sampled, abs(other.length - at.length), other)
            for other, times in known.items()
            if (other.rows, other.manner) == (at.rows, at.manner) and times.is_known
        ]
        prior, is_guess = first_seconds(model, at.rows, max_nodes), not near
        if near:
            nearest = known[min(near)[-1]]
            sizes, seconds = nearest.known()
            prior = first_seconds(model, at.rows, max(max_nodes, int(sizes[-1])))
            scale = float(seconds[-1]) / prior[int(sizes[-1])]
            prior = {n: scale * taken for n, taken in prior.items()} | dict(
                zip(sizes.tolist(), seconds.tolist(), strict=True)
            )
        known[at] = StepTimes(max_nodes, prior, is_guess)
    return known[at]


def _earlier_times(model: nn.Module) -> dict[Surroundings, StepTimes]:
    """What earlier processes have measured."""
    known = {}
    for (rows, length, is_sampled, manner), seconds in load_entries(model):
        largest = max(
            (n for n in NODE_BUCKETS if set(NODE_BUCKETS[: NODE_BUCKETS.index(n) + 1]) <= set(seconds)), default=0
        )
        if largest:
            at = Surroundings(int(rows), int(length), bool(is_sampled), str(manner))
            known[at] = StepTimes(largest, seconds, is_guess=False)
    return known


def keep_times(model: nn.Module) -> None:
    """Writes what is known of a model to the user's cache, for later processes."""
    entries: list[Entry] = []
    for at, times in TIMES.get(model, {}).items():
        if times.uses:
            sizes, seconds = times.known()
            entries.append((list(at), dict(zip(sizes.tolist(), seconds.tolist(), strict=True))))
    if entries:
        save_entries(model, entries)


def length_class(tokens: int) -> int:
    """The class of a kv cache of so many tokens; see `Surroundings`."""
    return max(-(-tokens // FIRST_LENGTH) - 1, 0).bit_length()


def size_class(rows: int) -> int:
    """Batch sizes are told apart by powers of two."""
    return 1 << (rows - 1).bit_length()
