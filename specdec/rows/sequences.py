"""The tokens of every row, as plain decoding would lay them out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Sequences:
    """Prompt (with its padding) and committed tokens of a batch, on the host.

    Args:
        input_ids: `[batch, prompt]`, left-padded.
        prompt_mask: `[batch, prompt]`, zero at padding, or None.
        max_length: Length limit, prompt included.
    """

    def __init__(self, input_ids: Tensor, prompt_mask: Tensor | None, max_length: int) -> None:
        batch, prompt = input_ids.shape
        self.device = input_ids.device
        self.prompt = prompt
        self.max_length = max_length
        self.ids: NDArray[np.int64] = np.zeros((batch, prompt + min(max(max_length - prompt, 0), 4096) + 1), np.int64)
        self.ids[:, :prompt] = input_ids.cpu().numpy()
        self.padding = [0] * batch
        if prompt_mask is not None and prompt_mask.shape[1] >= prompt:
            mask = prompt_mask[:, prompt_mask.shape[1] - prompt :]
            self.padding = (mask.cumsum(1) == 0).sum(1).tolist()
        self.compact: list[NDArray[np.int32]] = [
            np.concatenate([row[pad:prompt], row[prompt:]]).astype(np.int32)
            for row, pad in zip(self.ids, self.padding, strict=True)
        ]
        self.lengths = [prompt] * batch

    def __len__(self) -> int:
        return len(self.lengths)

    def num_generated(self, row: int) -> int:
        """Tokens generated so far in a row."""
        return self.lengths[row] - self.prompt

    def room(self, row: int) -> int:
        """Tokens that may still be generated in a row."""
        return self.max_length - self.lengths[row]

    def append(self, row: int, tokens: Sequence[int]) -> None:
        """Commits tokens to a row."""
        start = self.lengths[row]
        end = start + len(tokens)
        if end > self.ids.shape[1]:
            more = max(4096, end - self.ids.shape[1])
            self.ids = np.pad(self.ids, ((0, 0), (0, more)))
            self.compact = [np.pad(row_ids, (0, more)) for row_ids in self.compact]
        self.ids[row, start:end] = tokens
        pad = self.padding[row]
        self.compact[row][start - pad : end - pad] = tokens
        self.lengths[row] = end

    def real(self, row: int) -> NDArray[np.int32]:
        """A row's tokens without padding, a view, int32."""
        return self.compact[row][: self.lengths[row] - self.padding[row]]

    def roots(self, rows: Sequence[int]) -> Tensor:
        """Last token of each row, `[rows]`, on the host."""
        return torch.tensor([int(self.ids[row, self.lengths[row] - 1]) for row in rows])

    def generated(self, row: int) -> NDArray[np.int64]:
        """A row's generated tokens, a view."""
        return self.ids[row, self.prompt : self.lengths[row]]

    def prefixes(self, rows: Sequence[int], paths: Sequence[Sequence[int]]) -> Tensor:
        """Padded ids of rows of one length, each followed by its path, `[rows, length + depth]`, int64."""
        length, depth = self.lengths[rows[0]], len(paths[0])
        ids = np.empty((len(rows), length + depth), np.int64)
        ids[:, :length] = self.ids[rows, :length]
        ids[:, length:] = paths
        return torch.from_numpy(ids).to(self.device)

    def output(self, pad_token: int) -> Tensor:
        """All rows, `[batch, longest]`, shorter ones filled up on the right, on the prompt's device."""
        longest = max(self.lengths)
        ids = np.full((len(self), longest), pad_token, np.int64)
        for row, length in enumerate(self.lengths):
            ids[row, :length] = self.ids[row, :length]
        return torch.from_numpy(ids).to(self.device)
