"""Moving accepted paths, by the kernel and by torch, against a loop over slots."""

from __future__ import annotations

import pytest
import torch

from specdec.passes.cache_commit import move_slots
from tests.attention.reference import needs_triton

PATHS = {
    "in place": ([[0, 1, 2]], [0]),
    "winding": ([[0, 2, 5, 9]], [0]),
    "a target is a later source": ([[0, 2, 3, 4]], [0]),
    "some rows, ragged": ([[0, 1, 6], [0, 3, 4]], [2, 0]),
    "one node": ([[0], [0]], [1, 2]),
    "odd": ([[0, 1, 2, 7, 8, 11]], [1]),
}


@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=needs_triton)])
@pytest.mark.parametrize("case", PATHS)
@pytest.mark.parametrize("sizes", [(8, 8), (80, 48)])
def test_slots_move_as_in_a_loop(case: str, sizes: tuple[int, int], kernel: bool) -> None:
    paths, rows = PATHS[case]
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 3, 2, 24, size, generator=generator) for size in sizes)
    lengths = [4, 7, 10]
    source = torch.tensor([[lengths[row] + node for node in path] for path, row in zip(paths, rows, strict=True)])
    target = torch.tensor([[lengths[row] + i for i in range(len(path))] for path, row in zip(paths, rows, strict=True)])
    expected = [keys.clone(), values.clone()]
    for tensor, old in zip(expected, (keys, values), strict=True):
        for i, row in enumerate(rows):
            for at, to in zip(source[i].tolist(), target[i].tolist(), strict=True):
                tensor[:, row, :, to] = old[:, row, :, at]
    move_slots(keys, values, torch.tensor(rows)[:, None], source, target, kernel)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])
