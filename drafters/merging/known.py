"""What merged drafters have learned of a model: how often drafts were right, what each source brings and costs."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field
from math import inf
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from specdec.budgeting.ledger import Backoff
from specdec.drafters.merging.growth import DEPTH_CLASSES, SCORE_BINS
from specdec.kernels import Floats, Ints

RATE = 0.1
"""Learning rate of times and gains per step: a memory of about ten steps. Raise it to follow changes faster."""
CLIP = 4.0
"""Clips outlier times to this multiple of the usual one."""
IDLE_DECAY = 0.98
"""Factor on a source's loss per step in which it is not asked; lower it for one good draft to bring the source back."""


def moving_mean(before: float | None, value: float) -> float:
    """A moving average, its outliers clipped; the first value as it is."""
    return value if not before else before + RATE * (min(value, CLIP * before) - before)


@dataclass
class SourceWorth:
    """Whether asking a source pays.

    Args:
        net: Accepted tokens per draft that no cheaper source would have brought, minus those that could have been
            generated in the time that it takes; a moving average.
        seconds: Of a draft, as usual; None before the first one.
        backoff: Whether the source is paused.
    """

    net: float = 0.0
    seconds: float | None = None
    backoff: Backoff = field(default_factory=Backoff)

    def skips(self) -> bool:
        """Whether the source is left out of the step that begins."""
        if skipped := self.backoff.skips():
            self.net *= IDLE_DECAY
        return skipped

    def record(self, gain: int, seconds: float, step_tokens: float, step_seconds: float) -> None:
        """Takes in a draft.

        Args:
            gain: Accepted tokens that no cheaper source would have brought.
            seconds: What it took.
            step_tokens: Tokens of a step, as usual.
            step_seconds: Time of a step, as usual.
        """
        if self.seconds is None:  # the first time, in which things are made ready
            self.seconds = seconds
            return
        self.seconds = moving_mean(self.seconds, seconds)
        steps = min(seconds, CLIP * self.seconds) / max(step_seconds, 1e-9)
        self.net += RATE * (gain - steps * step_tokens - self.net)
        self.backoff.record(steps if self.net < 0.0 else 0.0)


@dataclass
class Known:
    """What was learned of calls that sample, or of those that do not.

    Args:
        num_sources: How many are merged.
        tried: Nodes whose parent was accepted, by sources, depth and bin of score; see `grow_merged`.
        hit: Those among them that were accepted.
        sources: By source whether it pays.
        step_tokens: Tokens of a step over all rows, as usual.
        step_seconds: Time of a step, as usual; None before the first one.
        lock: Held while counts are read or changed.
    """

    num_sources: int
    tried: Floats = field(init=False)
    hit: Floats = field(init=False)
    sources: list[SourceWorth] = field(init=False)
    step_tokens: float = 1.0
    step_seconds: float | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.tried = np.zeros((2**self.num_sources, DEPTH_CLASSES, SCORE_BINS))
        self.hit = np.zeros_like(self.tried)
        self.sources = [SourceWorth() for _ in range(self.num_sources)]

    def by_cost(self) -> Ints:
        """The sources, cheap ones first, and those last that have not been asked yet."""
        seconds = [inf if source.seconds is None else source.seconds for source in self.sources]
        return np.array(sorted(range(self.num_sources), key=seconds.__getitem__))

    def record(self, gains: dict[int, tuple[int, float]], tokens: int, seconds: float) -> None:
        """Takes in a step.

        Args:
            gains: By source that was asked: see `follow_merged`, and the seconds of its draft.
            tokens: Committed, over all rows.
            seconds: From the proposal to here.
        """
        self.step_seconds = moving_mean(self.step_seconds, seconds)
        self.step_tokens += RATE * (tokens - self.step_tokens)
        for source, (gain, taken) in gains.items():
            self.sources[source].record(gain, taken, self.step_tokens, self.step_seconds)

    def state_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        with self.lock:
            return {
                "tried": self.tried.tolist(),
                "hit": self.hit.tolist(),
                "sources": [[source.net, source.seconds] for source in self.sources],
                "step": [self.step_tokens, self.step_seconds],
            }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict()` returned."""
        with self.lock:
            self.tried[:], self.hit[:] = state["tried"], state["hit"]
            self.sources = [SourceWorth(net, seconds) for net, seconds in state["sources"]]
            self.step_tokens, self.step_seconds = state["step"]


_KNOWN: WeakKeyDictionary[Any, dict[Hashable, dict[bool, Known]]] = WeakKeyDictionary()
"""By model and kind of drafter, sampled or not: what one drafter has learned, the next one knows."""


def known_of(model: Any, kind: Hashable, num_sources: int) -> dict[bool, Known]:
    """What is known of a model and a kind of merged drafter: of calls that sample (True) and of those that do not."""
    return _KNOWN.setdefault(model, {}).setdefault(kind, new_known(num_sources))


def new_known(num_sources: int) -> dict[bool, Known]:
    """Nothing, by whether calls sample."""
    return {is_sampled: Known(num_sources) for is_sampled in (False, True)}
