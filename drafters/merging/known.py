"""What merged drafters have learned of a model: how often drafts were right, what each source brings and costs."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from specdec.drafters.merging.growth import DEPTH_CLASSES, SCORE_BINS
from specdec.drafters.merging.worth import Worth
from specdec.kernels import Floats

FEW_CALLS, MANY_CALLS = 8, 32
"""Calls of which a source that does not earn what it takes takes part in one, at first and at last."""


@dataclass
class Known:
    """What was learned of calls that sample, or of those that do not.

    Args:
        num_sources: How many are merged.
        tried: Nodes whose parent was accepted, by sources, depth and bin of score; see `grow_merged`.
        hit: Those among them that were accepted.
        worths: What each source brings and costs, by batch size.
        calls: So far.
        next_trial: The call in which all sources take part again.
        gap: Calls from there to the next one.
        lock: Held while counts are read or changed.
    """

    num_sources: int
    tried: Floats = field(init=False)
    hit: Floats = field(init=False)
    worths: dict[int, Worth] = field(default_factory=dict)
    calls: int = 0
    next_trial: int = FEW_CALLS
    gap: int = FEW_CALLS
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.tried = np.zeros((2**self.num_sources, DEPTH_CLASSES, SCORE_BINS))
        self.hit = np.zeros_like(self.tried)

    def worth(self, rows: int) -> Worth:
        """Batch sizes are told apart by powers of two."""
        size = 1 << (rows - 1).bit_length()
        if size not in self.worths:
            self.worths[size] = Worth(self.num_sources)
        return self.worths[size]

    def idle_sources(self, rows: int, sources: Iterable[int]) -> set[int]:
        """Those of some sources that take no part in the call that begins: they do not earn anything."""
        self.calls += 1
        idle = self.worth(rows).idle_among(sources)
        if not idle:
            self.next_trial, self.gap = self.calls + FEW_CALLS, FEW_CALLS
        elif self.calls >= self.next_trial:
            self.next_trial, self.gap = self.calls + self.gap, min(2 * self.gap, MANY_CALLS)
            return set()
        return idle

    def state_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        with self.lock:
            return {
                "tried": self.tried.tolist(),
                "hit": self.hit.tolist(),
                "worths": [[size, worth.state_dict()] for size, worth in self.worths.items()],
            }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `knowledge` has told."""
        with self.lock:
            self.tried[:], self.hit[:] = state["tried"], state["hit"]
            self.worths = {int(size): Worth.of_knowledge(known) for size, known in state["worths"]}


_KNOWN: WeakKeyDictionary[Any, dict[Hashable, dict[bool, Known]]] = WeakKeyDictionary()
"""By model and kind of drafter, sampled or not: what one drafter has learned, the next one knows."""


def known_of(model: Any, kind: Hashable, num_sources: int) -> dict[bool, Known]:
    """What is known of a model and a kind of merged drafter: of calls that sample (True) and of those that do not."""
    return _KNOWN.setdefault(model, {}).setdefault(kind, new_known(num_sources))


def new_known(num_sources: int) -> dict[bool, Known]:
    """Nothing, by whether calls sample."""
    return {is_sampled: Known(num_sources) for is_sampled in (False, True)}
