"""One list of likely next tokens per token of the vocabulary: trees out of them, counts, updates."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from specdec.drafters.trees.rank_tree import grow_ranked_tree
from specdec.kernels import Floats, Ints, kernel

Lists = NDArray[np.int32]
LAST = 0
"""Row of the rates that is of tokens listed in place of the root; the others are of depths."""


@kernel
def grow_recycled(
    table: Lists,
    last: Lists,
    rates: Floats,
    max_depths: Ints,
    least: float,
    tokens: Ints,
    parents: Ints,
    scores: NDArray[np.float32],
) -> int:
    """Writes each row's tree best first after its root: a node's children are the list of its token.

    Args:
        table: What followed each token, -1 for none, `[vocab, ranks]`.
        last: What else the target ranked high when it picked the root, `[rows, ranks]`: children of the root too.
        rates: P(accepted | parent accepted) by depth and rank, those of `last` first, `[1 + depths, ranks]`.
        max_depths: Largest depth of a node, `[rows]`; 0 for the root alone.
        least: Nodes less likely to be accepted are left out.
        tokens: Written: token ids, `[rows, nodes]`; roots are there already.
        parents: Written: parents, `[rows, nodes]`; the others stay -1.
        scores: Written: P(accepted | parent accepted), `[rows, nodes]`.

    Returns:
        The number of nodes of the largest tree.
    """
    widest = 1
    for row in range(tokens.shape[0]):
        grown = grow_ranked_tree(
            table, True, last[row], rates, max_depths[row], least, tokens[row], parents[row], scores[row]
        )
        widest = max(widest, grown)
    return widest


@kernel
def count_listed(
    table: Lists, last: Lists, known: Ints, counts: Ints, tried: Floats, hit: Floats, decay: float
) -> None:
    """Adds the ranks of the target's tokens in the lists to the decayed counts.

    Args:
        table: As it was when the tokens were drafted, `[vocab, ranks]`.
        last: The same, `[rows, ranks]`.
        known: The root and the tokens that the target has picked since, `[rows, tokens]`.
        counts: Number of these, the root included, `[rows]`.
        tried: Changed: lists by depth and rank, `[1 + depths, ranks]`; see `grow_recycled`.
        hit: Changed: those whose token was the target's.
        decay: Factor on the earlier counts of a depth for each list.
    """
    for row in range(known.shape[0]):
        for i in range(counts[row] - 1):
            following = table[known[row, i]]
            if following[0] >= 0:
                at = min(i + 1, tried.shape[0] - 1)
                tried[at] = tried[at] * decay + 1.0
                hit[at] = hit[at] * decay + (following == known[row, i + 1])
            if i == 0 and last[row, 0] >= 0:
                tried[LAST] *= decay
                hit[LAST] *= decay
                for rank in range(table.shape[1]):
                    token = last[row, rank]
                    if token != known[row, 0] and not (following == token).any():
                        tried[LAST, rank] += 1.0
                        if token == known[row, 1]:
                            hit[LAST, rank] += 1.0


@kernel
def keep_lists(
    tokens: Ints, parents: Ints, top_tokens: Ints, known: Ints, counts: Ints, table: Lists, last: Lists
) -> None:
    """Copies the target's top tokens at every node of its last pass into the table.

    Nodes on the accepted path come last: of two nodes with the same token, the accepted one wins.

    Args:
        tokens: Of the verified tree, `[rows, nodes]`.
        parents: -1 at padding, `[rows, nodes]`.
        top_tokens: The target's likeliest tokens after each node, -1 where unknown, `[rows, nodes, count]`.
        known: The root and the tokens that the target has picked since, `[rows, tokens]`.
        counts: Number of these, the root included, `[rows]`.
        table: Changed, `[vocab, ranks]`.
        last: Written: the list from which each row's last token was picked, `[rows, ranks]`.
    """
    ranks = min(table.shape[1], top_tokens.shape[2])
    for row in range(tokens.shape[0]):
        for node in range(1, tokens.shape[1]):
            if parents[row, node] >= 0 and top_tokens[row, node, 0] >= 0:
                for rank in range(ranks):  # a slice would take twice the time
                    table[tokens[row, node], rank] = top_tokens[row, node, rank]
        node = 0
        table[tokens[row, 0], :ranks] = top_tokens[row, 0, :ranks]
        for i in range(1, counts[row] - 1):
            child = node + 1
            while child < tokens.shape[1] and not (parents[row, child] == node and tokens[row, child] == known[row, i]):
                child += 1
            if child == tokens.shape[1]:
                break
            node = child
            table[tokens[row, node], :ranks] = top_tokens[row, node, :ranks]
        last[row, :ranks] = top_tokens[row, node, :ranks]
