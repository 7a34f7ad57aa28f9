"""Joins the trees of several sources into one, and learns what nodes that certain sources agree on are worth."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specdec.drafters.trees.heap import pop_best, push_best
from specdec.drafters.trees.rank_tree import class_of
from specdec.kernels import Floats, Ints, kernel, kernel_part

DEPTH_CLASSES = 4
"""Depths whose acceptances are counted apart, deeper ones as the last; more of them learn more slowly."""
SCORE_BINS = 12
"""Bins that scores are counted in; more of them tell scores apart more finely, and learn more slowly."""
MOST_SURE = 0.99
"""Upper bound of a node's probability; at 1, a child could come before its parent."""
LEAST_COUNTED = 0.2
"""Least weight of a node in the counts, however sure another source is of another token; raise it to learn more from
nodes that were unlikely anyway."""
LEAST_LIKELY = 0.3
"""Least probability of a leaf from which sources continue; raise it to chain less often."""

Nodes = NDArray[np.void]
NODE = np.dtype(
    [
        ("token", np.int64),
        ("parent", np.int64),  # -1 at the root
        ("depth", np.int64),
        ("sources", np.int64),  # that proposed it: source s as bit s
        ("first_child", np.int64),  # -1 for none
        ("last_child", np.int64),
        ("next_sibling", np.int64),
        ("place", np.int64),  # in the merged tree, -1 for none
        ("score", np.float64),  # the sources' scores, combined
        ("rate", np.float64),  # how often such nodes were accepted where no other source objected
        ("open_share", np.float64),  # what likelier siblings of other sources leave of that
    ]
)
"""A candidate: a node that any source has proposed. Each path stands in a row's candidates once, the root first."""


def new_candidates(rows: int, capacity: int) -> Nodes:
    """Room for candidates, `[rows, capacity]`."""
    return np.zeros((rows, capacity), NODE)


@kernel
def begin(nodes: Nodes, counts: Ints, roots: Ints) -> None:
    """Forgets all candidates but the roots, `[rows]`; `counts` are the candidates of each row, `[rows]`."""
    for row in range(roots.shape[0]):
        counts[row] = 1
        nodes[row, 0]["token"] = roots[row]
        nodes[row, 0]["parent"] = -1
        nodes[row, 0]["depth"] = nodes[row, 0]["place"] = 0
        nodes[row, 0]["first_child"] = nodes[row, 0]["last_child"] = -1


@kernel_part
def child_with(nodes: Nodes, row: int, parent: int, token: int) -> int:
    """The child of a candidate that holds a token, -1 for none."""
    child = nodes[row, parent]["first_child"]
    while child >= 0 and nodes[row, child]["token"] != token:
        child = nodes[row, child]["next_sibling"]
    return int(child)


@kernel_part
def add_child(nodes: Nodes, counts: Ints, row: int, above: int, token: int) -> int:
    """Appends a candidate; returns where it stands."""
    new = counts[row]
    counts[row] += 1
    nodes[row, new]["token"] = token
    nodes[row, new]["parent"] = above
    nodes[row, new]["depth"] = nodes[row, above]["depth"] + 1
    nodes[row, new]["sources"] = 0
    nodes[row, new]["score"] = 0.0
    nodes[row, new]["first_child"] = nodes[row, new]["last_child"] = nodes[row, new]["next_sibling"] = -1
    if nodes[row, above]["first_child"] < 0:
        nodes[row, above]["first_child"] = new
    else:
        nodes[row, nodes[row, above]["last_child"]]["next_sibling"] = new
    nodes[row, above]["last_child"] = new
    return int(new)


