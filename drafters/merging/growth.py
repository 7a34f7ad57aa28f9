"""Joins the trees of several sources into one, and learns what nodes that certain sources agree on are worth."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from specdec.drafters.trees.heap import pop_best, push_best
from specdec.drafters.trees.rank_tree import class_of
from specdec.kernels import Bools, Floats, Ints, kernel, kernel_part

DEPTH_CLASSES = 4
"""Depths whose acceptances are counted apart; deeper ones count as the last."""
SCORE_BINS = 12
MOST_SURE = 0.99
"""No combination of scores counts as more: a node that is certain would let its child overtake it."""
ROOT = np.array([[0], [-1], [0], [0], [-1], [-1], [-1], [0]])
"""What a store holds of a root, its token excepted."""
LEAST_COUNTED = 0.2
"""A node counts for this much at least, however sure another source is of another token: it was wrong nevertheless."""


class Candidates(NamedTuple):
    """Nodes that any source has named, one row each per row of the batch, the root first; a path stands there once.

    Args:
        tokens: Token ids, `[rows, nodes]`.
        parents: Index of each node's parent, `[rows, nodes]`; -1 at the root.
        depths: Distance from the root, `[rows, nodes]`.
        named: Sources that have named the node: source s as bit s, `[rows, nodes]`.
        first_child: -1 for none, `[rows, nodes]`.
        last_child: -1 for none, `[rows, nodes]`.
        next_sibling: -1 for none, `[rows, nodes]`.
        written: Place in the merged tree, -1 for none, `[rows, nodes]`.
        scores: The sources' scores, combined, `[rows, nodes]`.
        rates: How often such nodes were accepted where no other source objected, `[rows, nodes]`.
        open_shares: What is left of that by likelier siblings that other sources have named, `[rows, nodes]`.
        counts: Nodes of each row, `[rows]`.
    """

    tokens: Ints
    parents: Ints
    depths: Ints
    named: Ints
    first_child: Ints
    last_child: Ints
    next_sibling: Ints
    written: Ints
    scores: Floats
    rates: Floats
    open_shares: Floats
    counts: Ints


class CandidateStore(NamedTuple):
    """The arrays behind `Candidates`: a few large ones, because each array that a kernel is handed takes its time.

    Args:
        ints: Tokens, parents, depths, sources, first and last child, next sibling and place, `[8, rows, nodes]`.
        floats: Scores, rates and open shares, `[3, rows, nodes]`.
        counts: Nodes of each row, `[rows]`.
    """

    ints: Ints
    floats: Floats
    counts: Ints

    @classmethod
    def of_roots(cls, roots: Ints, capacity: int) -> CandidateStore:
        """Rows of their roots `[rows]` alone, with room for so many nodes each."""
        shape = len(roots), capacity
        store = cls(np.empty((8, *shape), np.int64), np.empty((3, *shape)), np.empty(len(roots), np.int64))
        store.begin(roots)
        return store

    def begin(self, roots: Ints) -> None:
        """Forgets all nodes but the roots, `[rows]`."""
        self.ints[:, :, 0] = ROOT
        self.ints[0, :, 0] = roots
        self.counts[:] = 1

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and nodes of each at most."""
        return self.ints.shape[1], self.ints.shape[2]


@kernel_part
def candidates_in(store: CandidateStore) -> Candidates:
    """Each array by its name."""
    ints, floats = store.ints, store.floats
    return Candidates(
        ints[0],
        ints[1],
        ints[2],
        ints[3],
        ints[4],
        ints[5],
        ints[6],
        ints[7],
        floats[0],
        floats[1],
        floats[2],
        store.counts,
    )


@kernel_part
def child_with(nodes: Candidates, row: int, parent: int, token: int) -> int:
    """The child of a node that holds a token, -1 for none."""
    child = nodes.first_child[row, parent]
    while child >= 0 and nodes.tokens[row, child] != token:
        child = nodes.next_sibling[row, child]
    return int(child)


