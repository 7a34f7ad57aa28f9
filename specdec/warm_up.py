"""Loads the compiled loops that every call runs, so that no call waits for them."""

from __future__ import annotations

import functools

import numpy as np

from specdec.budget import compile_kernels as compile_budget
from specdec.kernels import ancestors_and_depths, child_with, followed, is_valid, largest, largest_at, visible_slots


@functools.cache
def warm_up() -> None:
    """Loads loops from Numba's cache, or compiles them: once per process, at `accelerate`."""
    compile_budget()
    ids, parents = np.zeros((1, 2), np.int64), np.array([[-1, 0]])
    ancestors_and_depths(parents)
    visible_slots(parents, ids[0, :1].copy())
    is_valid(ids, parents, 1)
    child_with(ids[0], parents[0], 0, 0)
    followed(ids, parents, ids)
    values = np.zeros((1, 2, 2), np.float32)
    largest(values, 1)
    largest_at(values, 1, 1, parents)
