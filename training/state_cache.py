"""Final hidden states of training windows on disk, so that only the first epoch runs the target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

FOLDER = "states"


class StateCache:
    """Keeps the target's hidden states of each window in a file that is mapped into memory.

    Medusa-1 trains heads on a frozen target: its states never change, and computing them takes most of a step on a
    CPU. Takes `windows * window * hidden_size` values of disk in the target's dtype, until the run is complete.

    Args:
        folder: Of the run. A resumed run finds its states there.
        key: Names the data and the process; states of another key are not used.
        num_windows: How many windows there are to train on.
    """

    def __init__(self, folder: Path, key: str, num_windows: int) -> None:
        self.folder = folder / FOLDER
        self.key = key
        self.num_windows = num_windows
        self._states: Tensor | None = None  # [windows, window, hidden]
        self._is_stored: Tensor | None = None  # [windows]

    def states(self, windows: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """Hidden states of a batch, from disk if all of its windows are there.

        Args:
            windows: Numbers of the windows, `[batch]`.
            compute: Runs the target over the batch: `[batch, window, hidden]`.
        """
        where = windows.cpu()
        if self._states is not None and self._is_stored is not None and bool(self._is_stored[where].all()):
            return self._states[where]
        states = compute()
        if self._states is None or self._is_stored is None:
            self._open(states)
            if bool(self._is_stored[where].all()):  # type: ignore[index]
                return states
        assert self._states is not None and self._is_stored is not None
        self._states[where] = states.cpu()
        self._is_stored[where] = 1
        return states

    def _open(self, like: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{self.key}-{str(like.dtype).removeprefix('torch.')}"
        shape = (self.num_windows, *like.shape[1:])
        count = self.num_windows * like[0].numel()
        states = torch.from_file(str(self.folder / f"{name}.bin"), shared=True, size=count, dtype=like.dtype)
        stored = self.folder / f"{name}.stored"
        self._states = states.view(shape)
        self._is_stored = torch.from_file(str(stored), shared=True, size=self.num_windows, dtype=torch.uint8)

    def remove(self) -> None:
        """Deletes the files; states already handed out stay valid."""
        self._states = self._is_stored = None
        for file in self.folder.glob(f"{self.key}-*"):
            file.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()
