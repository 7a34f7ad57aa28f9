"""Final hidden states of training windows on disk, so that only the first epoch runs the target."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

FOLDER = "states"


class StateCache:
    """Keeps the target's hidden states of each window in a file.

    Medusa-1 trains heads on a frozen target: its states never change, and computing them takes most of a step on a
    CPU. Takes `windows * window * hidden_size` values of disk in the target's dtype, until the run is complete.

    Args:
        folder: Of the run. A resumed run finds its states there.
        key: Names the data and the process; states of another key are not used.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder / FOLDER / key

    def states(self, windows: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """Hidden states of a batch, from disk if all of its windows are there.

        Args:
            windows: Numbers of the windows, `[batch]`.
            compute: Runs the target over the batch: `[batch, window, hidden]`.
        """
        files = [self.folder / f"{window}.pt" for window in windows.tolist()]
        if all(file.exists() for file in files):
            return torch.stack([torch.load(file, weights_only=True) for file in files])
        states = compute()
        self.folder.mkdir(parents=True, exist_ok=True)
        for file, state in zip(files, states.cpu(), strict=True):
            torch.save(state.clone(), file.with_suffix(".partial"))
            os.replace(file.with_suffix(".partial"), file)
        return states

    def remove(self) -> None:
        """Deletes the files."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()
