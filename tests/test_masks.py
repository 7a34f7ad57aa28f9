"""Attention masks of trees against a loop over every pair of places."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from specdec.passes.masks import MaskFormat, tree_mask
from specdec.tree import TokenTree
from tests.conformance import ancestors, random_tree


def reference_mask(
    tree: TokenTree, lengths: list[int], padding: list[int], window: int | None, chunk: int | None
) -> Tensor:
    """`[batch, 1, nodes, slots]`, by the definition."""
    nodes, slots = tree.num_nodes, max(lengths) + tree.num_nodes
    mask = torch.zeros(len(lengths), 1, nodes, slots, dtype=torch.bool)
    for row, (length, pad) in enumerate(zip(lengths, padding, strict=True)):
        paths = [ancestors(tree.parents[row].tolist(), node) for node in range(nodes)]
        for node, slot in itertools.product(range(nodes), range(slots)):
            position = length + len(paths[node]) - 1
            if slot < length:
                is_visible, at = slot >= pad, slot
            elif slot < length + nodes:
                is_visible, at = slot - length in paths[node], length + len(paths[slot - length]) - 1
            else:
                is_visible, at = False, slot
            if window is not None:
                is_visible &= position - at < window
            if chunk is not None:
                is_visible &= (position - pad) // chunk == (at - pad) // chunk
            mask[row, 0, node, slot] = is_visible
    return mask


LENGTHS = {
    "one row": ([7], [0]),
    "equal rows": ([7, 7, 7], [0, 0, 0]),
    "ragged rows": ([9, 6, 7], [0, 0, 0]),
    "padded rows": ([7, 7, 7], [0, 3, 5]),
    "padded ragged rows": ([9, 6, 12], [2, 0, 4]),
}


@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("nodes", [1, 2, 9])
@pytest.mark.parametrize("reach", [{}, {"window": 1}, {"window": 4}, {"window": 50}, {"chunk": 3}, {"chunk": 8}])
def test_mask_is_that_of_the_definition(case: str, nodes: int, reach: dict[str, int]) -> None:
    lengths, padding = LENGTHS[case]
    tree = random_tree(nodes, batch=len(lengths), nodes=nodes)
    prompt = 6
    prompt_mask = None
    if any(padding):
        prompt_mask = torch.arange(prompt) >= torch.tensor(padding)[:, None]
    mask = tree_mask(tree, lengths, prompt_mask, **reach)
    expected = reference_mask(tree, lengths, padding, reach.get("window"), reach.get("chunk"))
    assert mask.shape == (len(lengths), 1, nodes, max(lengths) + nodes)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, expected)


def test_every_node_sees_itself() -> None:
    """A row of a mask that hides everything gives no number at all."""
    tree = random_tree(1, padding=0.5)
    prompt_mask = torch.arange(6) >= torch.tensor([0, 3, 5])[:, None]
    for reach in ({}, {"window": 1}, {"chunk": 1}):
        mask = tree_mask(tree, [6, 8, 7], prompt_mask, **reach)
        for row, length in enumerate([6, 8, 7]):
            places = mask[row, 0, :, length : length + tree.num_nodes]
            assert places.diagonal().all()


def test_formats() -> None:
    tree = random_tree(2)
    lengths = [9, 6, 7]
    full, window = tree_mask(tree, lengths), tree_mask(tree, lengths, window=4)
    assert torch.equal(MaskFormat().build(tree, lengths, None, torch.float32), full)
    sliding = MaskFormat(layer_types=("sliding_attention",), window=4)
    assert torch.equal(sliding.build(tree, lengths, None, torch.float32), window)
    both = MaskFormat(by_layer_type=True, layer_types=("full_attention", "sliding_attention"), window=4)
    built = both.build(tree, lengths, None, torch.float32)
    assert isinstance(built, dict)
    assert list(built) == ["full_attention", "sliding_attention"]
    assert torch.equal(built["full_attention"], full)
    assert torch.equal(built["sliding_attention"], window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_additive_format_has_the_least_number_at_hidden_places(dtype: torch.dtype) -> None:
    tree = random_tree(2)
    mask = MaskFormat(additive=True).build(tree, [9, 6, 7], None, dtype)
    assert isinstance(mask, Tensor)
    assert mask.dtype == dtype
    visible = tree_mask(tree, [9, 6, 7])
    assert (mask[visible] == 0).all()
    assert (mask[~visible] == torch.finfo(dtype).min).all()
