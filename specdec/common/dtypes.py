"""In which precision a model is fastest on this CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from specdec.compat import CACHE

CONTEXT = 64
"""Tokens of context of the passes that are timed."""
PASSES = 6
"""Timed passes per precision, after two that are not; more make the choice surer and the start slower."""


def seconds_per_pass(model: Any) -> float:
    """Median time of a pass over one token."""
    from transformers import DynamicCache

    ids = torch.arange(3, 3 + CONTEXT, device=model.device)[None]
    cache, times = DynamicCache(config=model.config), []
    with torch.inference_mode():
        model(ids, **{CACHE: cache})
        for _ in range(PASSES + 2):
            start = time.perf_counter()
            model(ids[:, :1], **{CACHE: cache})
            times.append(time.perf_counter() - start)
    return median(times[2:])


def fastest(
    load: Callable[[str], Any], names: tuple[str, ...] = ("float32", "bfloat16")
) -> tuple[Any, dict[str, float]]:
    """Loads a model in each precision and keeps the fastest.

    Args:
        load: Returns the model in a precision, by its name.
        names: Precisions to time.

    Returns:
        The model, and milliseconds per pass by precision, the fastest first.
    """
    best: Any = None
    times: dict[str, float] = {}
    for name in names:
        model = load(name)
        times[name] = seconds_per_pass(model) * 1e3
        if times[name] == min(times.values()):
            best = model
    return best, dict(sorted(times.items(), key=lambda item: item[1]))
