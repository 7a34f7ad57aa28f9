"""Branches of a draft grow by their confidence, up to a threshold that adjusts itself."""

from __future__ import annotations

import numpy as np
import pytest

from specdec.drafters.small_model.branch_pace import (
    LARGEST_THRESHOLD,
    LEAST_THRESHOLD,
    adjusted,
    choose_branches,
    outcome,
    subtrees_below,
)
from specdec.drafters.small_model.growth import DraftNodes
from specdec.drafters.small_model.pipelined import Pacing


@pytest.mark.parametrize(
    ("before", "drafted", "accepted", "after"),
    [
        (0.01, 8, 8, 0.005),
        (0.01, 0, 0, 0.01),
        (0.01, 1, 0, 0.02),
        (0.01, 3, 1, 0.01 * 2 ** (2 / 3)),
        (0.01, 9, 4, 0.01 * 2 ** (5 / 9)),
        (LEAST_THRESHOLD, 8, 8, LEAST_THRESHOLD),
        (0.09, 8, 0, LARGEST_THRESHOLD),
    ],
)
def test_threshold_adjusts_itself(before: float, drafted: int, accepted: int, after: float) -> None:
    assert adjusted(before, drafted, accepted) == pytest.approx(after)


def test_threshold_starts_as_in_the_paper() -> None:
    assert Pacing().threshold == 0.01


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ([1, 2, 3, 9], (3, 3)),
        ([1, 2, 9], (3, 2)),
        ([9], (3, 0)),
        ([4, 5, 6, 7, 9], (4, 4)),
        ([1], (3, 1)),
        ([], (3, 0)),
    ],
)
def test_outcome_of_a_tree(known: list[int], expected: tuple[int, int]) -> None:
    """The likeliest path is 1, 2, 3; another one 4, 5, 6, 7; the last node is padding."""
    tokens, parents = [0, 1, 2, 3, 4, 5, 6, 7, 9], [-1, 0, 1, 2, 0, 4, 5, 6, -1]
    assert outcome(np.array(tokens), np.array(parents), np.array(known, np.int64)) == expected


def drafted(parents: list[int], ranks: list[int], scores: list[float], fed: list[int]) -> DraftNodes:
    """A row of nodes whose tokens are their indices."""
    nodes = DraftNodes.of_roots(np.zeros(1, np.int64), 16)
    count = len(parents)
    for node in range(1, count):
        parent = parents[node]
        nodes.tokens[0, node], nodes.parents[0, node] = node, parent
        nodes.depths[0, node] = nodes.depths[0, parent] + 1
        nodes.orders[0, node] = nodes.orders[0, parent] * scores[node]
        if nodes.num_children[0, parent] == 0:
            nodes.first_child[0, parent] = node
        nodes.num_children[0, parent] += 1
    nodes.ranks[0, :count], nodes.scores[0, :count], nodes.fed[0, :count] = ranks, scores, fed
    nodes.counts[0] = count
    return nodes


@pytest.mark.parametrize(
    ("scores", "fed", "least", "width", "expected"),
    [
        # Two branches from the root, none with a token yet: their due is 0.6 / 0.95 and 0.35 / 0.95 of the next one.
        ([1, 0.6, 0.35, 0.01], [0, -1, -1, -1], 0.01, 1, [1]),
        # The second one has its turn before the first one's comes again.
        ([1, 0.6, 0.35, 0.01], [0, -1, -1, -1], 0.01, 4, [1, 2]),
        # The first one's turn would come again at once.
        ([1, 0.95, 0.3, 0.01], [0, -1, -1, -1], 0.01, 4, [1]),
        # What is unlikely opens no branch, unless it is the best token.
        ([1, 0.6, 0.29, 0.01], [0, -1, -1, -1], 0.01, 4, [1]),
        ([1, 0.2, 0.19, 0.01], [0, -1, -1, -1], 0.01, 4, [1]),
        ([1, 0.6, 0.35, 0.01], [0, -1, -1, -1], 0.5, 4, [1]),
        ([1, 0.6, 0.35, 0.01], [0, -1, -1, -1], 0.7, 4, []),
    ],
)
def test_the_branch_that_lacks_most_is_served(
    scores: list[float], fed: list[int], least: float, width: int, expected: list[int]
) -> None:
    nodes = drafted([-1, 0, 0, 0], [0, 0, 1, 2], scores, fed)
    level = np.zeros((1, width), np.int64)
    taken = choose_branches(nodes, 0.3, least, np.array([9]), 1, level)
    assert level[0, :taken].tolist() == expected
    assert nodes.fed[0, expected].tolist() == list(range(1, 1 + taken))


def test_tokens_that_a_branch_was_given_count() -> None:
    # The branch of 1 was given one token and goes on at 4, of confidence 0.54; that of 2, of 0.4, was given none.
    nodes = drafted([-1, 0, 0, 0, 1], [0, 0, 1, 2, 0], [1, 0.6, 0.4, 0.01, 0.9], [0, 1, -1, -1, -1])
    level = np.zeros((1, 1), np.int64)
    assert choose_branches(nodes, 0.3, 0.01, np.array([9]), 2, level) == 1
    assert level[0, 0] == 2
    assert choose_branches(nodes, 0.3, 0.01, np.array([1]), 2, level) == 0, "none may be deeper"


def test_what_is_left_behind_the_chosen_tokens() -> None:
    #        0 -> 1 -> 3 -> 5 -> 6
    #          -> 2      -> 4 (a sibling of 3)
    nodes = drafted(
        [-1, 0, 0, 1, 1, 3, 5], [0, 0, 1, 0, 1, 0, 0], [1, 0.5, 0.2, 0.5, 0.3, 0.8, 0.9], [0, 2, 1, 3, -1, 5, -1]
    )
    below = subtrees_below(nodes, np.array([[1, 3]]), np.array([2]))
    assert below is not None
    assert below.nodes.counts.tolist() == [3]
    assert below.nodes.tokens[0, :3].tolist() == [3, 5, 6]
    assert below.nodes.parents[0, :3].tolist() == [-1, 0, 1]
    assert below.nodes.depths[0, :3].tolist() == [0, 1, 2]
    assert below.nodes.fed[0, :3].tolist() == [0, 1, -1]
    assert (below.nodes.first_child[0, :2].tolist(), below.nodes.num_children[0, :3].tolist()) == ([1, 2], [1, 1, 0])
    np.testing.assert_allclose(below.nodes.orders[0, :3], [1, 0.8, 0.72])
    assert (below.places.tolist(), below.parents.tolist()) == ([[3, 5]], [[-1, 0]])
    for known in ([4, 0], [1, 4], [9, 9]):
        assert subtrees_below(nodes, np.array([known]), np.array([2])) is None
