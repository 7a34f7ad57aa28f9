"""Token trees: what drafters propose and the target verifies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.kernels import Ints, ancestors_and_depths, host_array, is_valid

NODE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Node counts a target pass may have, so that shapes are few and a step can be captured."""


def padded_width(nodes: int) -> int:
    """Width of a pass over a tree of so many nodes: a bucket, or for a longer step a multiple of the largest one."""
    largest = NODE_BUCKETS[-1]
    return bucket_of(nodes) if nodes <= largest else -(-nodes // largest) * largest


def bucket_of(nodes: int, buckets: Sequence[int] = NODE_BUCKETS) -> int:
    """Smallest bucket that holds `nodes` nodes; the largest when none does."""
    return next((n for n in buckets if n >= nodes), buckets[-1])


@dataclass(frozen=True)
class TokenTree:
    """One token tree per row of the batch.

    Node 0 is the root: the last committed token, whose keys and values are not in the kv cache yet. Every other node
    is a draft token. Parents stand before their children. A node after the root whose parent is -1 is padding.

    Drafters list their nodes best first, so that the first `n` nodes are a tree again, and the best one of that size.

    Args:
        tokens: Token ids, `[batch, nodes]`, int64.
        parents: Index of each node's parent, `[batch, nodes]`, int64; `parents[:, 0] == -1`.
        scores: The drafter's estimate of P(accepted | parent accepted), `[batch, nodes]`, float32, or None.
        draft_probs: Distribution each node's children were drawn from, `[batch, nodes, vocab]`, or None when the draft
            tokens are a deterministic function of the past (or the drafter does not tell).
    """

    tokens: Tensor
    parents: Tensor
    scores: Tensor | None = None
    draft_probs: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or self.tokens.shape != self.parents.shape:
            raise ValueError(
                f"tokens and parents must both be [batch, nodes], got {list(self.tokens.shape)} and "
                f"{list(self.parents.shape)}"
            )
        if self.scores is not None and self.scores.shape != self.tokens.shape:
            raise ValueError(f"scores must be {list(self.tokens.shape)} as tokens are, got {list(self.scores.shape)}")
        if self.draft_probs is not None and self.draft_probs.shape[:2] != self.tokens.shape:
            raise ValueError(f"draft_probs must be {[*self.tokens.shape, 'vocab']}, got {list(self.draft_probs.shape)}")

    @classmethod
    def root_only(cls, roots: Tensor) -> TokenTree:
        """The tree without draft tokens: plain decoding.

        Args:
            roots: Last committed token of each row, `[batch]`.
        """
        tokens = roots.unsqueeze(1)
        return cls(tokens, torch.full_like(tokens, -1))

    @classmethod
    def from_rows(
        cls,
        tokens: Sequence[Sequence[int]],
        parents: Sequence[Sequence[int]],
        scores: Sequence[Sequence[float]] | None = None,
    ) -> TokenTree:
        """Builds a tree from ragged rows (lists or arrays), padding the shorter ones.

        Args:
            tokens: Per row the root and the draft tokens.
            parents: Per row each node's parent; the first is -1.
            scores: Per row P(accepted | parent accepted) of each node; the root's is not used.
        """
        nodes = max(len(row) for row in tokens)

        def padded(rows: Sequence[Sequence[float]], fill: float, dtype: torch.dtype) -> Tensor:
            out = torch.full((len(rows), nodes), fill, dtype=dtype)
            for i, row in enumerate(rows):
                out[i, : len(row)] = torch.as_tensor(row, dtype=dtype)
            return out

        return cls(
            padded(tokens, 0, torch.int64),
            padded(parents, -1, torch.int64),
            None if scores is None else padded(scores, 0.0, torch.float32),
        )

    @classmethod
    def of_arrays(cls, tokens: Ints, parents: Ints, scores: NDArray[np.float32]) -> TokenTree:
        """A tree on the host whose arrays, `[batch, nodes]` each, stay at hand: to read tensors takes time."""
        tree = object.__new__(cls)  # shapes are not checked: such trees are made in every step
        tree.__dict__.update(
            tokens=torch.from_numpy(tokens),
            parents=torch.from_numpy(parents),
            scores=torch.from_numpy(scores),
            host_tokens=_whole(tokens),
            host_parents=_whole(parents),
            host_scores=_whole(scores),
            _has_arrays=True,
        )
        return tree

    @classmethod
    def on_device(cls, tokens: Tensor, parents: Tensor, ancestor_mask: Tensor) -> TokenTree:
        """A tree whose nodes' ancestors are known, so that nothing more is asked of the host.

        Args:
            tokens: `[batch, nodes]`.
            parents: `[batch, nodes]`.
            ancestor_mask: As the property of that name, `[batch, nodes, nodes]`, bool.
        """
        tree = cls(tokens, parents)
        tree.__dict__["ancestor_mask"] = ancestor_mask
        tree.__dict__["depths"] = ancestor_mask.sum(-1) - 1
        return tree

    @property
    def num_nodes(self) -> int:
        """Width of the tree, root and padding included."""
        return self.tokens.shape[1]

    @cached_property
    def is_real(self) -> Tensor:
        """False at padding nodes, `[batch, nodes]`."""
        real = self.parents >= 0
        real[:, 0] = True
        return real

    @cached_property
    def ancestor_mask(self) -> Tensor:
        """`mask[b, i, j]`: node j is node i or one of its ancestors, `[batch, nodes, nodes]`, bool.

        Padding nodes see the root and themselves. On a device by pointer doubling: log2(nodes) matrix products.
        """
        batch, nodes = self.tokens.shape
        if nodes == 1:
            return self.tokens.new_ones((batch, 1, 1), dtype=torch.bool)
        if self.tokens.device.type == "cpu":
            return self._ancestors_and_depths[0]
        index = torch.arange(nodes, device=self.tokens.device)
        # A step leads to the node itself, to its parent, and to the root.
        reach = ((self.parents[:, :, None] == index) | (index[:, None] == index)).float()
        reach[:, :, 0] = 1.0
        span = 1
        while span < nodes - 1:
            reach = (reach @ reach).clamp_(max=1.0)
            span *= 2
        return reach > 0

    @cached_property
    def depths(self) -> Tensor:
        """Distance from the root, `[batch, nodes]`, int64. Padding nodes have depth 1."""
        if self.num_nodes == 1:
            return torch.zeros_like(self.tokens)
        if self.tokens.device.type == "cpu":
            return self._ancestors_and_depths[1]
        return self.ancestor_mask.sum(-1) - 1

    @cached_property
    def host_parents(self) -> Ints:
        """The parents as an array on the host, `[batch, nodes]`. Waits for the device, unless `to` brought it there."""
        return host_array(self.parents)

    @cached_property
    def host_tokens(self) -> Ints:
        """The tokens as an array on the host, `[batch, nodes]`. Waits for the device, unless `to` brought it there."""
        return host_array(self.tokens)

    @cached_property
    def host_scores(self) -> NDArray[np.float32] | None:
        """The scores as an array on the host, `[batch, nodes]`, if there are any. Waits for the device."""
        if self.scores is None:
            return None
        return host_array(self.scores if self.scores.dtype == torch.float32 else self.scores.float())

    @cached_property
    def _ancestors_and_depths(self) -> tuple[Tensor, Tensor]:
        mask, depths = ancestors_and_depths(self.host_parents)
        return torch.from_numpy(mask), torch.from_numpy(depths)

    @cached_property
    def deepest(self) -> int:
        """Largest depth of a node. Waits for the device."""
        return int(self.depths.max())

    @cached_property
    def is_chain(self) -> bool:
        """Whether every node's parent is the node before it, with padding at the end only."""
        parents = self.host_parents
        chain = np.arange(-1, self.num_nodes - 1)
        count = 1 + (parents >= 0).sum(1, keepdims=True)
        return bool((np.where(chain + 1 < count, chain, -1) == parents).all())

    @property
    def num_drafted(self) -> list[int]:
        """Draft tokens per row, padding left out, `[batch]`. Waits for the device."""
        counts: list[int] = (self.host_parents[:, 1:] >= 0).sum(1).tolist()
        return counts

    def first(self, nodes: int) -> TokenTree:
        """The tree of the first `nodes` nodes (all of it when it has no more)."""
        if nodes >= self.num_nodes:
            return self
        cut = slice(0, nodes)
        if "_has_arrays" in self.__dict__:
            assert self.host_scores is not None
            return TokenTree.of_arrays(self.host_tokens[:, cut], self.host_parents[:, cut], self.host_scores[:, cut])
        return TokenTree(
            self.tokens[:, cut],
            self.parents[:, cut],
            None if self.scores is None else self.scores[:, cut],
            None if self.draft_probs is None else self.draft_probs[:, cut],
        )

    def up_to_depth(self, limits: Sequence[int]) -> TokenTree:
        """The tree with padding in place of the nodes deeper than each row's limit, `[batch]`. Waits for the device."""
        if self.num_nodes <= min(limits) + 1:  # not even a chain would be deeper
            return self
        is_deeper = self.depths > torch.tensor(limits, device=self.tokens.device)[:, None]
        if not bool(is_deeper.any()):
            return self
        return replace(self, parents=self.parents.masked_fill(is_deeper, -1))

    def first_chain(self) -> TokenTree:
        """The chain of first children from the root down: the best single path of a best-first tree."""
        chains = []
        for parents in self.parents.tolist():
            first_child: dict[int, int] = {}
            for node in range(self.num_nodes - 1, 0, -1):
                first_child[parents[node]] = node
            chain = [0]
            while chain[-1] in first_child:
                chain.append(first_child[chain[-1]])
            chains.append(chain)
        nodes = max(map(len, chains))
        index = torch.tensor([chain + [0] * (nodes - len(chain)) for chain in chains], device=self.tokens.device)
        parents = [[*range(-1, len(chain) - 1)] + [-1] * (nodes - len(chain)) for chain in chains]
        return TokenTree(
            self.tokens.gather(1, index),
            torch.tensor(parents, device=self.tokens.device),
            None if self.scores is None else self.scores.gather(1, index),
            None if self.draft_probs is None else self.draft_probs[torch.arange(len(index))[:, None], index],
        )

    def validate(self, vocab_size: int) -> None:
        """Checks token ids and parents; waits for the device.

        Raises:
            ValueError: A token is not below `vocab_size`, or a parent does not stand before its child, or either is not
                an integer.
        """
        if self.tokens.dtype != torch.int64 or self.parents.dtype != torch.int64:
            raise ValueError(f"tokens and parents must be int64, got {self.tokens.dtype} and {self.parents.dtype}")
        tokens, parents = self.host_tokens, self.host_parents
        if is_valid(tokens, parents, vocab_size):
            return
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise ValueError(f"draft tokens must be in [0, {vocab_size}), got {tokens.min()} to {tokens.max()}")
        raise ValueError("every parent must stand before its child; parents[:, 0] must be -1, as at padding")

    def padded_to(self, nodes: int) -> TokenTree:
        """The same tree with padding nodes up to a width of `nodes`."""
        more = nodes - self.num_nodes
        if more <= 0:
            return self
        pad = torch.nn.functional.pad
        return TokenTree(
            pad(self.tokens, (0, more)),
            pad(self.parents, (0, more), value=-1),
            None if self.scores is None else pad(self.scores, (0, more)),
            None if self.draft_probs is None else pad(self.draft_probs, (0, 0, 0, more)),
        )

    def to(self, device: torch.device) -> TokenTree:
        """The same tree on `device`."""
        if self.tokens.device == device:
            return self
        tree = TokenTree(
            self.tokens.to(device, non_blocking=True),
            self.parents.to(device, non_blocking=True),
            None if self.scores is None else self.scores.to(device, non_blocking=True),
            None if self.draft_probs is None else self.draft_probs.to(device, non_blocking=True),
        )
        tree.__dict__["deepest"] = self.deepest  # read here, where it is known without waiting
        tree.__dict__.update(host_tokens=self.host_tokens, host_parents=self.host_parents, host_scores=self.host_scores)
        return tree


def _whole(array: NDArray[Any]) -> NDArray[Any]:
    """A contiguous array, the same one if it is."""
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)
