"""Grows the best token tree out of one list of tokens per depth, and learns how good the places in these lists are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from specdec.drafters.ngrams.trie_growth import pop_best, push_best
from specdec.kernels import Floats, Ints, kernel, kernel_part

ProbArray = NDArray[np.float32]


@kernel_part
def class_of(prob: float, rank: int, classes: int, by_prob: bool) -> float:
    """Where a listed token stands among a head's classes: by its rank, or by the root of its probability.

    The root makes classes narrow where probabilities are small: most are, and there a small difference tells much.
    """
    if by_prob:
        return float(min(max(np.sqrt(prob) * classes - 0.5, 0.0), classes - 1.0))
    return float(min(rank, classes - 1))


@kernel_part
def rate_at(rates: Floats, head: int, place: float) -> float:
    """A head's rate between the two nearest classes."""
    low = min(int(place), rates.shape[1] - 2)
    return float(rates[head, low] + (place - low) * (rates[head, low + 1] - rates[head, low]))


@kernel_part
def grow_rank_tree(
    listed: Ints, scores: Floats, max_depth: int, tokens: Ints, parents: Ints, written_scores: NDArray[np.float32]
) -> int:
    """Writes one row's tree best first, after its root: a node at depth d is any token of list d - 1.

    A node waits as soon as its parent and its next better sibling are written, so at most two wait for each written.

    Args:
        listed: Tokens by depth, `[depths, ranks]`.
        scores: P(accepted | parent accepted) of each, `[depths, ranks]`.
        max_depth: Largest depth of a node, at most that of the lists.
        tokens: Written: token ids, `[nodes]`.
        parents: Written: parents, `[nodes]`.
        written_scores: Written: scores, `[nodes]`.

    Returns:
        The number of nodes, the root included.
    """
    ranks = listed.shape[1]
    size = tokens.shape[0]
    if max_depth == 0 or ranks == 0:
        return 1
    order = np.empty((max_depth, ranks), np.int64)  # ranks by falling score; mostly they fall already
    for depth in range(max_depth):
        for rank in range(ranks):
            place = rank
            while place > 0 and scores[depth, order[depth, place - 1]] < scores[depth, rank]:
                order[depth, place] = order[depth, place - 1]
                place -= 1
            order[depth, place] = rank
    heap = np.empty(2 * size, np.int64)
    paths = np.empty(2 * size)  # by waiting node, as for the next three
    above = np.empty(2 * size, np.int64)
    depths = np.empty(2 * size, np.int64)
    places = np.empty(2 * size, np.int64)
    written_paths = np.ones(size)
    paths[0] = scores[0, order[0, 0]]
    above[0] = depths[0] = places[0] = 0
    waiting = push_best(heap, 0, paths, 0)
    made = 1
    written = 1
    while written < size and waiting > 0:
        waiting = pop_best(heap, waiting, paths)
        node = heap[waiting]
        if paths[node] <= 0.0:
            break
        depth = depths[node]
        rank = order[depth, places[node]]
        tokens[written] = listed[depth, rank]
        parents[written] = above[node]
        written_scores[written] = scores[depth, rank]
        written_paths[written] = paths[node]
        if places[node] + 1 < ranks:
            above[made], depths[made], places[made] = above[node], depth, places[node] + 1
            paths[made] = written_paths[above[node]] * scores[depth, order[depth, places[made]]]
            waiting = push_best(heap, waiting, paths, made)
            made += 1
        if depth + 1 < max_depth:
            above[made], depths[made], places[made] = written, depth + 1, 0
            paths[made] = paths[node] * scores[depth + 1, order[depth + 1, 0]]
            waiting = push_best(heap, waiting, paths, made)
            made += 1
        written += 1
    return written


@kernel
def draft_rows(
    listed: Ints,
    probs: ProbArray,
    rates: Floats,
    by_prob: bool,
    max_depths: Ints,
    tokens: Ints,
    parents: Ints,
    scores: ProbArray,
) -> int:
    """Writes all rows' trees after their roots.

    Args:
        listed: The heads' best tokens, `[rows, heads, ranks]`.
        probs: The probabilities they give them, `[rows, heads, ranks]`.
        rates: P(accepted | parent accepted) by head and class, `[heads, classes]`.
        by_prob: Whether classes are of probabilities; of ranks otherwise.
        max_depths: Largest depth of a node, `[rows]`; 0 for the root alone.
        tokens: Written: token ids, `[rows, nodes]`.
        parents: Written: parents, `[rows, nodes]`; the others stay -1.
        scores: Written: P(accepted | parent accepted), `[rows, nodes]`.

    Returns:
        The number of nodes of the largest tree.
    """
    rows, heads, ranks = listed.shape
    expected = np.empty((heads, ranks))
    widest = 1
    for row in range(rows):
        for head in range(heads):
            for rank in range(ranks):
                place = class_of(probs[row, head, rank], rank, rates.shape[1], by_prob)
                expected[head, rank] = rate_at(rates, head, place)
        depth = min(max_depths[row], heads)
        grown = grow_rank_tree(listed[row], expected, depth, tokens[row], parents[row], scores[row])
        widest = max(widest, grown)
    return widest


@kernel
def count_ranks(
    listed: Ints, probs: ProbArray, by_prob: bool, known: Ints, counts: Ints, tried: Floats, hit: Floats, decay: float
) -> None:
    """Adds what became of the lists to the decayed counts: of each list whose depth the target has reached.

    Args:
        listed: The heads' best tokens, `[rows, heads, ranks]`.
        probs: The probabilities they gave them, `[rows, heads, ranks]`.
        by_prob: See `draft_rows`.
        known: The target's tokens, from the root's child on, `[rows, depths]`.
        counts: How many there are: all but the last were accepted, `[rows]`.
        tried: Changed: lists counted by head and class of each token, `[heads, classes]`.
        hit: Changed: those whose token was the target's, `[heads, classes]`.
        decay: Factor on a head's counts so far for each list.
    """
    rows, heads, ranks = listed.shape
    for row in range(rows):
        for head in range(min(heads, counts[row])):
            tried[head] *= decay
            hit[head] *= decay
            for rank in range(ranks):
                place = class_of(probs[row, head, rank], rank, tried.shape[1], by_prob)
                low = min(int(place), tried.shape[1] - 2)
                share = place - low
                tried[head, low] += 1.0 - share
                tried[head, low + 1] += share
                if listed[row, head, rank] == known[row, head]:
                    hit[head, low] += 1.0 - share
                    hit[head, low + 1] += share
