"""Goes on behind the likeliest leaf of a merged tree: what one source has begun, another one may continue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from specdec.kernels import Ints, kernel
from specdec.tree import TokenTree

LEAST_LIKELY = 0.3
"""A leaf less likely to be reached is not gone on from."""
MOST_NODES = 16
"""Nodes of a continuation at most, the leaf included."""


class Chained(NamedTuple):
    """Continuations that were asked for in one step.

    Args:
        paths: Tokens from the root's child down to each row's leaf; empty for a row without one.
        seconds: What all of it took.
    """

    paths: list[NDArray[np.int32]]
    seconds: float

    def gain(self, known: Ints, counts: Ints) -> int:
        """Accepted tokens behind the leaves, over all rows.

        Args:
            known: The tokens behind the root, `[rows, tokens]`.
            counts: How many there are, `[rows]`: all but the last were accepted.
        """
        gain = 0
        for row, path in enumerate(self.paths):
            depth, accepted = len(path), int(counts[row]) - 1
            if 0 < depth < accepted and np.array_equal(known[row, :depth], path):
                gain += accepted - depth
        return gain


@kernel
def likeliest_leaves(
    tokens: Ints, parents: Ints, scores: NDArray[np.float32], least: float, paths: NDArray[np.int32], depths: Ints
) -> int:
    """Finds each row's likeliest node without children.

    Args:
        tokens: Of a tree, `[rows, nodes]`.
        parents: -1 at padding, `[rows, nodes]`.
        scores: P(accepted | parent accepted), `[rows, nodes]`.
        least: How likely it must be.
        paths: Written: tokens from the root's child down to it, `[rows, nodes]`.
        depths: Written: how many they are, 0 where there is no such leaf, `[rows]`.

    Returns:
        How many rows have one.
    """
    rows, size = tokens.shape
    product, has_child = np.ones(size), np.zeros(size, np.bool_)
    found = 0
    for row in range(rows):
        has_child[:] = False
        for node in range(1, size):
            above = parents[row, node]
            product[node] = product[above] * scores[row, node] if above >= 0 else 0.0
            if above >= 0:
                has_child[above] = True
        best, likely = 0, least
        for node in range(1, size):
            if parents[row, node] >= 0 and not has_child[node] and product[node] >= likely:
                best, likely = node, product[node]
        depth, node = 0, best
        while node > 0:
            depth += 1
            node = parents[row, node]
        depths[row] = depth
        node = best
        for at in range(depth - 1, -1, -1):
            paths[row, at] = tokens[row, node]
            node = parents[row, node]
        found += depth > 0
    return found


def leaves_of(tree: TokenTree) -> list[NDArray[np.int32]] | None:
    """The tokens that lead to each row's likeliest leaf, none for a row without one; None where no row has one."""
    scores = tree.host_scores
    assert scores is not None
    paths, depths = np.empty(tree.tokens.shape, np.int32), np.empty(len(tree.tokens), np.int64)
    if not likeliest_leaves(tree.host_tokens, tree.host_parents, scores, LEAST_LIKELY, paths, depths):
        return None
    return [path[:depth].copy() for path, depth in zip(paths, depths, strict=True)]


def grafted(tree: TokenTree, roots: Ints, paths: Sequence[NDArray[np.int32]]) -> tuple[TokenTree, Ints]:
    """A continuation with the tokens that lead to it in front.

    Args:
        tree: Its roots are the leaves, `[rows, nodes]`.
        roots: Of the trees that it belongs to, `[rows]`.
        paths: From there to the leaves.

    Returns:
        The tree, and how many nodes in front of each row are not the source's own, `[rows]`.
    """
    theirs, above, scores = tree.host_tokens, tree.host_parents, tree.host_scores
    depths = np.array([len(path) for path in paths], np.int64)
    shape = len(paths), tree.num_nodes + int(depths.max())
    tokens, parents, rated = np.zeros(shape, np.int64), np.full(shape, -1, np.int64), np.zeros(shape, np.float32)
    for row, path in enumerate(paths):
        depth = len(path)
        tokens[row, 0], tokens[row, 1 : depth + 1] = roots[row], path
        parents[row, 1 : depth + 1] = np.arange(depth)
        if depth > 0:
            own = slice(depth + 1, depth + tree.num_nodes)
            tokens[row, own] = theirs[row, 1:]
            parents[row, own] = np.where(above[row, 1:] >= 0, above[row, 1:] + depth, -1)
            rated[row, own] = 0.5 if scores is None else scores[row, 1:]
    return TokenTree.of_arrays(tokens, parents, rated), depths + 1
