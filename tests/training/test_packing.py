"""Windows hold every supervised token once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from specdec.training.examples import Example, to_dataset
from specdec.training.packing import MAX_CONTEXT, pack


def random_examples(count: int, longest: int, seed: int = 0) -> list[Example]:
    """Every token is another number."""
    rng = np.random.default_rng(seed)
    examples, first = [], 1
    for length in rng.integers(1, longest + 1, count).tolist():
        examples.append(Example(list(range(first, first + length)), (rng.random(length) < 0.5).tolist()))
        first += length
    return examples


@pytest.mark.parametrize("window", [8, 16, 50, 1000])
def test_every_supervised_token_once_and_in_its_place(window: int) -> None:
    examples = random_examples(60, 90)
    place = {t: (n, i) for n, example in enumerate(examples) for i, t in enumerate(example.input_ids)}
    windows = pack(examples, window, seed=1)
    found: Counter[int] = Counter()
    for row in windows:
        ids, segments, positions = row["input_ids"], row["segments"], row["position_ids"]
        assert len(ids) == len(row["supervised"]) == len(segments) == len(positions) == window
        found.update(ids[row["supervised"] == 1].tolist())
        used = int((segments != 0).sum())
        assert (segments[used:] == 0).all() and (ids[used:] == 0).all() and not row["supervised"][used:].any()
        assert [*dict.fromkeys(segments[:used].tolist())] == [*range(1, segments.max() + 1)]
        for segment in range(1, segments.max() + 1):
            inside = ids[segments == segment].tolist()
            assert positions[segments == segment].tolist() == [*range(len(inside))]
            start = place[inside[0]]
            assert [place[t] for t in inside] == [(start[0], start[1] + i) for i in range(len(inside))]
    assert found == Counter(t for e in examples for t, s in zip(e.input_ids, e.supervised, strict=True) if s)


def test_further_pieces_begin_with_what_stood_before() -> None:
    window, length = 400, 1000
    windows = pack([Example([*range(1, length + 1)], [True] * length)], window, seed=0)
    pieces = sorted(
        (row["input_ids"][row["segments"] == s].tolist(), row["supervised"][row["segments"] == s].tolist())
        for row in windows
        for s in range(1, row["segments"].max() + 1)
    )
    assert [piece[0] for piece, _ in pieces] == [1, 401 - MAX_CONTEXT, 401 - MAX_CONTEXT + 400 - MAX_CONTEXT]
    for piece, supervised in pieces[1:]:
        assert supervised == [0] * MAX_CONTEXT + [1] * (len(piece) - MAX_CONTEXT)


def test_windows_are_a_function_of_the_seed() -> None:
    examples = random_examples(80, 30)
    first, again, other = pack(examples, 32, 5), pack(to_dataset(examples), 32, 5), pack(examples, 32, 6)
    assert (first["input_ids"][:] == again["input_ids"][:]).all()
    assert (
        first["input_ids"][:].shape != other["input_ids"][:].shape
        or (first["input_ids"][:] != other["input_ids"][:]).any()
    )


def test_little_is_padding() -> None:
    examples = [Example(e.input_ids, [True] * len(e.input_ids)) for e in random_examples(500, 40)]
    windows = pack(examples, 64, 0)
    segments, supervised = windows["segments"][:], windows["supervised"][:]
    assert (segments == 0).mean() < 0.02
    assert (segments != 0).sum() == supervised.sum() == sum(len(e.input_ids) for e in examples)


def test_selected_rows() -> None:
    rows = to_dataset(random_examples(30, 10)).select([3, 7])
    ids = {token for row in rows for token in row["input_ids"]}
    assert {*pack(rows, 16, 0)["input_ids"][:].ravel().tolist()} - {0} <= ids


def test_pieces_without_a_supervised_token_are_left_out() -> None:
    long_prompt = Example([*range(1, 101)], [False] * 90 + [True] * 10)
    windows = pack([long_prompt, Example([500] * 5, [False] * 5)], 20, 0)
    assert 500 not in windows["input_ids"][:] and 1 not in windows["input_ids"][:]
    assert windows["supervised"][:].sum() == 10
    with pytest.raises(ValueError, match="no supervised token"):
        pack([Example([1, 2], [False, False])], 16, 0)


def test_window_too_small() -> None:
    with pytest.raises(ValueError, match="window must be at least 8 tokens, got 4"):
        pack(random_examples(2, 5), 4)