@kernel
def add_tree(
    nodes: Nodes,
    counts: Ints,
    starts: Ints,
    source: int,
    tokens: Ints,
    parents: Ints,
    scores: NDArray[np.float32],
    max_depths: Ints,
    vocab_size: int,
) -> int:
    """Adds a source's tree to the candidates.

    A node that was there gets `1 - (1 - a)(1 - b)` of its scores a and b: sources that err for different reasons are
    right together more often than either. Where they do not, the counts of that combination tell.

    Args:
        nodes: Changed; there must be room.
        counts: Changed: candidates of each row, `[rows]`.
        starts: The candidate that the tree's root stands for, `[rows]`; -1 to leave a row out.
        source: Its number.
        tokens: `[rows, nodes]`.
        parents: `[rows, nodes]`.
        scores: P(accepted | parent accepted), `[rows, nodes]`.
        max_depths: Largest depth of a candidate, `[rows]`: what is deeper is left out.
        vocab_size: Tokens must be below.

    Returns:
        How many draft tokens were taken, over all rows; -1 where the tree is not valid, and nothing has changed then.
    """
    for row in range(tokens.shape[0]):
        if starts[row] >= 0 and tokens[row, 0] != nodes[row, starts[row]]["token"]:
            return -1
        for node in range(tokens.shape[1]):
            if not (0 <= tokens[row, node] < vocab_size and -1 <= parents[row, node] < node):
                return -1
    bit, taken = 1 << source, 0
    place = np.empty(tokens.shape[1], np.int64)
    for row in range(tokens.shape[0]):
        place[0] = starts[row]
        for node in range(1, tokens.shape[1]):
            place[node] = -1
            above = place[parents[row, node]] if parents[row, node] >= 0 else -1
            if above < 0 or nodes[row, above]["depth"] >= max_depths[row]:
                continue
            found = child_with(nodes, row, above, tokens[row, node])
            if found < 0:
                found = add_child(nodes, counts, row, above, tokens[row, node])
            if not nodes[row, found]["sources"] & bit:  # of equal siblings, the first counts
                nodes[row, found]["sources"] |= bit
                score = min(float(scores[row, node]), MOST_SURE) if scores[row, node] > 0.0 else 0.0
                combined = 1.0 - (1.0 - nodes[row, found]["score"]) * (1.0 - score)
                nodes[row, found]["score"] = min(combined, MOST_SURE)
            place[node] = found
            taken += 1
    return taken


@kernel_part
def open_share(nodes: Nodes, row: int, node: int) -> float:
    """What a node's likelier siblings leave of it: 1 - the best rate among those of a source that did not propose it.

    Only one token can come next: a second choice of one source is worth little where another source is sure.
    """
    rival, rate, sources = 0.0, nodes[row, node]["rate"], nodes[row, node]["sources"]
    sibling = nodes[row, nodes[row, node]["parent"]]["first_child"]
    while sibling >= 0:
        other = nodes[row, sibling]["rate"]
        if other > rival and other > rate and nodes[row, sibling]["sources"] & ~sources:
            rival = other
        sibling = nodes[row, sibling]["next_sibling"]
    return float(1.0 - rival)


@kernel_part
def rate_of(tried: Floats, hit: Floats, prior: float, sources: int, depth: int, score: float) -> float:
    """A score's rate of acceptance among nodes of the same sources and depth, between the two nearest bins."""
    at = min(depth, DEPTH_CLASSES) - 1
    place = class_of(score, 0, SCORE_BINS, True)
    low = min(int(place), SCORE_BINS - 2)
    # A bin's own score counts like a number of observations.
    lower = (hit[sources, at, low] + prior * ((low + 0.5) / SCORE_BINS) ** 2) / (tried[sources, at, low] + prior)
    upper = (hit[sources, at, low + 1] + prior * ((low + 1.5) / SCORE_BINS) ** 2) / (
        tried[sources, at, low + 1] + prior
    )
    return float(min(max(lower + (place - low) * (upper - lower), 1e-6), MOST_SURE))


