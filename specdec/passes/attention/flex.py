"""Tree attention with torch's FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from specdec.passes.attention.base import AttentionCall, TreeAttention, UnsupportedAttentionError
from specdec.passes.attention.plan import TreePlan


@dataclass
class FlexTreeAttention(TreeAttention):
    """FlexAttention with the tree as a `mask_mod`: whole blocks out of every node's reach are skipped.

    Compiled on a GPU (once per combination of head sizes, which takes seconds); elsewhere it runs as it is, without a
    kernel of its own, and is there to be compared with. "Flex Attention: A Programming Model for Generating Optimized
    Attention Kernels", arXiv 2412.05496.

    Args:
        compiles: Compile it; None for on a GPU only.
    """

    compiles: bool | None = None
    name = "flex"

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        compiled: Callable[..., Any] = torch.compile(flex_attention)
        return compiled

    def attend(self, call: AttentionCall) -> Tensor:
        plan, kind = call.plan, call.layer_type
        if not plan.is_left_padded:
            raise UnsupportedAttentionError("'flex' takes padding on the left only; use attention='sdpa'")
        compiles = call.query.is_cuda if self.compiles is None else self.compiles
        attention: Any = self._compiled if compiles else flex_attention
        out: Tensor = attention(
            call.query,
            call.key[:, :, : plan.slots],
            call.value[:, :, : plan.slots],
            score_mod=None if call.softcap is None else capping(call.softcap),
            block_mask=plan.once(("block", kind), lambda: tree_block_mask(plan, kind)),
            scale=call.scaling,
            enable_gqa=call.groups > 1,
        )
        return out.transpose(1, 2)


def capping(cap: float) -> Callable[..., Tensor]:
    """A `score_mod` that caps the scores."""

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


def tree_block_mask(plan: TreePlan, layer_type: str) -> BlockMask:
    """Committed slots from each node's first one on, and the nodes that it may see, as FlexAttention takes them."""
    first, visible, lengths = plan.first(layer_type), plan.visible(layer_type), plan.lengths
    batch, nodes = first.shape

    def may_see(row: Tensor, head: Tensor, query: Tensor, slot: Tensor) -> Tensor:
        node = slot - lengths[row]
        is_committed = (node < 0) & (slot >= first[row, query])
        is_node = (node >= 0) & (node < nodes)
        return is_committed | (is_node & visible[row, query, node.clamp(0, nodes - 1)])

    return create_block_mask(may_see, batch, None, nodes, plan.slots, device=first.device)
