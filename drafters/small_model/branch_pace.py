"""Branches of a draft that grow by their confidence, when such a draft ends, and what outlives the target's choice."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from specdec.drafters.small_model.growth import DraftNodes
from specdec.kernels import Ints, kernel

OPENING_SCORE = 0.3
"""Tokens that are likelier open a branch of their own."""
WIDTH = 8
"""Branches that one forward may serve."""
FIRST_THRESHOLD = 0.01
LEAST_THRESHOLD, LARGEST_THRESHOLD = 1e-4, 0.1


def adjusted(threshold: float, num_drafted: int, num_accepted: int) -> float:
    """The confidence below which the next draft ends: LLMCad's alpha (arXiv 2309.04255, section 3.3), mended.

    Halved when all was right, so that drafts grow longer; else `threshold / T**((N_all - N_ok) / N_all)`. The paper
    prints this with a `T` that it does not define, and with which the threshold would have to grow. Here `T` is the
    accepted share, one token added to both counts: `(1 + N_ok) / (1 + N_all)`. It lies between 0 and 1, so that every
    error raises the threshold, the more the earlier it came, and nothing is divided by zero. The result is kept between
    `LEAST_THRESHOLD` and `LARGEST_THRESHOLD`.

    Args:
        threshold: The one so far.
        num_drafted: `N_all`: tokens of the likeliest path, or of the accepted one where that is longer.
        num_accepted: `N_ok`: accepted tokens.
    """
    if num_drafted < 1:
        return threshold
    if num_accepted >= num_drafted:
        threshold *= 0.5
    else:
        share = (1 + num_accepted) / (1 + num_drafted)
        threshold /= share ** ((num_drafted - num_accepted) / num_drafted)
    return min(max(threshold, LEAST_THRESHOLD), LARGEST_THRESHOLD)


@kernel
def outcome(tokens: Ints, parents: Ints, known: Ints) -> tuple[int, int]:
    """What became of one row's tree: see `adjusted`.

    Args:
        tokens: Of the tree, best first, `[nodes]`.
        parents: `[nodes]`, -1 at the root and at padding.
        known: The tokens behind the root, `[tokens]`.

    Returns:
        Length of the likeliest path, or of the accepted one where that is longer; length of the accepted path.
    """
    likeliest, end = 0, 0
    for node in range(1, len(parents)):
        if parents[node] == end:
            likeliest, end = likeliest + 1, node
    node, accepted = 0, 0
    while accepted < len(known):
        found = -1
        for child in range(node + 1, len(parents)):
            if parents[child] == node and tokens[child] == known[accepted]:
                found = child
                break
        if found < 0:
            break
        node, accepted = found, accepted + 1
    return max(likeliest, accepted), accepted


@kernel
def choose_branches(
    nodes: DraftNodes, opening_score: float, least_order: float, max_depths: Ints, num_fed: int, level: Ints
) -> int:
    """Takes the ends of the branches that are to be served next, as fair queueing would.

    A branch is a run of best tokens; any other token of a score of `opening_score` or more opens one. Its confidence
    `C_x` is the product of the scores on the path to its end, and `T_x` counts the tokens it was given. Of `M` tokens
    given to all, `M * C_x / sum(C)` are its due, and the branch that lacks most is next: LLMCad (arXiv 2309.04255,
    section 3.2). As many are served at once as come in turn before one of them comes again.

    Args:
        nodes: `fed` of those taken is set.
        opening_score: See above.
        least_order: Branches whose confidence is below are not gone on with.
        max_depths: Largest depth of a node, `[rows]`: nodes there are not fed.
        num_fed: Nodes that were fed so far, padding included.
        level: Written: the nodes taken, -1 behind them, `[rows, width]`.

    Returns:
        How many nodes the widest row has.
    """
    widest = 0
    for row in range(level.shape[0]):
        level[row, :] = -1
        count = nodes.counts[row]
        confidence, given = np.zeros(count), np.zeros(count)
        for node in range(1, count):
            is_end = nodes.fed[row, node] < 0 and nodes.depths[row, node] < max_depths[row]
            is_branch = nodes.ranks[row, node] == 0 or nodes.scores[row, node] >= opening_score
            if not is_end or not is_branch or nodes.orders[row, node] < least_order:
                continue
            confidence[node] = nodes.orders[row, node]
            first = node
            while first > 0 and nodes.ranks[row, first] == 0:
                first = nodes.parents[row, first]
                given[node] += first > 0  # the root belongs to no branch
        all_given, all_confidence = given.sum(), confidence.sum()
        taken = 0
        while taken < level.shape[1]:
            best, most = -1, -np.inf
            for node in range(1, count):
                if confidence[node] > 0:
                    lack = (all_given + 1) * confidence[node] / all_confidence - given[node]
                    if lack > most:
                        best, most = node, lack
            if best < 0 or nodes.fed[row, best] >= 0:
                break
            nodes.fed[row, best] = num_fed + taken
            level[row, taken] = best
            given[best] += 1
            all_given += 1
            taken += 1
        widest = max(widest, taken)
    return widest


class Subtrees(NamedTuple):
    """What is left of a draft behind the tokens that the target has chosen.

    Args:
        nodes: The nodes below the new roots.
        places: Per row the places among the nodes fed so far of those that are kept, -1 behind them, `[rows, kept]`.
        parents: Place of each one's parent among those kept, -1 at the root and at padding, `[rows, kept]`.
    """

    nodes: DraftNodes
    places: Ints
    parents: Ints


def subtrees_below(nodes: DraftNodes, known: Ints, counts: Ints) -> Subtrees | None:
    """The drafts behind the chosen tokens, or None where some row's last token did not go through the draft model.

    Args:
        nodes: What was drafted.
        known: The tokens behind the root, `[rows, tokens]`.
        counts: How many there are, `[rows]`.
    """
    roots = _nodes_at(nodes, known, counts)
    if min(roots) < 1 or (nodes.fed[np.arange(len(roots)), roots] < 0).any():
        return None
    tokens = nodes.tokens[np.arange(len(roots)), roots]
    below = DraftNodes.of_roots(tokens, nodes.tokens.shape[1])
    places, parents = np.full_like(nodes.fed, -1), np.full_like(nodes.fed, -1)
    most = _copy_below(nodes, roots, below, places, parents)
    return Subtrees(below, places[:, :most], np.ascontiguousarray(parents[:, :most]))


@kernel
def _nodes_at(nodes: DraftNodes, known: Ints, counts: Ints) -> Ints:
    """The node at the end of each row's tokens, `[rows]`; -1 where it was not drafted."""
    out = np.zeros(len(counts), np.int64)
    for row in range(len(counts)):
        node = 0
        for i in range(counts[row]):
            found = -1
            first = nodes.first_child[row, node]
            for child in range(first, first + nodes.num_children[row, node]):
                if nodes.tokens[row, child] == known[row, i]:
                    found = child
            node = found
            if node < 0:
                break
        out[row] = node
    return out


