"""Grows a tree level by level out of a draft model's lists, and follows what became of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from specdec.kernels import Floats, Ints, kernel, kernel_part

ProbArray = NDArray[np.float32]


class DraftNodes(NamedTuple):
    """Candidate nodes of a draft, one tree per row of the batch, the root first and parents before their children.

    Args:
        tokens: Token ids, `[rows, nodes]`.
        parents: Index of each node's parent, `[rows, nodes]`; -1 at the root.
        depths: Distance from the root, `[rows, nodes]`.
        ranks: Place in the list of its parent's children, `[rows, nodes]`.
        fed: Place among the nodes that went through the draft model, -1 if it did not, `[rows, nodes]`.
        probs: The draft model's probability, `[rows, nodes]`.
        scores: P(accepted | parent accepted), `[rows, nodes]`.
        paths: P(accepted): the product of the scores from the root down, `[rows, nodes]`.
        counts: Nodes of each row, `[rows]`.
    """

    tokens: Ints
    parents: Ints
    depths: Ints
    ranks: Ints
    fed: Ints
    probs: ProbArray
    scores: Floats
    paths: Floats
    counts: Ints

    @classmethod
    def of_roots(cls, roots: Ints, capacity: int) -> DraftNodes:
        """Trees of their roots alone, with room for `capacity` nodes; the roots count as fed."""
        shape = len(roots), capacity
        tokens, parents, depths, ranks, fed = (np.zeros(shape, np.int64) for _ in range(5))
        tokens[:, 0], parents[:], fed[:, 1:] = roots, -1, -1
        probs, scores, paths = np.zeros(shape, np.float32), np.ones(shape), np.ones(shape)
        return cls(tokens, parents, depths, ranks, fed, probs, scores, paths, np.ones(len(roots), np.int64))

    def of_rows(self, rows: list[int]) -> DraftNodes:
        """The trees of some rows."""
        return DraftNodes._make(np.ascontiguousarray(array[rows]) for array in self)


@kernel_part
def class_of(prob: float, classes: int) -> int:
    """Class of a probability. Of its root: most are small, and there a small difference tells much."""
    return min(int(np.sqrt(max(prob, 0.0)) * classes), classes - 1)


@kernel
def add_children(
    nodes: DraftNodes, level: Ints, listed: Ints, probs: ProbArray, rates: Floats, max_depths: Ints
) -> None:
    """Adds the lists of a level's nodes as their children.

    Args:
        nodes: Changed; what there is no room for is left out.
        level: The nodes whose lists these are, -1 for none, `[rows, width]`.
        listed: Tokens, `[rows, width, children]`; -1 for none.
        probs: Their probabilities, `[rows, width, children]`.
        rates: P(accepted | parent accepted) by class of rank and of probability, `[rank classes, classes]`.
        max_depths: Largest depth of a node, `[rows]`.
    """
    for row in range(level.shape[0]):
        for place in range(level.shape[1]):
            parent = level[row, place]
            if parent < 0 or nodes.depths[row, parent] >= max_depths[row]:
                continue
            for rank in range(listed.shape[2]):
                node = nodes.counts[row]
                if listed[row, place, rank] < 0 or node >= nodes.tokens.shape[1]:
                    continue
                prob = probs[row, place, rank]
                score = rates[min(rank, rates.shape[0] - 1), class_of(prob, rates.shape[1])]
                nodes.tokens[row, node] = listed[row, place, rank]
                nodes.parents[row, node] = parent
                nodes.depths[row, node] = nodes.depths[row, parent] + 1
                nodes.ranks[row, node] = rank
                nodes.probs[row, node] = prob
                nodes.scores[row, node] = score
                nodes.paths[row, node] = nodes.paths[row, parent] * score
                nodes.counts[row] += 1


@kernel
def choose_level(nodes: DraftNodes, since: Ints, least: float, max_depths: Ints, num_fed: int, level: Ints) -> int:
    """Takes each row's best nodes that have not been fed, to be fed next.

    Args:
        nodes: `fed` of those taken is set.
        since: Nodes before are not looked at, `[rows]`.
        least: Nodes whose path product is below are not fed.
        max_depths: Largest depth of a node, `[rows]`: nodes there are not fed.
        num_fed: Nodes fed so far, padding included.
        level: Written: the nodes taken, then -1, `[rows, width]`.

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
                if nodes.paths[row, node] >= least and (best < 0 or nodes.paths[row, node] > nodes.paths[row, best]):
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
    """Tokens of a level's nodes, places of their parents among the nodes fed, and depths; `[rows, width]` each.

    Args:
        nodes: The draft.
        level: Nodes, -1 at padding, `[rows, width]`: token 0, parent -1, depth 0.
    """
    tokens, parents, depths = np.zeros_like(level), np.full_like(level, -1), np.zeros_like(level)
    for row in range(level.shape[0]):
        for place in range(level.shape[1]):
            node = level[row, place]
            if node >= 0:
                tokens[row, place], depths[row, place] = nodes.tokens[row, node], nodes.depths[row, node]
            if node > 0:
                parents[row, place] = nodes.fed[row, nodes.parents[row, node]]
    return tokens, parents, depths


