"""The kernels do what their definitions say, compiled or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

from specdec import kernels
from specdec.budgeting.kernels import best_size, count_followed
from specdec.kernels import (
    ancestors_and_depths,
    host_array,
    is_valid,
    kernel,
)
from tests.conformance import ancestors, random_tree


def test_without_a_folder_to_cache_in_kernels_compile_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    njit = numba.njit

    def without_cache(*args: object, cache: bool = False, **kwargs: object) -> object:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*args, **kwargs)

    monkeypatch.setattr(numba, "njit", without_cache)

    def double(value: int) -> int:
        return 2 * value

    assert kernel(double)(21) == 42


def test_the_first_compilation_of_ours_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(kernels._LISTENER, "tell", lambda: told.append("compiling"))

    def double(value: int) -> int:
        return 2 * value

    assert numba.njit(double)(21) == 42
    assert not told, "that one is the user's"
    for _ in range(2):
        double.__module__ = "specdec.somewhere"
        assert numba.njit(double)(21) == 42
        assert told == ["compiling"]


def test_the_library_tells_of_it_in_its_log(tmp_path: Path) -> None:
    code = "import specdec.kernels as k, numpy as n; k.is_valid(n.zeros((1, 1), int), -n.ones((1, 1), int), 3)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.startswith("compiling loops that run on the CPU")
    assert any(tmp_path.rglob("*.nbi")), "the next process need not"


@pytest.mark.parametrize("seed", range(4))
def test_ancestors_and_depths(seed: int) -> None:
    tree = random_tree(seed)
    mask, depths = ancestors_and_depths(host_array(tree.parents))
    for row, parents in enumerate(tree.parents.tolist()):
        for node in range(tree.num_nodes):
            path = ancestors(parents, node)
            assert np.flatnonzero(mask[row, node]).tolist() == path
            assert depths[row, node] == len(path) - 1


def test_masks_by_matrix_products_are_the_same() -> None:
    """What runs on a device."""
    tree = random_tree(5)
    index = torch.arange(tree.num_nodes)
    reach = (tree.parents[:, :, None] == index) | (index[:, None] == index)
    reach[:, :, 0] = True
    for _ in range(5):
        reach = (reach.float() @ reach.float()) > 0
    assert torch.equal(reach, tree.ancestor_mask)


def test_validity() -> None:
    tokens, parents = np.array([[3, 4, 5]]), np.array([[-1, 0, 1]])
    assert is_valid(tokens, parents, 6)
    assert not is_valid(tokens, parents, 5)
    assert not is_valid(tokens - 4, parents, 6)
    assert not is_valid(tokens, np.array([[-1, 1, 0]]), 6)
    assert not is_valid(tokens, np.array([[0, 0, 0]]), 6)
    assert not is_valid(tokens, np.array([[-1, 0, -2]]), 6)


def test_best_size_is_that_of_the_definition() -> None:
    known, seconds = np.array([1, 2, 4, 8, 16, 32, 64]), np.array([4.0, 7.0, 7.5, 8.0, 9.0, 14.0, 20.0])
    random = np.random.default_rng(0)
    for seed in range(40):
        tree = random_tree(seed, batch=1 + seed % 3, nodes=int(random.integers(2, 30)))
        parents = host_array(tree.parents)
        scores = random.random(parents.shape).astype(np.float32)
        tried, hit = random.random(12) * 20, random.random(12)
        hit *= tried
        centres = (np.arange(12) + 0.5) / 12
        rates = (hit + 4 * centres) / (tried + 4)
        gain = np.zeros(tree.num_nodes)
        for row in range(len(parents)):
            for node in range(1, tree.num_nodes):
                if parents[row, node] >= 0:
                    path = ancestors(parents[row].tolist(), node)[1:]
                    gain[node] += np.prod(np.interp(scores[row, path], centres, rates).clip(1e-6, 1.0))
        sizes = [n for n in known if n < tree.num_nodes] + [tree.num_nodes]
        times = np.interp(np.log2(sizes), np.log2(known), seconds)
        speeds = [(len(parents) + gain[:size].sum()) / taken for size, taken in zip(sizes, times, strict=True)]
        best, tokens, taken, plain = best_size(parents, scores, tried, hit, 4.0, known, seconds, 0.0)
        assert best == sizes[int(np.argmax(speeds))]
        assert taken == pytest.approx(times[int(np.argmax(speeds))])
        assert plain == seconds[0]
        assert tokens == pytest.approx(len(parents) + gain[:best].sum())


def test_counts_are_of_nodes_whose_parent_was_right() -> None:
    tokens = np.array([[0, 1, 2, 3, 4, 5]])
    parents = np.array([[-1, 0, 0, 1, 2, -1]])
    scores = np.array([[0, 0.15, 0.95, 0.45, 0.65, 1.0]], np.float32)
    tried, hit = np.ones(10), np.ones(10)
    count_followed(tokens, parents, scores, np.array([[2, 4]]), tried, hit, 0.5)
    assert tried.tolist() == pytest.approx([0.5, 1.5, 0.5, 0.5, 0.5, 0.5, 1.5, 0.5, 0.5, 1.5])
    assert hit.tolist() == pytest.approx([0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 1.5, 0.5, 0.5, 1.5])


def test_nothing_is_counted_behind_the_last_known_token() -> None:
    tokens, parents, scores = np.zeros((1, 4), np.int64), np.arange(-1, 3)[None], np.full((1, 4), 0.5, np.float32)
    tried, hit = np.zeros(12), np.zeros(12)
    count_followed(tokens, parents, scores, np.array([[0, -1]]), tried, hit, 1.0)
    assert (tried.sum(), hit.sum()) == (1, 1)
