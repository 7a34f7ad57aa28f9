"""What was learned of a draft model and its target: how often drafts were right, what drafting costs and brings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from specdec.drafters.small_model.depth import Pace
from specdec.drafters.small_model.lists import Kind
from specdec.kernels import Floats


@dataclass
class Learned:
    """Averages that fade; they hold no text.

    Args:
        counts: By kind of list how many drafts were tried and how many were right, by class of rank and of
            probability, `[rank classes, classes]` each.
        paces: By size of the batch, in powers of two, and whether tokens are sampled.
    """

    counts: dict[Kind, tuple[Floats, Floats]] = field(default_factory=dict)
    paces: dict[tuple[int, bool], Pace] = field(default_factory=dict)


_LEARNED: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[str, Learned]]] = WeakKeyDictionary()


def learned(draft_model: Any, target: Any, settings: dict[str, Any]) -> Learned:
    """What one drafter of these settings has learned, the next one knows."""
    by_target = _LEARNED.setdefault(draft_model, WeakKeyDictionary())
    return by_target.setdefault(target, {}).setdefault(str(settings), Learned())
