"""Outputs of the rows of one call, readable by one another while they are generated."""

from __future__ import annotations

import numpy as np

from specdec.drafters.ngrams.ngram_index import SEPARATOR, IntArray, Links, append_tokens, power_of_two


class PeerOutputs:
    """One index in which each row owns a region, so that all rows can grow at the same time.

    Args:
        orders: Lengths of the indexed n-grams, ascending.
        rows: Rows of the batch.
        room: Tokens each region has room for at first.
    """

    def __init__(self, orders: tuple[int, ...], rows: int, room: int = 254) -> None:
        self.lengths = [0] * rows
        self._orders = np.array(orders, np.int64)
        self._allocate(room)

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self.lengths)

    def region(self, row: int) -> tuple[int, int]:
        """First position of a row's region and the position after it."""
        return row * self._stride, (row + 1) * self._stride

    def extend(self, row: int, tokens: IntArray) -> None:
        """Appends tokens to a row's output.

        Args:
            row: Index in the batch.
            tokens: Token ids, `[tokens]`, int32, contiguous and writable.
        """
        length = self.lengths[row]
        if length + len(tokens) + 2 > self._stride:
            self._grow(length + len(tokens))
        append_tokens(self.links, row * self._stride + 1 + length, tokens)
        self.lengths[row] = length + len(tokens)

    def _allocate(self, room: int) -> None:
        self._stride = room + 2
        capacity = self._stride * self.rows
        self.links: Links = (
            np.full(capacity, SEPARATOR, np.int32),
            np.empty((capacity, len(self._orders)), np.int32),
            np.zeros((len(self._orders), power_of_two(capacity)), np.int32),
            self._orders,
        )

    def _grow(self, room: int) -> None:
        """Moves all rows to regions of at least twice the size."""
        text = self.links[0]
        outputs = [text[start + 1 : start + 1 + n] for start, n in zip(self._starts(), self.lengths, strict=True)]
        self._allocate(2 * room)
        for start, output in zip(self._starts(), outputs, strict=True):
            append_tokens(self.links, start + 1, output)

    def _starts(self) -> list[int]:
        return [row * self._stride for row in range(self.rows)]
