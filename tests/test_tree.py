"""Token trees against the plainest way to compute the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specdec.tree import NODE_BUCKETS, TokenTree, bucket_of
from tests.conformance import ancestors, random_tree

TREES = [random_tree(seed, nodes=nodes) for seed, nodes in enumerate([1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64])]


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: f"{tree.num_nodes}-nodes")
def test_nodes_see_their_ancestors_and_themselves(tree: TokenTree) -> None:
    for row, parents in enumerate(tree.parents.tolist()):
        for node in range(tree.num_nodes):
            seen = tree.ancestor_mask[row, node].nonzero()[:, 0].tolist()
            assert seen == ancestors(parents, node)
            assert tree.depths[row, node] == len(seen) - 1


@pytest.mark.parametrize("nodes", [2, 3, 5, 9, 17, 33, 64, 65, 128])
def test_the_longest_chain_is_followed_to_the_root(nodes: int) -> None:
    chain = TokenTree(torch.arange(nodes)[None], torch.arange(-1, nodes - 1)[None])
    assert torch.equal(chain.ancestor_mask[0], torch.ones(nodes, nodes).tril().bool())
    assert chain.depths[0].tolist() == list(range(nodes))


def test_padding_is_told_apart_from_the_root() -> None:
    tree = TokenTree.from_rows([[5, 6, 7], [8]], [[-1, 0, 1], [-1]])
    assert tree.is_real.tolist() == [[True, True, True], [True, False, False]]
    assert tree.parents.tolist() == [[-1, 0, 1], [-1, -1, -1]]
    assert tree.tokens.dtype == tree.parents.dtype == torch.int64
    assert tree.scores is None
    assert tree.depths[1].tolist() == [0, 1, 1]


def test_ragged_rows_of_lists_and_arrays() -> None:
    tree = TokenTree.from_rows(
        [np.array([5, 6], np.int32), [7, 8, 9]], [np.array([-1, 0]), [-1, 0, 0]], [[0.0, 0.5], [0.0, 0.25, 1.0]]
    )
    assert tree.tokens.tolist() == [[5, 6, 0], [7, 8, 9]]
    assert tree.scores is not None
    assert tree.scores.dtype == torch.float32
    assert tree.scores.tolist() == [[0.0, 0.5, 0.0], [0.0, 0.25, 1.0]]


def test_root_alone_is_plain_decoding() -> None:
    tree = TokenTree.root_only(torch.tensor([4, 5]))
    assert tree.num_nodes == 1
    assert tree.tokens.tolist() == [[4], [5]]
    assert tree.parents.tolist() == [[-1], [-1]]
    assert tree.ancestor_mask.all()
    assert tree.is_chain


def test_chains_are_recognised() -> None:
    assert TokenTree.from_rows([[1, 2, 3], [4, 5]], [[-1, 0, 1], [-1, 0]]).is_chain
    assert not TokenTree.from_rows([[1, 2, 3]], [[-1, 0, 0]]).is_chain
    assert not TokenTree.from_rows([[1, 2, 3]], [[-1, -1, 1]]).is_chain


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: f"{tree.num_nodes}-nodes")
@pytest.mark.parametrize("is_mask_known", [False, True])
def test_the_first_nodes_are_a_tree(tree: TokenTree, is_mask_known: bool) -> None:
    tree = TokenTree(tree.tokens, tree.parents, tree.scores)
    if is_mask_known:
        _ = tree.ancestor_mask
    for nodes in range(1, tree.num_nodes + 2):
        cut = tree.first(nodes)
        assert cut.num_nodes == min(nodes, tree.num_nodes)
        fresh = TokenTree(cut.tokens.clone(), cut.parents.clone())
        assert torch.equal(cut.ancestor_mask, fresh.ancestor_mask)
        assert torch.equal(cut.depths, fresh.depths)
        assert torch.equal(cut.tokens, tree.tokens[:, :nodes])
        assert cut.scores is not None and tree.scores is not None
        assert torch.equal(cut.scores, tree.scores[:, :nodes])


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: f"{tree.num_nodes}-nodes")
def test_the_first_chain_goes_from_first_child_to_first_child(tree: TokenTree) -> None:
    chain = tree.first_chain()
    assert chain.is_chain
    for row, parents in enumerate(tree.parents.tolist()):
        expected, node = [0], 0
        while node is not None:
            node = next((child for child in range(1, tree.num_nodes) if parents[child] == node), None)
            expected += [] if node is None else [node]
        real = int(chain.is_real[row].sum())
        assert chain.tokens[row, :real].tolist() == tree.tokens[row, expected].tolist()
        assert chain.parents[row].tolist() == [*range(-1, real - 1), *[-1] * (chain.num_nodes - real)]
        assert chain.scores is not None and tree.scores is not None
        assert torch.equal(chain.scores[row, :real], tree.scores[row, expected])


def test_padding_to_a_width_changes_nothing_else() -> None:
    tree = random_tree(3)
    padded = tree.padded_to(16)
    assert padded.num_nodes == 16
    assert not padded.is_real[:, 12:].any()
    assert torch.equal(padded.ancestor_mask[:, :12, :12], tree.ancestor_mask)
    assert tree.padded_to(5) is tree


def test_draft_probabilities_stay_with_their_nodes() -> None:
    probs = torch.rand(2, 3, 7)
    tree = TokenTree(torch.zeros(2, 3).long(), torch.tensor([[-1, 0, 1]] * 2), draft_probs=probs)
    cut, padded, moved = tree.first(2), tree.padded_to(5), tree.to("cpu")
    assert cut.draft_probs is not None and padded.draft_probs is not None and moved.draft_probs is not None
    assert torch.equal(cut.draft_probs, probs[:, :2])
    assert padded.draft_probs.shape == (2, 5, 7)
    assert torch.equal(moved.draft_probs, probs)


@pytest.mark.parametrize(
    ("tokens", "parents", "message"),
    [
        ([[1, 10]], [[-1, 0]], r"in \[0, 10\), got 1 to 10"),
        ([[1, -1]], [[-1, 0]], r"in \[0, 10\), got -1 to 1"),
        ([[1, 2]], [[0, 0]], r"parents\[:, 0\] must be -1"),
        ([[1, 2]], [[-1, 1]], "must stand before its child"),
        ([[1, 2, 3]], [[-1, 2, 0]], "must stand before its child"),
        ([[1, 2]], [[-1, -2]], "must stand before its child"),
    ],
)
def test_wrong_trees_are_noticed(tokens: list[list[int]], parents: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenTree(torch.tensor(tokens), torch.tensor(parents)).validate(10)


def test_right_trees_are_not_noticed() -> None:
    for tree in TREES:
        tree.validate(50)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((2,), (2,)), ((1, 2, 3), (1, 2, 3))])
def test_shapes_must_agree(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"tokens and parents must both be \[batch, nodes\]"):
        TokenTree(torch.zeros(shapes[0]).long(), torch.zeros(shapes[1]).long())


def test_smallest_bucket_that_holds_a_tree() -> None:
    assert [bucket_of(nodes) for nodes in (1, 2, 3, 5, 64, 65, 128, 500)] == [1, 2, 4, 8, 64, 128, 128, 128]
    assert bucket_of(3, [1, 8]) == 8
    assert NODE_BUCKETS[0] == 1
