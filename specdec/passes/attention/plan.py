"""What attention must know of one target pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.passes.masks import MaskFormat, mask_on_device
from specdec.tree import TokenTree

Made = TypeVar("Made")
WORD = 32
"""Nodes to a word of an ancestor bit mask."""


@dataclass(frozen=True)
class TreePlan:
    """Which slots of the kv cache each node of a tree may look at, in the forms that the backends take.

    Row `b` has its committed tokens in slots `0 .. lengths[b]` and node `i` in slot `lengths[b] + i`. Everything is
    computed on the device, where it is first asked for, and no value is read by the host: a plan can be made inside a
    captured step.

    Args:
        tree: `[batch, nodes]`.
        lengths: Committed slots of each row, left padding included, `[batch]`, int64.
        slots: Width of the keys and values that attention is given: at least `max(lengths) + nodes`.
        mask_format: Layer types of the model and the reach of their windows and chunks.
        prompt_mask: `[batch, prompt]`, False at padding; None when nothing is padded.
        is_left_padded: All of the padding stands before the first real token, if there is any.
        needs_no_mask: One node, which sees every slot: backends may leave out the mask.
    """

    tree: TokenTree
    lengths: Tensor
    slots: int
    mask_format: MaskFormat = field(default_factory=MaskFormat)
    prompt_mask: Tensor | None = None
    is_left_padded: bool = True
    needs_no_mask: bool = False
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def nodes(self) -> int:
        """Width of the tree."""
        return self.tree.num_nodes

    def reach(self, layer_type: str) -> tuple[int | None, int | None]:
        """Window and chunk of the layers of a type."""
        window = self.mask_format.window if layer_type == "sliding_attention" else None
        chunk = self.mask_format.chunk if layer_type == "chunked_attention" else None
        return window, chunk

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` returned when it was first called with this key: layers share what they need."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made

    def dense_mask(self, layer_type: str, groups: int = 1) -> Tensor:
        """The mask as one boolean per node and slot.

        Args:
            layer_type: As in the model's config.
            groups: Query heads that share a key head and are packed as rows, those of one head after another.

        Returns:
            `[batch, 1, groups * nodes, slots]`, bool.
        """

        def make() -> Tensor:
            if groups > 1:
                return self.dense_mask(layer_type).repeat(1, 1, groups, 1)
            reach = self.reach(layer_type)
            return mask_on_device(self.tree, self.lengths, self.slots, self.prompt_mask, *reach)

        return self.once(("dense", layer_type, groups), make)

    def first(self, layer_type: str) -> Tensor:
        """The first slot that each node may see: left padding, windows and chunks in one number.

        Returns:
            `[batch, nodes]`, int32. A committed slot is visible from here on, a node if it is an ancestor as well.
        """

        def make() -> Tensor:
            window, chunk = self.reach(layer_type)
            first = torch.zeros_like(self.tree.tokens)
            if self.prompt_mask is not None:
                first = first + (self.prompt_mask.cumsum(1) == 0).sum(1, keepdim=True)
            position = self.lengths[:, None] + self.tree.depths
            if chunk is not None:
                first = first + (position - first) // chunk * chunk
            if window is not None:
                first = torch.maximum(first, position - window + 1)
            return first.int()

        return self.once(("first", layer_type), make)

    def visible(self, layer_type: str) -> Tensor:
        """Which nodes each node may see: itself and its ancestors, where they are in reach.

        Returns:
            `[batch, nodes, nodes]`, bool.
        """

        def make() -> Tensor:
            if self.reach(layer_type) == (None, None):
                return self.tree.ancestor_mask
            position = self.lengths[:, None] + self.tree.depths
            return self.tree.ancestor_mask & (position[:, None] >= self.first(layer_type)[:, :, None])

        return self.once(("visible", layer_type), make)

    def bits(self, layer_type: str) -> Tensor:
        """`visible` with 32 nodes to a word, the first in the lowest bit.

        Returns:
            `[batch, nodes, ceil(nodes / 32)]`, int32.
        """

        def make() -> Tensor:
            visible = F.pad(self.visible(layer_type), (0, -self.nodes % WORD))
            bit = torch.arange(WORD, device=visible.device)
            # Powers of two add up without carries; the highest bit is the sign of an int32.
            worth = torch.where(bit < WORD - 1, 1 << bit, -(1 << bit))
            return (visible.unflatten(2, (-1, WORD)) * worth).sum(-1).int()

        return self.once(("bits", layer_type), make)
