"""Which windows each step trains on: a function of the seed alone, so that a resumed run repeats nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

WINDOW = "window_index"
"""Column of training windows: the number of each."""
Batch = Mapping[str, Tensor]
"""Columns of packed windows, `[batch, window]` each."""


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(count)


@dataclass(frozen=True)
class BatchPlan:
    """The order of the windows.

    A step takes `accumulation` batches in each of `num_processes` processes. Epochs follow each other without a gap;
    each has an order of its own.

    Args:
        num_windows: Windows per epoch.
        batch_size: Windows per batch and process.
        accumulation: Batches per step and process.
        num_processes: Processes that share a step.
        seed: Of the order.
    """

    num_windows: int
    batch_size: int
    accumulation: int = 1
    num_processes: int = 1
    seed: int = 0

    @property
    def windows_per_step(self) -> int:
        """Over all processes."""
        return self.batch_size * self.accumulation * self.num_processes

    def steps(self, epochs: float) -> int:
        """Steps per run; the last one is filled up from the next epoch."""
        return max(1, -int(-epochs * self.num_windows // self.windows_per_step))

    def batch(self, step: int, part: int, process: int) -> list[int]:
        """Windows of one batch of a step."""
        first = step * self.windows_per_step + (part * self.num_processes + process) * self.batch_size
        places = [divmod(number, self.num_windows) for number in range(first, first + self.batch_size)]
        return [int(_order(self.seed, epoch, self.num_windows)[place]) for epoch, place in places]


def training_batches(
    windows: Any, plan: BatchPlan, process: int, steps: range, workers: int = 0
) -> Iterator[list[dict[str, Tensor]]]:
    """The batches of each step of this process.

    Args:
        windows: What `pack` returned.
        plan: The order.
        process: Number of this process.
        steps: Which steps.
        workers: Processes that read ahead.
    """
    # With a generator of its own, the loader draws nothing from the global one, whose state a checkpoint keeps.
    loader: DataLoader[Any] = DataLoader(
        windows.with_format("torch"),
        batch_sampler=[plan.batch(step, part, process) for step in steps for part in range(plan.accumulation)],
        num_workers=workers,
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )
    batches = iter(loader)
    return iter(lambda: list(islice(batches, plan.accumulation)), [])


def evaluation_batches(windows: Any, batch_size: int, process: int, num_processes: int) -> Iterator[dict[str, Tensor]]:
    """This process's share of all windows, each of them once."""
    windows = windows.with_format("torch")
    for first in range(process * batch_size, len(windows), num_processes * batch_size):
        yield windows[first : first + batch_size]
