"""Which windows are trained on at which step: a function of the seed alone, so that a resumed run repeats nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

COLUMNS = ("input_ids", "supervised", "segments", "position_ids")
WINDOW = "window_index"
"""Column of a training batch: the number of each window."""
Batch = Mapping[str, Tensor]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(count)


@dataclass(frozen=True)
class BatchPlan:
    """The order of the windows.

    A step takes `accumulation` batches in each of `num_processes` processes. Epochs follow each other without a gap;
    each has an order of its own.

    Args:
        num_windows: How many there are.
        batch_size: Windows per batch and process.
        accumulation: Batches per step and process.
        num_processes: How many processes share a step.
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
        """Steps of so many epochs, the last one filled up from the next."""
        return max(1, -int(-epochs * self.num_windows // self.windows_per_step))

    def batch(self, step: int, part: int, process: int) -> list[int]:
        """Windows of one batch of a step."""
        first = step * self.windows_per_step + (part * self.num_processes + process) * self.batch_size
        return [self._window(number) for number in range(first, first + self.batch_size)]

    def _window(self, number: int) -> int:
        epoch, place = divmod(number, self.num_windows)
        return int(_order(self.seed, epoch, self.num_windows)[place])


@dataclass
class _StepSampler(Sampler[list[int]]):
    plan: BatchPlan
    process: int
    steps: range

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            for part in range(self.plan.accumulation):
                yield self.plan.batch(step, part, self.process)

    def __len__(self) -> int:
        return len(self.steps) * self.plan.accumulation


@dataclass
class _Numbered:
    """Windows that know their number."""

    windows: Any

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.windows[index], WINDOW: index}


def collate(windows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Windows as tensors `[batch, window]`, and their numbers `[batch]` where they are known."""
    names = [*COLUMNS, WINDOW] if WINDOW in windows[0] else COLUMNS
    return {name: torch.from_numpy(np.array([window[name] for window in windows], np.int64)) for name in names}


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
    numbered = _Numbered(windows)
    # With a generator of its own, the loader draws nothing from the global one, whose state a checkpoint keeps.
    loader: DataLoader[Any] = DataLoader(
        numbered,  # type: ignore[arg-type]
        batch_sampler=_StepSampler(plan, process, steps),
        collate_fn=collate,
        num_workers=workers,
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )
    batches = iter(loader)
    for _ in steps:
        yield [next(batches) for _ in range(plan.accumulation)]


def evaluation_batches(windows: Any, batch_size: int, process: int, num_processes: int) -> Iterator[dict[str, Tensor]]:
    """This process's share of all windows, each of them once."""
    for first in range(process * batch_size, len(windows), num_processes * batch_size):
        yield collate([windows[i] for i in range(first, min(first + batch_size, len(windows)))])