@kernel
def grow_merged(
    nodes: Nodes,
    counts: Ints,
    tried: Floats,
    hit: Floats,
    prior: float,
    tokens: Ints,
    parents: Ints,
    scores: NDArray[np.float32],
    leaves: Ints,
) -> int:
    """Writes each row's merged tree, best first by the product of calibrated scores from the root down.

    Args:
        nodes: Their `rate`, `open_share` and `place` are set.
        counts: Candidates of each row, `[rows]`.
        tried: Nodes whose parent was accepted, each for its open share, by sources, depth and bin of score,
            `[2 ** sources, depths, bins]`.
        hit: Those among them that were accepted, each for 1.
        prior: How many of them a score is worth by itself.
        tokens: Written: token ids, `[rows, nodes]`.
        parents: Written: parents, `[rows, nodes]`; -1 for the others.
        scores: Written: P(accepted | parent accepted), `[rows, nodes]`.
        leaves: Written: each row's likeliest candidate without children, -1 where none is likely, `[rows]`.

    Returns:
        Nodes of the largest tree.
    """
    heap, paths = np.empty(nodes.shape[1], np.int64), np.empty(nodes.shape[1])
    widest = 1
    for row in range(tokens.shape[0]):
        for node in range(1, counts[row]):
            nodes[row, node]["place"] = -1
            nodes[row, node]["open_share"] = 1.0  # of those too whose parent does not come into the tree
        tokens[row], parents[row], scores[row], leaves[row] = 0, -1, 0.0, -1
        tokens[row, 0] = nodes[row, 0]["token"]
        paths[0] = 1.0
        node, waiting, made = 0, 0, 1
        while True:
            child = nodes[row, node]["first_child"]
            if child < 0 and node > 0 and leaves[row] < 0 and paths[node] >= LEAST_LIKELY:
                leaves[row] = node
            while child >= 0:
                sources, depth, score = (
                    nodes[row, child]["sources"],
                    nodes[row, child]["depth"],
                    nodes[row, child]["score"],
                )
                nodes[row, child]["rate"] = rate_of(tried, hit, prior, sources, depth, score)
                child = nodes[row, child]["next_sibling"]
            child = nodes[row, node]["first_child"]
            while child >= 0:
                nodes[row, child]["open_share"] = open_share(nodes, row, child)
                paths[child] = paths[node] * nodes[row, child]["rate"] * nodes[row, child]["open_share"]
                waiting = push_best(heap, waiting, paths, child)
                child = nodes[row, child]["next_sibling"]
            if waiting == 0 or made == tokens.shape[1]:
                break
            waiting = pop_best(heap, waiting, paths)
            node = heap[waiting]
            nodes[row, node]["place"] = made
            tokens[row, made] = nodes[row, node]["token"]
            parents[row, made] = nodes[row, nodes[row, node]["parent"]]["place"]
            scores[row, made] = nodes[row, node]["rate"] * nodes[row, node]["open_share"]
            made += 1
        widest = max(widest, made)
    return widest


@kernel
def paths_to(nodes: Nodes, leaves: Ints) -> tuple[NDArray[np.int32], Ints]:
    """The tokens from each root's child down to a candidate, `[rows, depth]`, and how many they are, `[rows]`."""
    rows = leaves.shape[0]
    depths = np.zeros(rows, np.int64)
    for row in range(rows):
        depths[row] = nodes[row, leaves[row]]["depth"] if leaves[row] >= 0 else 0
    paths = np.zeros((rows, depths.max()), np.int32)
    for row in range(rows):
        node = leaves[row]
        for at in range(depths[row] - 1, -1, -1):
            paths[row, at] = nodes[row, node]["token"]
            node = nodes[row, node]["parent"]
    return paths, depths


