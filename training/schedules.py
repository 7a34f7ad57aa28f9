"""How learning rates and the weight of the heads' loss change over a run."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "cosine", "linear")
"""Of the learning rate, after the warm-up."""
HEADS_SCHEDULES = ("constant", "sine")
"""Of the heads' loss beside the model's own."""


def learning_rate_factor(schedule: str, step: int, steps: int, warmup_steps: int) -> float:
    """Factor on the learning rates of a step, from 0: a linear warm-up, then the schedule down to zero at `steps`."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return max(0.0, 1 - progress) if schedule == "linear" else 1.0


def heads_factor(schedule: str, step: int, steps: int) -> float:
    """Factor on the heads' loss of a step, from 0; `"sine"` is Medusa-2's warm-up sin(pi/2 * step/steps).

    The step in progress counts as done, because at factor zero the first step would give the heads no gradient.
    """
    return math.sin(math.pi / 2 * (step + 1) / steps) if schedule == "sine" else 1.0