@kernel
def add_tree(
    store: CandidateStore,
    source: int,
    tokens: Ints,
    parents: Ints,
    scores: NDArray[np.float32],
    max_depths: Ints,
    vocab_size: int,
    node_of: Ints,
    num_given: Ints,
) -> int:
    """Adds a source's tree to the candidates.

    A node that was there gets `1 - (1 - a)(1 - b)` of its scores a and b: sources that err for different reasons are
    right together more often than either. Where they do not, the counts of that combination tell.

    Args:
        store: Changed; there must be room.
        source: Its number.
        tokens: `[rows, nodes]`.
        parents: `[rows, nodes]`.
        scores: P(accepted | parent accepted), `[rows, nodes]`.
        max_depths: Largest depth of a node, `[rows]`: what is deeper is left out.
        vocab_size: Tokens must be below.
        node_of: Written: each node's place among the candidates, -1 where it is left out, `[rows, nodes]`.
        num_given: Nodes in front that are candidates already and not the source's own, the root included, `[rows]`.

    Returns:
        How many draft tokens were taken, over all rows; -1 where the tree is not valid, and nothing has changed then.
    """
    nodes = candidates_in(store)
    for row in range(tokens.shape[0]):
        if tokens[row, 0] != nodes.tokens[row, 0]:
            return -1
        for node in range(tokens.shape[1]):
            if not (0 <= tokens[row, node] < vocab_size and -1 <= parents[row, node] < node):
                return -1
    bit = 1 << source
    taken = 0
    for row in range(tokens.shape[0]):
        node_of[row, 0] = 0
        for node in range(1, tokens.shape[1]):
            node_of[row, node] = -1
            above = node_of[row, parents[row, node]] if parents[row, node] >= 0 else -1
            if above < 0 or nodes.depths[row, above] >= max_depths[row]:
                continue
            score = min(float(scores[row, node]), MOST_SURE) if scores[row, node] > 0.0 else 0.0
            found = child_with(nodes, row, above, tokens[row, node])
            if node < num_given[row]:
                node_of[row, node] = found
                continue
            if found < 0:
                found = nodes.counts[row]
                nodes.counts[row] += 1
                nodes.tokens[row, found] = tokens[row, node]
                nodes.parents[row, found] = above
                nodes.depths[row, found] = nodes.depths[row, above] + 1
                nodes.named[row, found] = bit
                nodes.first_child[row, found] = nodes.last_child[row, found] = nodes.next_sibling[row, found] = -1
                if nodes.first_child[row, above] < 0:
                    nodes.first_child[row, above] = found
                else:
                    nodes.next_sibling[row, nodes.last_child[row, above]] = found
                nodes.last_child[row, above] = found
                nodes.scores[row, found] = score
            elif not nodes.named[row, found] & bit:  # of equal siblings, the first counts
                nodes.named[row, found] |= bit
                combined = 1.0 - (1.0 - nodes.scores[row, found]) * (1.0 - score)
                nodes.scores[row, found] = min(combined, MOST_SURE)
            node_of[row, node] = found
            taken += 1
    return taken


@kernel_part
def open_share(nodes: Candidates, row: int, node: int) -> float:
    """What the best of a node's likelier siblings leaves of it that has a source which did not name this node.

    Only one token can come next: a second choice of one source is worth little where another source is sure.
    """
    rival = 0.0
    sibling = nodes.first_child[row, nodes.parents[row, node]]
    while sibling >= 0:
        rate = nodes.rates[row, sibling]
        if rate > rival and rate > nodes.rates[row, node] and nodes.named[row, sibling] & ~nodes.named[row, node]:
            rival = rate
        sibling = nodes.next_sibling[row, sibling]
    return float(1.0 - rival)


@kernel_part
def rate_of(tried: Floats, hit: Floats, prior: float, named: int, depth: int, score: float) -> float:
    """A score's rate of acceptance among nodes of the same sources and depth, between the two nearest bins."""
    at = min(depth, DEPTH_CLASSES) - 1
    place = class_of(score, 0, SCORE_BINS, True)
    low = min(int(place), SCORE_BINS - 2)
    # A bin's own score counts like a number of observations.
    lower = (hit[named, at, low] + prior * ((low + 0.5) / SCORE_BINS) ** 2) / (tried[named, at, low] + prior)
    upper = (hit[named, at, low + 1] + prior * ((low + 1.5) / SCORE_BINS) ** 2) / (tried[named, at, low + 1] + prior)
    return float(min(max(lower + (place - low) * (upper - lower), 1e-6), MOST_SURE))


