"""Trees of ranks against every tree there is."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from specdec.heads.tree_choice import best_tree, expected_tokens, measured_tokens

ACCURACIES = [[0.5, 0.2, 0.1], [0.1, 0.4], [0.3, 0.0, 0.05]]


def all_paths() -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for depth in range(1, len(ACCURACIES) + 1):
        paths += itertools.product(*(range(len(ranks)) for ranks in ACCURACIES[:depth]))
    return paths


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5])
def test_no_tree_of_this_size_is_better(nodes: int) -> None:
    def value(tree: tuple[tuple[int, ...], ...]) -> float:
        products = [math.prod(ACCURACIES[head][rank] for head, rank in enumerate(path)) for path in tree]
        return 1.0 + sum(products)

    trees = [
        tree
        for tree in itertools.combinations(all_paths(), nodes - 1)
        if all(not path[:-1] or path[:-1] in tree for path in tree)
    ]
    best = best_tree(ACCURACIES, nodes)
    assert len(best) == nodes - 1
    assert expected_tokens(ACCURACIES, best) == pytest.approx(max(map(value, trees)))


def test_smaller_trees_are_the_beginning_of_larger_ones() -> None:
    largest = best_tree(ACCURACIES, 1000)
    for nodes in range(1, len(largest)):
        assert best_tree(ACCURACIES, nodes) == largest[: nodes - 1]
    known = {()} | {tuple(path) for path in largest}
    assert all(tuple(path[:-1]) in known for path in largest)
    assert len(known) == len(largest) + 1


def test_ranks_that_are_never_right_are_left_out() -> None:
    tree = best_tree(ACCURACIES, 1000)
    assert len(tree) == 3 + 3 * 2 + 3 * 2 * 2
    assert [0, 0, 1] not in tree
    assert best_tree([[0.0, 0.0]], 8) == []


def test_perfect_heads_are_a_chain_first() -> None:
    assert best_tree([[1.0, 0.0]] * 3, 8) == [[0], [0, 0], [0, 0, 0]]


def test_measured_tokens_count_positions_whose_whole_path_is_there() -> None:
    ranks = np.array([[0, 0], [0, 1], [1, 0], [-1, 0]])
    assert measured_tokens(ranks, []) == 1.0
    assert measured_tokens(ranks, [[0]]) == 1.5
    assert measured_tokens(ranks, [[0], [0, 0], [1]]) == 1 + (2 + 1 + 1) / 4


def test_independent_heads_are_measured_as_expected() -> None:
    random = np.random.default_rng(0)
    rows = [random.choice([0, 1, 2, -1], size=20000, p=[0.5, 0.2, 0.1, 0.2]) for _ in range(3)]
    accuracies = [[0.5, 0.2, 0.1]] * 3
    tree = best_tree(accuracies, 12)
    assert measured_tokens(np.stack(rows, 1), tree) == pytest.approx(expected_tokens(accuracies, tree), abs=0.03)
