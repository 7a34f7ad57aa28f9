"""Attention masks for a token tree behind committed tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specdec.kernels import visible_slots
from specdec.tree import TokenTree


@dataclass(frozen=True)
class MaskFormat:
    """How a model takes a ready-made 4-D mask.

    Args:
        additive: A float mask with the dtype's minimum at hidden places (eager attention), not a boolean one.
        by_layer_type: One mask per layer type in a dict (models that mix windows with full attention).
        layer_types: The distinct layer types of the model.
        window: Tokens a sliding layer sees, the current one included, or None.
        chunk: Length of a chunk of chunked attention, or None.
    """

    additive: bool = False
    by_layer_type: bool = False
    layer_types: tuple[str, ...] = ("full_attention",)
    window: int | None = None
    chunk: int | None = None

    @property
    def is_local(self) -> bool:
        """Whether some layers see a window or a chunk only."""
        return self.window is not None or self.chunk is not None

    def build(
        self,
        tree: TokenTree,
        lengths: Sequence[int],
        prompt_mask: Tensor | None,
        dtype: torch.dtype,
        first: int = 0,
    ) -> Tensor | dict[str, Tensor]:
        """Masks in this format; see `tree_mask` for the arguments and shapes.

        Args:
            first: Nodes before this one have gone through the model in an earlier pass: no rows for them.
        """
        return self._each(
            lambda window, chunk: tree_mask(tree, lengths, prompt_mask, window, chunk)[:, :, first:], dtype
        )

    def build_on_device(
        self, tree: TokenTree, lengths: Tensor, slots: int, prompt_mask: Tensor | None, dtype: torch.dtype
    ) -> Tensor | dict[str, Tensor]:
        """Masks in this format without a value read by the host; see `mask_on_device`."""
        return self._each(lambda window, chunk: mask_on_device(tree, lengths, slots, prompt_mask, window, chunk), dtype)

    def build_bool(self, tree: TokenTree, lengths: Sequence[int], first: int = 0) -> dict[str, Tensor]:
        """Boolean masks by layer type, of which `formed` makes this format; see `build`."""
        return self._of_types(lambda window, chunk: tree_mask(tree, lengths, None, window, chunk)[:, :, first:])

    def formed(self, masks: dict[str, Tensor], dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """Boolean masks in this format."""
        if self.additive:
            masks = {
                kind: torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
                for kind, mask in masks.items()
            }
        return masks if self.by_layer_type else next(iter(masks.values()))

    def _each(self, make: Callable[[int | None, int | None], Tensor], dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        return self.formed(self._of_types(make), dtype)

    def _of_types(self, make: Callable[[int | None, int | None], Tensor]) -> dict[str, Tensor]:
        """One boolean mask per layer type, made from its window and chunk."""
        return {
            kind: make(
                self.window if kind == "sliding_attention" else None,
                self.chunk if kind == "chunked_attention" else None,
            )
            for kind in self.layer_types
        }


def tree_mask(
    tree: TokenTree,
    lengths: Sequence[int],
    prompt_mask: Tensor | None = None,
    window: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """What each node may attend to: the committed tokens of its row, its ancestors and itself.

    Args:
        tree: `[batch, nodes]`.
        lengths: Committed slots of each row (left padding included); node `i` of row `b` is in slot `lengths[b] + i`.
        prompt_mask: `[batch, prompt]`, False at padding; None when nothing is padded.
        window: Hides tokens `window` or more positions back.
        chunk: Hides tokens of other chunks; chunks are counted from the row's first real token.

    Returns:
        `[batch, 1, nodes, max(lengths) + nodes]`, bool.
    """
    device = tree.tokens.device
    if device.type == "cpu" and window is None and chunk is None and prompt_mask is None:
        return torch.from_numpy(visible_slots(tree.host_parents, np.array(lengths))[0])[:, None]
    slots = max(lengths) + tree.num_nodes
    return mask_on_device(tree, torch.tensor(lengths, device=device), slots, prompt_mask, window, chunk)


def mask_on_device(
    tree: TokenTree,
    lengths: Tensor,
    slots: int,
    prompt_mask: Tensor | None = None,
    window: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The same from lengths on the device, which are not read by the host: fit for a captured step.

    Args:
        lengths: `[batch]`, int64.
        slots: Width of the mask: at least `max(lengths) + nodes`, or all slots of a cache whose layout is static.

    Returns:
        `[batch, 1, nodes, slots]`, bool.
    """
    device, nodes = tree.tokens.device, tree.num_nodes
    length = lengths[:, None]  # [B, 1]
    slot = torch.arange(slots, device=device)[None]  # [1, S]
    node = slot - length  # [B, S], negative at committed slots
    committed = node < 0
    if prompt_mask is not None:
        committed[:, : prompt_mask.shape[1]] &= prompt_mask
    index = node.clamp(0, nodes - 1)
    in_tree = tree.ancestor_mask.gather(2, index[:, None].expand(-1, nodes, -1))
    in_tree &= ((node >= 0) & (node < nodes))[:, None]
    mask = committed[:, None] | in_tree  # [B, N, S]

    if window is not None or chunk is not None:
        query = length + tree.depths  # [B, N], position of each node, left padding counted
        key = torch.where(node < 0, slot, length + tree.depths.gather(1, index))  # [B, S]
        if window is not None:
            mask &= query[:, :, None] - key[:, None] < window
        if chunk is not None:
            padding = 0 if prompt_mask is None else (prompt_mask.cumsum(1) == 0).sum(1, keepdim=True)
            mask &= ((query - padding) // chunk)[:, :, None] == ((key - padding) // chunk)[:, None]
    return mask[:, None]