@kernel
def grow_merged(
    store: CandidateStore,
    tried: Floats,
    hit: Floats,
    prior: float,
    tokens: Ints,
    parents: Ints,
    scores: NDArray[np.float32],
) -> tuple[int, float]:
    """Writes each row's merged tree, best first by the product of calibrated scores from the root down.

    Args:
        store: `rates` and `open_shares` are set of the children of nodes in the tree, and `written`.
        tried: Nodes whose parent was accepted, each for its open share, by sources, depth and bin of score,
            `[2 ** sources, depths, bins]`.
        hit: Those among them that were accepted, each for 1.
        prior: How many of them a score is worth by itself.
        tokens: Written: token ids, `[rows, nodes]`.
        parents: Written: parents, `[rows, nodes]`; -1 for the others.
        scores: Written: P(accepted | parent accepted), `[rows, nodes]`.

    Returns:
        Nodes of the largest tree, and how many draft tokens can be expected to be accepted, over all rows.
    """
    nodes = candidates_in(store)
    capacity = nodes.tokens.shape[1]
    heap = np.empty(capacity, np.int64)
    paths = np.empty(capacity)
    widest, expected = 1, 0.0
    for row in range(tokens.shape[0]):
        nodes.written[row, 1 : nodes.counts[row]] = -1
        nodes.open_shares[row, 1 : nodes.counts[row]] = 1.0  # of those too whose parent does not come into the tree
        tokens[row], parents[row], scores[row] = 0, -1, 0.0
        tokens[row, 0] = nodes.tokens[row, 0]
        paths[0] = 1.0
        node, waiting, made = 0, 0, 1
        while True:
            child = nodes.first_child[row, node]
            while child >= 0:
                named, depth, score = nodes.named[row, child], nodes.depths[row, child], nodes.scores[row, child]
                nodes.rates[row, child] = rate_of(tried, hit, prior, named, depth, score)
                child = nodes.next_sibling[row, child]
            child = nodes.first_child[row, node]
            while child >= 0:
                nodes.open_shares[row, child] = open_share(nodes, row, child)
                paths[child] = paths[node] * nodes.rates[row, child] * nodes.open_shares[row, child]
                waiting = push_best(heap, waiting, paths, child)
                child = nodes.next_sibling[row, child]
            if waiting == 0 or made == tokens.shape[1]:
                break
            waiting = pop_best(heap, waiting, paths)
            node = heap[waiting]
            nodes.written[row, node] = made
            tokens[row, made] = nodes.tokens[row, node]
            parents[row, made] = nodes.written[row, nodes.parents[row, node]]
            scores[row, made] = nodes.rates[row, node] * nodes.open_shares[row, node]
            expected += paths[node]
            made += 1
        widest = max(widest, made)
    return widest, expected


@kernel
def follow_merged(
    store: CandidateStore,
    known: Ints,
    counts: Ints,
    decay: float,
    tried: Floats,
    hit: Floats,
    credited: Ints,
    own: Ints,
    gains: Ints,
) -> int:
    """Walks each row's candidates along the target's tokens: counts what was right, and to whom it is owed.

    All candidates are counted whose parent was right, those too that were left out of the tree: the target's token is
    known there.

    Args:
        store: What was named, as `grow_merged` left it.
        known: The tokens behind the root, `[rows, tokens]`.
        counts: How many there are, `[rows]`: all but the last were accepted.
        decay: Factor on the counts so far.
        tried: Changed; see `grow_merged`.
        hit: Changed.
        credited: Changed: accepted tokens by the sources that named them, `[2 ** sources]`.
        own: Written: how far down each source's own nodes go along the accepted ones, `[rows, sources]`.
        gains: Written: accepted tokens that would not be if this source had named nothing, over all rows, `[sources]`.

    Returns:
        How many tokens were committed, over all rows.
    """
    nodes = candidates_in(store)
    tried *= decay
    hit *= decay
    own[:] = 0
    without = np.zeros_like(own)
    for row in range(known.shape[0]):
        node = 0
        for i in range(counts[row]):
            found = -1
            child = nodes.first_child[row, node]
            while child >= 0:
                at = min(nodes.depths[row, child], DEPTH_CLASSES) - 1
                place = class_of(nodes.scores[row, child], 0, SCORE_BINS, True)
                low = min(int(place), SCORE_BINS - 2)
                share = place - low
                named = nodes.named[row, child]
                weight = max(nodes.open_shares[row, child], LEAST_COUNTED)
                tried[named, at, low] += (1.0 - share) * weight
                tried[named, at, low + 1] += share * weight
                if nodes.tokens[row, child] == known[row, i]:
                    hit[named, at, low] += 1.0 - share
                    hit[named, at, low + 1] += share
                    found = child
                child = nodes.next_sibling[row, child]
            if found < 0:
                break
            node = found
            if i + 1 == counts[row]:
                break
            named = nodes.named[row, node]
            credited[named] += 1
            for source in range(own.shape[1]):
                if own[row, source] == i and named >> source & 1:
                    own[row, source] += 1
                if without[row, source] == i and named & ~(1 << source):
                    without[row, source] += 1
    gains[:] = 0
    for row in range(known.shape[0]):
        for source in range(own.shape[1]):
            gains[source] += counts[row] - 1 - without[row, source]
    return int(counts.sum())


@kernel
def mark_verified(store: CandidateStore, tokens: Ints, parents: Ints, verified: Bools) -> None:
    """Finds out which candidates stand in the verified tree, however it was cut or rearranged.

    Args:
        store: What was named.
        tokens: Of the verified tree, `[rows, nodes]`.
        parents: -1 at padding, `[rows, nodes]`.
        verified: Written, `[rows, candidates]`.
    """
    nodes = candidates_in(store)
    verified[:] = False
    place = np.empty(tokens.shape[1], np.int64)
    for row in range(tokens.shape[0]):
        verified[row, 0] = True
        place[0] = 0
        for node in range(1, tokens.shape[1]):
            above = place[parents[row, node]] if parents[row, node] >= 0 else -1
            place[node] = child_with(nodes, row, above, tokens[row, node]) if above >= 0 else -1
            if place[node] >= 0:
                verified[row, place[node]] = True
