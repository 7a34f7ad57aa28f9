"""Known traps, planted on purpose: the identity check must notice each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.kv_cache import TreeCache
from specdec.passes import masks
from specdec.rows.draws import NoiseQueue
from specdec.rows.sequences import Sequences
from specdec.rows.stopping import StopRule
from specdec.sampling import Sampler
from specdec.target import TreeTarget
from specdec.tree import TokenTree
from tests.conformance import OracleDrafter, RandomTreeDrafter, assert_identical, reference
from tests.tiny_models import prompts, tiny_model


def with_depths_by_index(tree: TokenTree) -> TokenTree:
    """The same tree, which takes every node to be as deep as its index."""
    tree = TokenTree(tree.tokens, tree.parents, tree.scores)
    tree.__dict__["depths"] = torch.arange(tree.num_nodes).expand_as(tree.tokens)
    return tree


def siblings_see_each_other(patch: pytest.MonkeyPatch) -> None:
    right = masks.tree_mask

    def wrong(tree: TokenTree, lengths: Sequence[int], *args: Any) -> Tensor:
        mask = right(tree, lengths, *args)
        for row, length in enumerate(lengths):
            mask[row, :, :, length : length + tree.num_nodes] = torch.ones(tree.num_nodes, tree.num_nodes).tril().bool()
        return mask

    patch.setattr(masks, "tree_mask", wrong)


def positions_by_index(patch: pytest.MonkeyPatch) -> None:
    right = TreeTarget.forward
    patch.setattr(TreeTarget, "forward", lambda self, tree: right(self, with_depths_by_index(tree)))


def path_is_not_moved(patch: pytest.MonkeyPatch) -> None:
    right = TreeCache.commit

    def wrong(self: TreeCache, paths: Sequence[Sequence[int]]) -> None:
        right(self, [range(len(path)) for path in paths])

    patch.setattr(TreeCache, "commit", wrong)


def noise_by_index(patch: pytest.MonkeyPatch) -> None:
    right = Sampler.pick

    def wrong(self: Sampler, tree: TokenTree, logits: Tensor, rows: Sequence[int]) -> Tensor:
        self.is_flat = True  # all nodes at once, as on a GPU
        return right(self, with_depths_by_index(tree), logits, rows)

    patch.setattr(Sampler, "pick", wrong)


def noise_of_the_root(patch: pytest.MonkeyPatch) -> None:
    right = Sampler._values_at
    patch.setattr(Sampler, "_values_at", lambda self, *args: right(self, *args[:-1], {i: [] for i in args[-1]}))


def generator_is_not_set_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sampler, "_ends", lambda *args: False)  # draws are made ahead, as on a GPU
    patch.setattr(NoiseQueue, "restore", lambda self, count: None)


def end_inside_the_path_is_ignored(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: StopRule, row: int, tokens: Sequence[int], scores: Any = None) -> bool:
        return len(tokens) >= self.sequences.room(row)

    patch.setattr(StopRule, "ends", wrong)


def processors_see_the_root_only(patch: pytest.MonkeyPatch) -> None:
    right = Sequences.prefixes
    patch.setattr(Sequences, "prefixes", lambda self, rows, paths: right(self, rows, [[] for _ in paths]))


def rows_share_one_length(patch: pytest.MonkeyPatch, of: Callable[[Sequence[int]], int]) -> None:
    right = TreeCache.commit

    def wrong(self: TreeCache, paths: Sequence[Sequence[int]]) -> None:
        right(self, paths)
        self.lengths = [of(self.lengths)] * len(paths)

    patch.setattr(TreeCache, "commit", wrong)


def padding_is_seen(patch: pytest.MonkeyPatch) -> None:
    right = masks.tree_mask
    patch.setattr(masks, "tree_mask", lambda tree, lengths, prompt_mask, *args: right(tree, lengths, None, *args))


FLAT = {"do_sample": True, "top_k": 0}
TRAPS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], dict[str, Any]]] = {
    "siblings see each other": (siblings_see_each_other, {}),
    "a position is the index in the tree": (positions_by_index, {}),
    "commit does not move the path": (path_is_not_moved, {}),
    "noise goes by the index in the tree": (noise_by_index, FLAT),
    "noise is the root's on the whole path": (noise_of_the_root, FLAT),
    "the generator is not set back": (generator_is_not_set_back, FLAT | {"eos_token_id": [7, 8, 9]}),
    "an end inside the path is ignored": (end_inside_the_path_is_ignored, {"eos_token_id": list(range(2, 40))}),
    "processors see the root's prefix": (processors_see_the_root_only, {"repetition_penalty": 3.0}),
    "rows go by the longest": (partial(rows_share_one_length, of=max), {}),
    "rows go by the shortest": (partial(rows_share_one_length, of=min), {}),
    "padding is seen": (padding_is_seen, {}),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_trap_is_noticed(trap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, changes = TRAPS[trap]
    inputs = prompts(4, 7, 9)
    kwargs = {"max_new_tokens": 24, "eos_token_id": None} | changes
    beyond_the_end = reference(tiny_model(), inputs, **kwargs | {"eos_token_id": None}).answers

    def check() -> None:
        for drafter in (RandomTreeDrafter(beyond_the_end), OracleDrafter(beyond_the_end)):
            assert_identical(tiny_model(), drafter, inputs, **kwargs)

    check()  # right as it is; and the probe's answer is kept from here, so that it cannot save the wrong engine
    with monkeypatch.context() as patch:
        plant(patch)
        with pytest.raises(AssertionError, match="differ"):
            check()
    check()
