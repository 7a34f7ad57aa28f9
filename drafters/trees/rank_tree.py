"""Grows the best token tree out of ranked lists, and counts how often each place in the lists is right."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specdec.drafters.trees.heap import pop_best, push_best
from specdec.kernels import Floats, Ints, kernel, kernel_part

ProbArray = NDArray[np.float32]


@dataclass
class DecayedRates:
    """P(accepted | parent accepted) by class of a draft token, from decayed counts and a prior.

    Args:
        prior: Rates before anything is counted, `[lists, classes]`.
        prior_weight: Number of counted lists that the prior is worth.
        memory: Number of lists after which a count has decayed to 1/e.
    """

    prior: Floats
    prior_weight: float
    memory: float
    tried: Floats = field(init=False)
    hit: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.tried, self.hit = np.zeros_like(self.prior), np.zeros_like(self.prior)
        self.decay = float(np.exp(-1.0 / self.memory))

    def rates(self) -> Floats:
        """The current rates, `[lists, classes]`."""
        return (self.hit + self.prior * self.prior_weight) / (self.tried + self.prior_weight)

    def clear(self) -> None:
        """Returns to the prior."""
        self.tried[:] = self.hit[:] = 0.0

    def state_dict(self) -> dict[str, Any]:
        """The counts, as JSON types."""
        return {"tried": self.tried.tolist(), "hit": self.hit.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict()` returned."""
        self.tried[:], self.hit[:] = state["tried"], state["hit"]


@kernel_part
def class_of(prob: float, rank: int, classes: int, by_prob: bool) -> float:
    """Class of a listed token, between whole numbers where it is part of two: by its rank, or by its probability.

    Classes are of equal width in the root of the probability: narrow where probabilities are small, as most are.
    """
    if by_prob:
        return float(min(max(np.sqrt(prob) * classes - 0.5, 0.0), classes - 1.0))
    return float(min(rank, classes - 1))


@kernel_part
def rate_at(rates: Floats, head: int, place: float) -> float:
    """A head's rate, interpolated between the two nearest classes."""
    low = min(int(place), rates.shape[1] - 2)
    return float(rates[head, low] + (place - low) * (rates[head, low + 1] - rates[head, low]))


@kernel_part
def falling_order(rates: Floats) -> Ints:
    """The ranks of each level by falling rate, `[levels, ranks]`; mostly they fall already."""
    order = np.empty(rates.shape, np.int64)
    for level in range(rates.shape[0]):
        for rank in range(rates.shape[1]):
            place = rank
            while place > 0 and rates[level, order[level, place - 1]] < rates[level, rank]:
                order[level, place] = order[level, place - 1]
                place -= 1
            order[level, place] = rank
    return order


@kernel_part
def grow_ranked_tree(
    lists: NDArray[Any],
    by_token: bool,
    extra: NDArray[Any],
    rates: Floats,
    max_depth: int,
    least: float,
    tokens: Ints,
    parents: Ints,
    scores: ProbArray,
) -> int:
    """Writes one row's tree best first after its root: the children of a node are a list, by falling rate.

    A node waits as soon as its parent and its better sibling are written, so few wait for each that is written.

    Args:
        lists: Token ids, -1 for none: the children of each token, or of each depth from the root on, `[lists, ranks]`.
        by_token: Whether there is a list per token; otherwise per depth.
        extra: Further children of the root, -1 for none, `[ranks]`. Those that it has already are left out.
        rates: P(accepted | parent accepted) by level and rank, `[levels, ranks]`: of `extra`, then by depth; deeper
            nodes count as the last.
        max_depth: Largest depth of a node; 0 for the root alone.
        least: Nodes less likely to be reached are left out.
        tokens: Written: token ids, `[nodes]`; the root is there already.
        parents: Written: parents, `[nodes]`.
        scores: Written: P(accepted | parent accepted), `[nodes]`.

    Returns:
        The number of nodes, the root included.
    """
    size, ranks = tokens.shape[0], rates.shape[1]
    order = falling_order(rates)
    room = 2 * size + 2
    heap, paths = np.empty(room, np.int64), np.empty(room)
    above, levels, places = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64)
    depths, products = np.zeros(size, np.int64), np.ones(size)  # of written nodes
    made = waiting = 0
    written, node = 1, -1
    while True:
        for opened in range(3):  # the sibling after the node just written, its first child, and what is extra
            parent, level, place = written - 1, min(depths[written - 1] + 1, rates.shape[0] - 1), 0
            if opened == 0 and node >= 0:
                parent, level, place = above[node], levels[node], places[node] + 1
            elif opened == 2:
                level = 0
            if (opened == 0 and node < 0) or (opened == 2 and written > 1) or depths[parent] >= max_depth:
                continue
            of = tokens[parent] if by_token else depths[parent]
            while place < ranks:
                rank = order[level, place]
                path = products[parent] * rates[level, rank]
                if not (path > 0.0 and path >= least):
                    break
                token = extra[rank] if level == 0 else lists[of, rank]
                is_known = level == 0 and token == tokens[0]
                for other in range(ranks if level == 0 else 0):
                    is_known |= lists[of, other] == token
                if token >= 0 and not is_known:
                    above[made], levels[made], places[made], paths[made] = parent, level, place, path
                    waiting = push_best(heap, waiting, paths, made)
                    made += 1
                    break
                place += 1
        if waiting == 0 or written == size:
            return written
        waiting = pop_best(heap, waiting, paths)
        node = heap[waiting]
        parent, level, rank = above[node], levels[node], order[levels[node], places[node]]
        of = tokens[parent] if by_token else depths[parent]
        tokens[written] = extra[rank] if level == 0 else lists[of, rank]
        parents[written], scores[written] = parent, rates[level, rank]
        depths[written], products[written] = depths[parent] + 1, paths[node]
        written += 1


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
    """Writes the trees of the heads' lists after their roots.

    Args:
        listed: The heads' best tokens, `[rows, heads, ranks]`.
        probs: Their probabilities, `[rows, heads, ranks]`.
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
    expected, nothing = np.zeros((1 + heads, ranks)), np.full(ranks, -1)
    widest = 1
    for row in range(rows):
        for head in range(heads):
            for rank in range(ranks):
                place = class_of(probs[row, head, rank], rank, rates.shape[1], by_prob)
                expected[1 + head, rank] = rate_at(rates, head, place)
        depth = min(max_depths[row], heads)
        grown = grow_ranked_tree(
            listed[row], False, nothing, expected, depth, 0.0, tokens[row], parents[row], scores[row]
        )
        widest = max(widest, grown)
    return widest


@kernel
def count_ranks(
    listed: Ints, probs: ProbArray, by_prob: bool, known: Ints, counts: Ints, tried: Floats, hit: Floats, decay: float
) -> None:
    """Adds the heads' lists whose depth the target has reached to the decayed counts.

    Args:
        listed: The heads' best tokens, `[rows, heads, ranks]`.
        probs: Their probabilities, `[rows, heads, ranks]`.
        by_prob: See `draft_rows`.
        known: The target's tokens, from the root's child on, `[rows, depths]`.
        counts: Number of these: all but the last were accepted, `[rows]`.
        tried: Changed: lists counted by head and class of each token, `[heads, classes]`.
        hit: Changed: those whose token was the target's, `[heads, classes]`.
        decay: Factor on a head's earlier counts for each list.
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