@kernel
def write_trees(nodes: DraftNodes, best_first: bool, tokens: Ints, parents: Ints, scores: ProbArray, fed: Ints) -> int:
    """Writes each row's nodes as a token tree; returns the number of nodes of the largest.

    Args:
        nodes: The draft.
        best_first: Otherwise in the order in which they were made.
        tokens: Written: token ids, `[rows, nodes]`.
        parents: Written, `[rows, nodes]`; padding stays as it is.
        scores: Written: P(accepted | parent accepted), `[rows, nodes]`.
        fed: Written: places among the nodes fed, -1 for none, `[rows, nodes]`.
    """
    widest = 1
    for row in range(tokens.shape[0]):
        count = nodes.counts[row]
        order = np.arange(count)
        if best_first:  # a stable sort: a parent stands before a child that is certain
            order = np.argsort(-nodes.paths[row, :count], kind="mergesort")
        place = np.empty(count, np.int64)
        used = min(count, tokens.shape[1])
        for i in range(used):
            node = order[i]
            place[node] = i
            tokens[row, i] = nodes.tokens[row, node]
            parents[row, i] = place[nodes.parents[row, node]] if i > 0 else -1
            scores[row, i] = nodes.scores[row, node]
            fed[row, i] = nodes.fed[row, node]
        widest = max(widest, used)
    return widest


@kernel
def child_of(nodes: DraftNodes, row: int, parent: int, token: int) -> int:
    """The child of a node that holds a token, -1 if there is none."""
    for node in range(parent + 1, nodes.counts[row]):
        if nodes.parents[row, node] == parent and nodes.tokens[row, node] == token:
            return node
    return -1


@kernel
def count_children(
    nodes: DraftNodes, row: int, parent: int, token: int, tried: Floats, hit: Floats, decay: float
) -> int:
    """Counts the list of a node that was right; returns the child that holds the token, -1 for none, -2 for no list."""
    found = -2
    for child in range(parent + 1, nodes.counts[row]):
        if nodes.parents[row, child] != parent:
            continue
        if found == -2:
            tried *= decay
            hit *= decay
        rank = min(nodes.ranks[row, child], tried.shape[0] - 1)
        place = class_of(nodes.probs[row, child], tried.shape[1])
        tried[rank, place] += 1.0
        if nodes.tokens[row, child] == token:
            hit[rank, place] += 1.0
            found = child
        found = max(found, -1)
    return found


@kernel
def follow(
    nodes: DraftNodes, known: Ints, counts: Ints, tried: Floats, hit: Floats, by_depth: Floats, decay: float, fed: Ints
) -> None:
    """Walks each row's tree along the tokens that the target has picked, and counts which drafts were right.

    Args:
        nodes: What was drafted.
        known: The tokens after the root, `[rows, tokens]`.
        counts: How many there are, `[rows]`.
        tried: Changed: children whose parent was right, by class of rank and of probability, `[rank classes, classes]`.
        hit: Changed: those of them that were right.
        by_depth: Changed: lists whose parent was right, by its depth, and those that held the right token,
            `[2, depths]`.
        decay: Factor on the counts so far for each list.
        fed: Written: places among the nodes fed of the nodes on the way, the root's first, then -1,
            `[rows, tokens + 1]`. The last token is the next root, and is fed again for what follows it.
    """
    for row in range(known.shape[0]):
        fed[row, :] = -1
        node = 0
        if counts[row] > 0:
            fed[row, 0] = 0
        for i in range(counts[row]):
            node = count_children(nodes, row, node, known[row, i], tried, hit, decay)
            if node >= -1 and i < by_depth.shape[1]:
                by_depth[:, i] *= decay
                by_depth[0, i] += 1.0
                by_depth[1, i] += 1.0 if node >= 0 else 0.0
            if node < 0 or i + 1 == counts[row] or nodes.fed[row, node] < 0:
                break
            fed[row, i + 1] = nodes.fed[row, node]
