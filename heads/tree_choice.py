"""Which tree of ranks to verify, and how many tokens a pass over it is worth.

A path of ranks `[2, 0]` is the third choice of head 1 followed by the first choice of head 2 ("medusa choices").
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Paths = Sequence[Sequence[int]]
"""Paths of ranks from the root, a path after the one it extends."""


def best_tree(accuracies: Sequence[Sequence[float]], nodes: int) -> list[list[int]]:
    """The tree of which most tokens are expected, if heads are right independently of each other.

    Greedy by path product, which is best at every size: the first n paths are the best n. "Medusa: Simple LLM Inference
    Acceleration Framework with Multiple Decoding Heads", arXiv 2401.10774, section 2.3.3.

    Args:
        accuracies: Per head, per rank: P(the token of this rank is the one that the target picks). The heads may have
            different numbers of ranks.
        nodes: Size of the tree, the root included.

    Returns:
        At most `nodes - 1` paths, best first; ranks that are never right are left out.
    """
    orders = [np.argsort(-np.asarray(ranks, np.float64), kind="stable").tolist() for ranks in accuracies]
    tree: list[list[int]] = []
    heap: list[tuple[float, int, tuple[int, ...], float]] = []  # (-product, age, places in `orders`, product above)

    def push(places: tuple[int, ...], above: float) -> None:
        head, place = len(places) - 1, places[-1]
        if head < len(orders) and place < len(orders[head]):
            product = above * accuracies[head][orders[head][place]]
            if product > 0:
                heapq.heappush(heap, (-product, len(tree), places, above))

    push((0,), 1.0)
    while heap and len(tree) < nodes - 1:
        product, _, places, above = heapq.heappop(heap)
        tree.append([orders[head][place] for head, place in enumerate(places)])
        push((*places[:-1], places[-1] + 1), above)
        push((*places, 0), -product)
    return tree


def expected_tokens(accuracies: Sequence[Sequence[float]], paths: Paths) -> float:
    """Tokens per target pass over a tree, the target's own pick included, if heads are right independently.

    Args:
        accuracies: As for `best_tree`.
        paths: The tree.
    """
    return 1.0 + sum(
        float(np.prod([accuracies[head][rank] for head, rank in enumerate(path)])) for path in map(list, paths)
    )


def measured_tokens(ranks: ArrayLike, paths: Paths) -> float:
    """Tokens per target pass over a tree on measured positions: correlations between heads count.

    Args:
        ranks: Per position, per head: rank of the target's token in the head's list, -1 where it is not there,
            `[positions, heads]`.
        paths: The tree.
    """
    found: NDArray[np.int64] = np.asarray(ranks, np.int64)
    accepted = sum(int((found[:, : len(path)] == np.asarray(path)).all(1).sum()) for path in map(list, paths))
    return 1.0 + accepted / max(len(found), 1)
