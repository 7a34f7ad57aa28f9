"""Examples laid into windows of one length."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from specdec.training.examples import Example, flat_columns

MAX_CONTEXT = 64
"""Largest overlap, in tokens, of consecutive pieces of an example that is longer than a window."""
MIN_WINDOW = 8
COLUMN_TYPES = {"input_ids": np.int32, "supervised": np.int8, "segments": np.int32, "position_ids": np.int32}

Piece = tuple[int, int, int]
"""Start and end among the tokens of all examples, and from where on tokens are supervised."""


def pack(examples: Dataset | Sequence[Example], window: int, seed: int = 0) -> Dataset:
    """Lays examples into windows, several to a window where they fit (best fit, longest first).

    An example that is longer than the window is cut into pieces. A further piece begins with some tokens of the piece
    before, which are not supervised again: every supervised token is supervised in exactly one window, with tokens
    before it. Pieces without a supervised token are left out.

    Args:
        examples: What `load_examples` returned.
        window: Tokens per window.
        seed: Of the order of the windows, and of the examples in them.

    Returns:
        A row per window, integer columns of `window` values each: `input_ids`, `supervised` (0 or 1), `segments` (1, 2,
        ... for the examples of the window, 0 for padding) and `position_ids` (from 0 on in each segment).

    Raises:
        ValueError: The window is too small, or no token is supervised.
    """
    if window < MIN_WINDOW:
        raise ValueError(f"window must be at least {MIN_WINDOW} tokens, got {window}; 1024 or 2048 are usual")
    ids, supervised, offsets = flat_columns(examples)
    pieces = [piece for piece in _pieces(offsets, window) if supervised[piece[2] : piece[1]].any()]
    if not pieces:
        raise ValueError("examples have no supervised token; give examples that have one")
    rng = np.random.default_rng(seed)
    pieces = [pieces[i] for i in rng.permutation(len(pieces))]
    windows = _best_fit([end - start for start, end, _ in pieces], window)
    rng.shuffle(windows)
    columns = {name: np.zeros((len(windows), window), dtype) for name, dtype in COLUMN_TYPES.items()}
    for row, members in enumerate(windows):
        place = 0
        for segment, member in enumerate(rng.permutation(members), start=1):
            start, end, supervised_from = pieces[member]
            there = slice(place, place + end - start)
            columns["input_ids"][row, there] = ids[start:end]
            columns["supervised"][row, there] = supervised[start:end]
            columns["supervised"][row, place : place + supervised_from - start] = 0
            columns["segments"][row, there] = segment
            columns["position_ids"][row, there] = np.arange(end - start)
            place = there.stop
    return Dataset.from_dict(columns).with_format("numpy")


def _pieces(offsets: NDArray[np.int64], window: int) -> Iterator[Piece]:
    """Every example, cut where it is longer than the window."""
    context = min(MAX_CONTEXT, window // 4)
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        start = supervised_from = first
        while start < last:
            end = min(start + window, last)
            yield start, end, supervised_from
            if end == last:
                break
            start, supervised_from = end - context, end


def _best_fit(lengths: Sequence[int], window: int) -> list[list[int]]:
    """Windows as lists of pieces; each piece, longest first, goes where it leaves the least room.

    Args:
        lengths: Tokens of each piece, at most `window`.
        window: Tokens of a window.
    """
    windows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, window), ascending
    for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(rooms, (lengths[piece], -1))
        if place < len(rooms):
            room, chosen = rooms.pop(place)
        else:
            room, chosen = window, len(windows)
            windows.append([])
        windows[chosen].append(piece)
        if room > lengths[piece]:
            insort(rooms, (room - lengths[piece], chosen))
    return windows