@kernel
def follow_merged(
    nodes: Nodes,
    known: Ints,
    lengths: Ints,
    decay: float,
    tried: Floats,
    hit: Floats,
    by_cost: Ints,
    credited: Ints,
    own: Ints,
    gains: Ints,
) -> None:
    """Walks each row's candidates along the target's tokens: counts what was right, and who proposed it.

    All candidates are counted whose parent was right, those too that were left out of the tree: the target's token is
    known there.

    Args:
        nodes: As `grow_merged` left them.
        known: The tokens after the root, `[rows, tokens]`.
        lengths: How many there are, `[rows]`: all but the last were accepted.
        decay: Factor on the counts so far.
        tried: Changed; see `grow_merged`.
        hit: Changed.
        by_cost: The sources, cheap ones first, `[sources]`.
        credited: Changed: accepted tokens by the sources that proposed them, `[2 ** sources]`.
        own: Written: how far each source's own nodes follow the accepted ones, `[rows, sources]`.
        gains: Written: accepted tokens that a source brings beyond what all cheaper ones together bring, over all rows,
            `[sources]`. Of two that propose the same the cheaper one is credited, so that not both seem worthless.
    """
    tried *= decay
    hit *= decay
    own[:] = 0
    gains[:] = 0
    reached = np.zeros(own.shape[1], np.int64)
    for row in range(known.shape[0]):
        node = 0
        reached[:] = 0
        for i in range(lengths[row]):
            found = -1
            child = nodes[row, node]["first_child"]
            while child >= 0:
                at = min(nodes[row, child]["depth"], DEPTH_CLASSES) - 1
                place = class_of(nodes[row, child]["score"], 0, SCORE_BINS, True)
                low = min(int(place), SCORE_BINS - 2)
                share, sources = place - low, nodes[row, child]["sources"]
                weight = max(nodes[row, child]["open_share"], LEAST_COUNTED)
                tried[sources, at, low] += (1.0 - share) * weight
                tried[sources, at, low + 1] += share * weight
                if nodes[row, child]["token"] == known[row, i]:
                    hit[sources, at, low] += 1.0 - share
                    hit[sources, at, low + 1] += share
                    found = child
                child = nodes[row, child]["next_sibling"]
            node = found
            if found < 0 or i + 1 == lengths[row]:
                break
            credited[nodes[row, node]["sources"]] += 1
            cheaper = 0
            for rank in range(own.shape[1]):
                source = by_cost[rank]
                cheaper |= 1 << source
                own[row, source] += own[row, source] == i and nodes[row, node]["sources"] >> source & 1
                reached[rank] += reached[rank] == i and nodes[row, node]["sources"] & cheaper != 0
        for rank in range(own.shape[1]):
            gains[by_cost[rank]] += reached[rank] - (reached[rank - 1] if rank > 0 else 0)


def sources_along(nodes: Nodes, row: int, path: Any) -> list[int]:
    """The sources that proposed each token of a path, as bits."""
    found, node = [], 0
    for token in path:
        node = int(nodes["first_child"][row, node])
        while nodes["token"][row, node] != token:
            node = int(nodes["next_sibling"][row, node])
        found.append(int(nodes["sources"][row, node]))
    return found


@functools.cache
def compile_kernels() -> None:
    """Compiles, or loads what was compiled before, so that no step of a generation waits for it."""
    ids, table, one = np.zeros((1, 2), np.int64), np.zeros((2, DEPTH_CLASSES, SCORE_BINS)), np.ones(1, np.int64)
    parents, scores, start = np.array([[-1, 0]]), np.zeros((1, 2), np.float32), np.zeros(1, np.int64)
    nodes, counts = new_candidates(1, 2), one.copy()
    begin(nodes, counts, start)
    add_tree(nodes, counts, start, 0, ids, parents, scores, one, 1)
    grow_merged(nodes, counts, table, table.copy(), 1.0, ids.copy(), ids.copy(), scores, start.copy())
    paths_to(nodes, start)
    own = np.zeros((1, 1), np.int64)
    follow_merged(nodes, ids, one, 1.0, table, table.copy(), start.copy(), ids[0].copy(), own, one.copy())
