"""Grows a tree level by level out of a draft model's lists, and follows what became of it."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from specdec.drafters.trees.rank_tree import class_of, rate_at
from specdec.kernels import Floats, Ints, kernel

ProbArray = NDArray[np.float32]


class DraftNodes(NamedTuple):
    """Nodes that a draft model has named, one row each per row of the batch, the root first.

    Args:
        tokens: Token ids, `[rows, nodes]`.
        parents: Index of each node's parent, `[rows, nodes]`; -1 at the root.
        depths: Distance from the root, `[rows, nodes]`.
        ranks: Place in the list of its parent's children, `[rows, nodes]`.
        probs: What the draft model says of the node, behind its parent, `[rows, nodes]`.
        scores: P(accepted | parent accepted), `[rows, nodes]`.
        orders: What nodes are ranked by: the product of the scores from the root down, or of acceptances that are
            given, `[rows, nodes]`.
        fed: Place among the nodes that went through the draft model, -1 if it did not, `[rows, nodes]`.
        first_child: Where its children stand, one after another, `[rows, nodes]`.
        num_children: How many there are, `[rows, nodes]`.
        counts: Nodes of each row, `[rows]`.
    """

    tokens: Ints
    parents: Ints
    depths: Ints
    ranks: Ints
    probs: ProbArray
    scores: Floats
    orders: Floats
    fed: Ints
    first_child: Ints
    num_children: Ints
    counts: Ints

    @classmethod
    def of_roots(cls, roots: Ints, capacity: int) -> DraftNodes:
        """Trees of their roots alone, with room for more; the roots count as fed."""
        ints = np.zeros((7, len(roots), capacity), np.int64)
        ints[0, :, 0] = roots
        ints[1] = ints[4] = -1
        ints[4, :, 0] = 0
        floats = np.ones((2, len(roots), capacity))
        probs = np.zeros((len(roots), capacity), np.float32)
        counts = np.ones(len(roots), np.int64)
        tokens, parents, depths, ranks, fed, first_child, num_children = ints
        scores, orders = floats
        return cls(tokens, parents, depths, ranks, probs, scores, orders, fed, first_child, num_children, counts)

    def of_rows(self, rows: list[int]) -> DraftNodes:
        """The trees of some rows."""
        return DraftNodes._make(np.ascontiguousarray(array[rows]) for array in self)


@kernel
def add_children(
    nodes: DraftNodes,
    level: Ints,
    listed: Ints,
    probs: ProbArray,
    rates: Floats,
    acceptances: Floats,
    least: float,
    max_depths: Ints,
) -> None:
    """Adds the lists of a level's nodes as their children.

    Args:
        nodes: Changed; there must be room.
        level: The nodes whose lists these are, -1 for none, `[rows, width]`.
        listed: Tokens, `[rows, width, children]`; -1 for none.
        probs: Their probabilities, `[rows, width, children]`.
        rates: P(accepted | parent accepted) by class of rank and of probability, `[rank classes, classes]`.
        acceptances: To rank by in place of the scores, by rank, `[ranks]`; empty for none.
        least: Nodes ranked lower are left out.
        max_depths: Largest depth of a node, `[rows]`.
    """
    for row in range(level.shape[0]):
        for place in range(level.shape[1]):
            parent = level[row, place]
            if parent < 0 or nodes.depths[row, parent] >= max_depths[row]:
                continue
            start = nodes.counts[row]
            for rank in range(listed.shape[2]):
                if listed[row, place, rank] < 0:
                    continue
                prob = probs[row, place, rank]
                score = rate_at(rates, min(rank, rates.shape[0] - 1), class_of(prob, rank, rates.shape[1], True))
                factor = score
                if acceptances.shape[0] > 0:
                    factor = acceptances[rank] if rank < acceptances.shape[0] else 0.0
                order = nodes.orders[row, parent] * factor
                node = nodes.counts[row]
                if order < least or node >= nodes.tokens.shape[1]:
                    continue
                nodes.tokens[row, node] = listed[row, place, rank]
                nodes.parents[row, node] = parent
                nodes.depths[row, node] = nodes.depths[row, parent] + 1
                nodes.ranks[row, node] = rank
                nodes.probs[row, node] = prob
                nodes.scores[row, node] = score
                nodes.orders[row, node] = order
                nodes.counts[row] += 1
            nodes.first_child[row, parent] = start
            nodes.num_children[row, parent] = nodes.counts[row] - start


@kernel
def choose_level(
    nodes: DraftNodes, since: Ints, least_order: float, max_depths: Ints, num_fed: int, level: Ints
) -> int:
    """Takes each row's best nodes that have not been fed, to be fed next.

    Args:
        nodes: `fed` of those taken is set.
        since: Nodes before are too old to be fed, `[rows]`.
        least_order: Nodes whose rank is below are not fed.
        max_depths: Largest depth of a node, `[rows]`: nodes there are not fed.
        num_fed: Nodes that were fed so far, padding included.
        level: Written: the nodes taken, -1 behind them, `[rows, width]`.

    Returns:
        How many nodes the widest row has.
    """
    widest = 0
    for row in range(level.shape[0]):
        taken = 0
        level[row, :] = -1
        while taken < level.shape[1]:
            best = -1
            for node in range(max(since[row], 1), nodes.counts[row]):
                if nodes.fed[row, node] >= 0 or nodes.depths[row, node] >= max_depths[row]:
                    continue
                if nodes.orders[row, node] < least_order:
                    continue
                if best < 0 or nodes.orders[row, node] > nodes.orders[row, best]:
                    best = node
            if best < 0:
                break
            nodes.fed[row, best] = num_fed + taken
            level[row, taken] = best
            taken += 1
        widest = max(widest, taken)
    return widest


@kernel
def level_inputs(nodes: DraftNodes, level: Ints) -> tuple[Ints, Ints, Ints]:
    """What is to be fed of a level's nodes.

    Args:
        nodes: What was drafted so far.
        level: Nodes, -1 at padding, `[rows, width]`.

    Returns:
        Tokens, 0 at padding; the places of their parents among the nodes fed, -1 at roots and padding; depths, 0 at
        padding; `[rows, width]` each.
    """
    tokens, parents, depths = np.zeros_like(level), np.full_like(level, -1), np.zeros_like(level)
    for row in range(level.shape[0]):
        for place in range(level.shape[1]):
            node = level[row, place]
            if node < 0:
                continue
            tokens[row, place], depths[row, place] = nodes.tokens[row, node], nodes.depths[row, node]
            if node > 0:
                parents[row, place] = nodes.fed[row, nodes.parents[row, node]]
    return tokens, parents, depths


@kernel
def write_trees(nodes: DraftNodes, by_order: bool, tokens: Ints, parents: Ints, scores: ProbArray, fed: Ints) -> int:
    """Writes each row's nodes as a token tree.

    Args:
        nodes: What was drafted.
        by_order: Best first; otherwise in the order in which they were made.
        tokens: Written: token ids, `[rows, nodes]`.
        parents: Written: parents, `[rows, nodes]`; the others stay as they are.
        scores: Written: P(accepted | parent accepted), `[rows, nodes]`.
        fed: Written: places among the nodes fed, -1 for none, `[rows, nodes]`.

    Returns:
        The number of nodes of the largest tree.
    """
    widest = 1
    for row in range(tokens.shape[0]):
        count = nodes.counts[row]
        order = np.arange(count)
        if by_order:  # a stable sort: a parent stands before a child that is certain
            order = np.argsort(-nodes.orders[row, :count], kind="mergesort")
        place = np.empty(count, np.int64)
        for i in range(min(count, tokens.shape[1])):
            node = order[i]
            place[node] = i
            tokens[row, i] = nodes.tokens[row, node]
            parents[row, i] = place[nodes.parents[row, node]] if i > 0 else -1
            scores[row, i] = nodes.scores[row, node]
            fed[row, i] = nodes.fed[row, node]
        widest = max(widest, min(count, tokens.shape[1]))
    return widest


@kernel
def follow(nodes: DraftNodes, known: Ints, counts: Ints, tried: Floats, hit: Floats, decay: float, paths: Ints) -> None:
    """Walks each row's tree along the tokens that the target has picked, and counts which drafts were right.

    Args:
        nodes: What was drafted.
        known: The tokens behind the root, `[rows, tokens]`.
        counts: How many there are, `[rows]`.
        tried: Changed: children whose parent was right, by class of rank and of probability, `[rank classes, classes]`.
        hit: Changed: those among them that were right.
        decay: Factor on the counts so far for each list.
        paths: Written: places among the nodes fed of the nodes on the way, the root's first, -1 behind the end,
            `[rows, tokens + 1]`. The last token is the next root, and is to be fed again for what follows it.
    """
    for row in range(known.shape[0]):
        paths[row, :] = -1
        node = 0
        if counts[row] > 0:
            paths[row, 0] = 0
        for i in range(counts[row]):
            start, end = nodes.first_child[row, node], nodes.first_child[row, node] + nodes.num_children[row, node]
            if end > start:
                tried *= decay
                hit *= decay
            found = -1
            for child in range(start, end):
                is_right = nodes.tokens[row, child] == known[row, i]
                rank_class = min(nodes.ranks[row, child], tried.shape[0] - 1)
                place = class_of(nodes.probs[row, child], 0, tried.shape[1], True)
                low = min(int(place), tried.shape[1] - 2)
                share = place - low
                tried[rank_class, low] += 1.0 - share
                tried[rank_class, low + 1] += share
                if is_right:
                    hit[rank_class, low] += 1.0 - share
                    hit[rank_class, low + 1] += share
                    found = child
            if found < 0:
                break
            node = found
            if i + 1 == counts[row] or nodes.fed[row, node] < 0:
                break
            paths[row, i + 1] = nodes.fed[row, node]


def least_product(acceptances: Sequence[float], num_nodes: int, max_depth: int) -> float:
    """Path product of the last node of the best tree of a size, for acceptances by rank that are the same everywhere.

    The best tree holds the nodes of the largest products: a node's parent and better siblings have larger ones.

    Args:
        acceptances: Falling.
        num_nodes: The root left out.
        max_depth: Largest depth of a node.
    """
    waiting, least = [(-acceptances[0], 1, 0)], 1.0
    for _ in range(num_nodes):
        if not waiting:
            break
        product, depth, rank = heapq.heappop(waiting)
        least = -product
        if rank + 1 < len(acceptances):
            heapq.heappush(waiting, (product / acceptances[rank] * acceptances[rank + 1], depth, rank + 1))
        if depth < max_depth:
            heapq.heappush(waiting, (product * acceptances[0], depth + 1, 0))
    return least * (1 - 1e-9)
