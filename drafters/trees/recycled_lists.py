"""Grows token trees out of one list of likely next tokens per token of the vocabulary, and keeps the lists."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from specdec.drafters.ngrams.trie_growth import pop_best, push_best
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
        last: What else the target held likely where it picked the root, `[rows, ranks]`: children of the root too.
        rates: P(accepted | parent accepted) by depth and rank, those of `last` first, `[1 + depths, ranks]`.
        max_depths: Largest depth of a node, `[rows]`; 0 for the root alone.
        least: A node less likely to be accepted is left out.
        tokens: Written: token ids, `[rows, nodes]`; roots are there already.
        parents: Written: parents, `[rows, nodes]`; the others stay -1.
        scores: Written: P(accepted | parent accepted), `[rows, nodes]`.

    Returns:
        The number of nodes of the largest tree.
    """
    size, ranks = tokens.shape[1], table.shape[1]
    room = (size + 1) * ranks
    heap = np.empty(room, np.int64)
    paths = np.empty(room)  # by waiting node, as for the next four
    listed = np.empty(room, np.int64)
    above = np.empty(room, np.int64)
    depths = np.empty(room, np.int64)
    rated = np.empty(room)
    widest = 1
    for row in range(tokens.shape[0]):
        made = waiting = depth = 0
        path = 1.0
        written = 1
        while True:
            if depth < max_depths[row]:
                parent = written - 1
                at = min(depth + 1, rates.shape[0] - 1)
                for is_last in range(2 if depth == 0 else 1):
                    for rank in range(ranks):
                        token = last[row, rank] if is_last else table[tokens[row, parent], rank]
                        rate = rates[LAST, rank] if is_last else rates[at, rank]
                        if token < 0 or path * rate < least:
                            continue
                        if is_last and (token == tokens[row, 0] or (table[tokens[row, 0]] == token).any()):
                            continue
                        listed[made], above[made], depths[made], rated[made] = token, parent, depth + 1, rate
                        paths[made] = path * rate
                        waiting = push_best(heap, waiting, paths, made)
                        made += 1
            if waiting == 0 or written == size:
                break
            waiting = pop_best(heap, waiting, paths)
            node = heap[waiting]
            tokens[row, written] = listed[node]
            parents[row, written] = above[node]
            scores[row, written] = rated[node]
            depth, path = depths[node], paths[node]
            written += 1
        widest = max(widest, written)
    return widest


@kernel
def count_listed(
    table: Lists, last: Lists, known: Ints, counts: Ints, tried: Floats, hit: Floats, decay: float
) -> None:
    """Adds to the decayed counts where in the lists the target's tokens stood.

    Args:
        table: As it was when the tokens were drafted, `[vocab, ranks]`.
        last: The same, `[rows, ranks]`.
        known: The root and the tokens that the target has picked since, `[rows, tokens]`.
        counts: How many there are, the root included, `[rows]`.
        tried: Changed: lists by depth and rank, `[1 + depths, ranks]`; see `grow_recycled`.
        hit: Changed: those whose token was the target's.
        decay: Factor on the counts of a depth so far for each list.
    """
    ranks = table.shape[1]
    for row in range(known.shape[0]):
        for i in range(counts[row] - 1):
            following = table[known[row, i]]
            if following[0] >= 0:
                at = min(i + 1, tried.shape[0] - 1)
                tried[at] *= decay
                hit[at] *= decay
                for rank in range(ranks):
                    tried[at, rank] += 1.0
                    if following[rank] == known[row, i + 1]:
                        hit[at, rank] += 1.0
            if i == 0 and last[row, 0] >= 0:
                tried[LAST] *= decay
                hit[LAST] *= decay
                for rank in range(ranks):
                    token = last[row, rank]
                    if token == known[row, 0] or (following == token).any():
                        continue
                    tried[LAST, rank] += 1.0
                    if token == known[row, 1]:
                        hit[LAST, rank] += 1.0


@kernel
def keep_lists(
    tokens: Ints, parents: Ints, top_tokens: Ints, known: Ints, counts: Ints, table: Lists, last: Lists
) -> None:
    """Takes the target's top tokens into the table, from every node of its last pass.

    Nodes on the accepted path come last: of two nodes of one token, the one that was right says more.

    Args:
        tokens: Of the verified tree, `[rows, nodes]`.
        parents: -1 at padding, `[rows, nodes]`.
        top_tokens: The target's likeliest tokens behind each node, -1 where they are not known, `[rows, nodes, count]`.
        known: The root and the tokens that the target has picked since, `[rows, tokens]`.
        counts: How many there are, the root included, `[rows]`.
        table: Changed, `[vocab, ranks]`.
        last: Written: the list from which each row's last token was picked, `[rows, ranks]`.
    """
    ranks = min(table.shape[1], top_tokens.shape[2])
    for row in range(tokens.shape[0]):
        for node in range(1, tokens.shape[1]):
            if parents[row, node] >= 0 and top_tokens[row, node, 0] >= 0:
                for rank in range(ranks):
                    table[tokens[row, node], rank] = top_tokens[row, node, rank]
        node = 0
        for i in range(max(counts[row] - 1, 1)):
            if i > 0:
                child = -1
                for other in range(node + 1, tokens.shape[1]):
                    if parents[row, other] == node and tokens[row, other] == known[row, i]:
                        child = other
                        break
                if child < 0:
                    break
                node = child
            for rank in range(ranks):
                table[tokens[row, node], rank] = top_tokens[row, node, rank]
        for rank in range(ranks):
            last[row, rank] = top_tokens[row, node, rank]
