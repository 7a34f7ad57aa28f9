"""What is learned of drafts: how often a score is right, and whether asking for them pays."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
from torch import nn

from specdec.kernels import Floats

SCORE_BINS = 12
"""Bins that scores are counted in; more of them tell scores apart more finely, and learn more slowly."""
PATIENCE = 4
"""Pause after this many unprofitable drafts in a row; raise it to look longer before giving up."""
LONGEST_PAUSE = 128
"""Longest pause, in steps; raise it to spend less on hopeless text and to notice later that it has changed."""
TRIAL_SHARE = 0.004
"""Share of the time that trials may take: the bound of a pause is a trial's cost over this. Raise it to retry earlier.
What costs less than this share of a step is never paused."""


@dataclass
class Backoff:
    """Pauses what does not pay, for a number of steps that doubles; a profitable draft ends it.

    Args:
        losses: Unprofitable drafts in a row.
        pause: Steps that are still skipped.
    """

    losses: int = 0
    pause: int = 0

    def skips(self) -> bool:
        """Whether the step that begins is skipped."""
        if self.pause == 0:
            return False
        self.pause -= 1
        return True

    def record(self, lost: float) -> None:
        """Takes in a draft.

        Args:
            lost: What it cost above what it brings, in plain steps; 0 for a profitable one.
        """
        if lost <= 0.0:
            self.losses = 0
            return
        self.losses += 1
        if self.losses >= PATIENCE:
            self.pause = min(2 ** min(self.losses - PATIENCE, 10), int(lost / TRIAL_SHARE), LONGEST_PAUSE)

    def begin_call(self) -> None:
        """Allows one draft at once: another prompt may be another matter."""
        self.losses, self.pause = min(self.losses, PATIENCE), 0


@dataclass
class Learned:
    """What was counted of one kind of call.

    Args:
        tried: Drafts whose parent was accepted, by bin of their score, `[bins]`.
        hit: Those among them that were accepted, `[bins]`.
        backoff: Whether drafting pauses.
    """

    tried: Floats = field(default_factory=lambda: np.zeros(SCORE_BINS))
    hit: Floats = field(default_factory=lambda: np.zeros(SCORE_BINS))
    backoff: Backoff = field(default_factory=Backoff)


LEARNED: WeakKeyDictionary[nn.Module, dict[tuple[Hashable, tuple[Hashable, ...], bool], Learned]] = WeakKeyDictionary()
"""By owner, kind of call, and whether it samples: what one budget has learned of a model, the next one knows."""