@kernel
def _copy_below(nodes: DraftNodes, roots: Ints, below: DraftNodes, places: Ints, parents: Ints) -> int:
    """Copies each row's subtree; arguments as in `Subtrees`, written. Returns the most places that a row keeps."""
    most = 0
    for row in range(len(roots)):
        root, count = roots[row], nodes.counts[row]
        moved = np.full(count, -1, np.int64)
        moved[root] = 0
        copied = 1
        for node in range(root + 1, count):
            parent = moved[nodes.parents[row, node]]
            if parent < 0:
                continue
            moved[node] = copied
            below.tokens[row, copied] = nodes.tokens[row, node]
            below.parents[row, copied] = parent
            below.depths[row, copied] = nodes.depths[row, node] - nodes.depths[row, root]
            below.ranks[row, copied] = nodes.ranks[row, node]
            below.probs[row, copied] = nodes.probs[row, node]
            below.scores[row, copied] = nodes.scores[row, node]
            below.orders[row, copied] = nodes.orders[row, node] / nodes.orders[row, root]
            if below.num_children[row, parent] == 0:
                below.first_child[row, parent] = copied
            below.num_children[row, parent] += 1
            copied += 1
        below.counts[row] = copied
        kept = 0
        for node in np.argsort(nodes.fed[row, :count]):
            if moved[node] < 0 or nodes.fed[row, node] < 0:
                continue
            below.fed[row, moved[node]] = kept
            places[row, kept] = nodes.fed[row, node]
            if node != root:
                parents[row, kept] = below.fed[row, below.parents[row, moved[node]]]
            kept += 1
        most = max(most, kept)
    return most


@functools.cache
def compile_kernels() -> None:
    """Compiles, or loads what was compiled before, so that no step of a generation waits for it."""
    nodes = DraftNodes.of_roots(np.zeros(1, np.int64), 4)
    known, count = np.zeros((1, 1), np.int64), np.ones(1, np.int64)
    choose_branches(nodes, OPENING_SCORE, 0.0, count, 1, known.copy())
    outcome(known[0], known[0] - 1, known[0])
    _nodes_at(nodes, known, count)
    _copy_below(nodes, known[0], DraftNodes.of_roots(known[0], 4), nodes.fed.copy(), nodes.fed.copy())
