"""Finds continuations in all scopes and grows the best token tree from them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from specdec.drafters.ngrams.ngram_index import IntArray, Links, Matches, find_matches
from specdec.drafters.trees.heap import pop_best, push_best
from specdec.kernels import Floats, Ints, kernel, kernel_part

ScoreArray = NDArray[np.float32]


class Nodes(NamedTuple):
    """Nodes made so far, written to the tree or waiting to be.

    Args:
        tokens: Token ids, `[nodes]`, int64.
        parents: Index in the tree of each node's parent, `[nodes]`, int64.
        depths: Distance from the root, `[nodes]`, int64.
        scores: P(accepted | parent accepted), `[nodes]`, float64.
        paths: Product of the scores from the root down (the discount while it is made), `[nodes]`, float64.
        first_match: First match in each node's list, -1 for none, `[nodes]`, int64.
    """

    tokens: Ints
    parents: Ints
    depths: Ints
    scores: Floats
    paths: Floats
    first_match: Ints


@kernel_part
def add_children(
    nodes: Nodes,
    parent: int,
    created: int,
    written: int,
    texts: tuple[IntArray, ...],
    matches: Matches,
    next_match: Ints,
    child_of: Ints,
    by_length: Floats,
    smoothing: float,
    max_depth: int,
) -> int:
    """Passes the matches of a written node on to its children, one per next token.

    Args:
        nodes: All nodes so far, `created` of them.
        parent: The node, which was written at `written`.
        created: Number of nodes.
        written: Index of the parent in the tree.
        texts: As for `grow_tree`, like `matches`, `by_length`, `smoothing` and `max_depth`.
        matches: Where the continuations begin.
        next_match: Links between matches at the same node.
        child_of: Hash table by token; entries of earlier nodes count as empty.
        by_length: Weight and discount by length.
        smoothing: Weight of "none of these".
        max_depth: Largest depth of a node.

    Returns:
        The new number of nodes.
    """
    places, weights = matches
    first_child = created
    total = smoothing
    depth = nodes.depths[parent]
    if depth == max_depth:
        return created
    match = nodes.first_match[parent]
    while match >= 0:
        following = next_match[match]
        token = int(texts[places[match, 0]][places[match, 1] + depth])
        if token >= 0:
            length = min(places[match, 2] + depth, by_length.shape[1] - 1)
            weight = weights[match] * by_length[0, length]
            total += weight
            bucket = (token * 0x5BD1E995 >> 8) & (child_of.shape[0] - 1)
            while child_of[bucket] >= first_child and nodes.tokens[child_of[bucket]] != token:
                bucket = (bucket + 1) & (child_of.shape[0] - 1)
            child = child_of[bucket]
            if child < first_child:
                child = created
                created += 1
                child_of[bucket] = child
                nodes.tokens[child] = token
                nodes.parents[child] = written
                nodes.depths[child] = depth + 1
                nodes.scores[child] = 0.0
                nodes.paths[child] = 0.0
            nodes.scores[child] += weight
            nodes.paths[child] = max(nodes.paths[child], weight * by_length[1, length])
            next_match[match] = nodes.first_match[child]
            nodes.first_match[child] = match
        match = following
    for child in range(first_child, created):
        nodes.scores[child] = (nodes.scores[child] - nodes.paths[child]) / total
        nodes.paths[child] = nodes.paths[parent] * nodes.scores[child]
    return created


@kernel
def grow_tree(
    texts: tuple[IntArray, ...],
    matches: Matches,
    count: int,
    by_length: Floats,
    smoothing: float,
    max_depth: int,
    tokens: Ints,
    parents: Ints,
    scores: ScoreArray,
) -> int:
    """Merges all continuations into one tree and writes its nodes best first, the root (already written) excepted.

    Continuations that agree so far share a node, and its children share their weight. A match of length m counts as one
    of length m + d at depth d: a continuation that was right so far is a longer match now. As in prediction by partial
    matching, each child pays a discount, a larger share of its weight the fewer and the shorter its matches, and the
    smoothing is weight given to no child. These scores are about right on average.

    Args:
        texts: Text of each scope.
        matches: Where the continuations begin.
        count: Number of matches.
        by_length: Weight and discount by length of the match, `[2, lengths]`; longer ones count as the last entry.
        smoothing: Weight of "none of these".
        max_depth: Largest depth of a node.
        tokens: Written: token ids, `[nodes]`, int64.
        parents: Written: parents, `[nodes]`, int64.
        scores: Written: P(accepted | parent accepted), `[nodes]`, float32.

    Returns:
        The number of nodes, the root included.
    """
    if count == 0:
        return 1
    # Waiting nodes hold disjoint, non-empty lists of matches: there are never more than matches and written nodes.
    room = count + tokens.shape[0]
    ints, floats = np.empty((3, room), np.int64), np.empty((2, room))
    nodes = Nodes(ints[0], ints[1], ints[2], floats[0], floats[1], np.full(room, -1))
    heap = np.empty(room, np.int64)
    next_match = np.arange(1, count + 1)
    next_match[count - 1] = -1
    buckets = 2
    while buckets < 2 * count:
        buckets *= 2
    child_of = np.zeros(buckets, np.int64)
    nodes.first_match[0] = 0
    nodes.depths[0] = 0
    nodes.paths[0] = 1.0
    node = 0
    created = 1
    waiting = 0
    for written in range(1, tokens.shape[0]):
        first_child = created
        created = add_children(
            nodes, node, created, written - 1, texts, matches, next_match, child_of, by_length, smoothing, max_depth
        )
        for child in range(first_child, created):
            waiting = push_best(heap, waiting, nodes.paths, child)
        if waiting == 0:
            return written
        waiting = pop_best(heap, waiting, nodes.paths)
        node = heap[waiting]
        tokens[written] = nodes.tokens[node]
        parents[written] = nodes.parents[node]
        scores[written] = nodes.scores[node]
    return tokens.shape[0]


@kernel
def draft_row(
    sources: tuple[Links, ...],
    skipped: Ints,
    weights: Floats,
    query_start: int,
    query_end: int,
    max_hits: int,
    recency: float,
    matches: Matches,
    by_length: Floats,
    smoothing: float,
    max_depth: int,
    tokens: Ints,
    parents: Ints,
    scores: ScoreArray,
) -> int:
    """Drafts for one row from all its scopes: `find_matches` in each, then `grow_tree`.

    Arguments of the same names are described there.

    Args:
        sources: Arrays of each scope's index, the row's own text first; empty ones are skipped.
        skipped: Region of each scope to leave out (first position, end), `[scopes, 2]`, int64.
        weights: Weight of each scope, `[scopes]`, float64.
        query_start: First position of the row's last tokens in its own text.
        query_end: Position after them.

    Returns:
        The number of nodes, the root included.
    """
    query = sources[0][0][query_start:query_end]
    count = 0
    for scope in range(len(sources)):
        if sources[scope][0].shape[0] > 2:
            count = find_matches(
                sources[scope],
                query,
                skipped[scope, 0],
                skipped[scope, 1],
                max_hits,
                scope,
                weights[scope],
                recency,
                count,
                matches,
            )
    texts = (sources[0][0], sources[1][0], sources[2][0], sources[3][0], sources[4][0])
    return int(grow_tree(texts, matches, count, by_length, smoothing, max_depth, tokens, parents, scores))
