"""Tree attention for models loaded with flash attention: its kernel for the committed slots, merged with the tree."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.passes.attention.base import AttentionCall, TreeAttention, UnsupportedAttentionError
from specdec.passes.attention.merge import masked_attention, merge
from specdec.passes.attention.plan import TreePlan

PACKAGES = ("flash_attn_interface", "flash_attn")
"""Where FlashAttention 3 and 2 are found, the faster one first. Both take the arguments used here."""


@dataclass
class FlashTreeAttention(TreeAttention):
    """FlashAttention over the slots that every node sees, a masked attention over the few others, and a merge.

    All nodes see the committed slots from the first one of the deepest node on. The few before that, which only shallow
    nodes still have in their window, go with the tree. "FlashAttention-2", arXiv 2307.08691; merged as there.

    Args:
        kernel: In place of `flash_attn_with_kvcache`, with its arguments.
    """

    kernel: Callable[..., Any] | None = None
    name = "flash"

    def missing(self) -> str | None:
        if self.kernel is None and not any(importlib.util.find_spec(package) for package in PACKAGES):
            return "it needs the package flash-attn: pip install 'specdec-hf[flash]', on a machine with a CUDA GPU"
        return None

    @cached_property
    def _kernel(self) -> Callable[..., Any]:
        if self.kernel is not None:
            return self.kernel
        package = next(package for package in PACKAGES if importlib.util.find_spec(package))
        kernel: Callable[..., Any] = importlib.import_module(package).flash_attn_with_kvcache
        return kernel

    def attend(self, call: AttentionCall) -> Tensor:
        plan, kind = call.plan, call.layer_type
        if not plan.is_left_padded:
            raise UnsupportedAttentionError("'flash' takes padding on the left only; use attention='sdpa'")
        if plan.reach(kind)[1] is not None:
            raise UnsupportedAttentionError(
                "'flash' cannot split attention by chunks; use attention='triton' or 'sdpa'"
            )
        if self.kernel is None and call.query.dtype not in (torch.bfloat16, torch.float16):
            raise UnsupportedAttentionError(f"flash-attn takes bfloat16 and float16, not {call.query.dtype}")
        start, edge = plan.once(("flash", kind), lambda: common_slots(plan, kind))
        out, lse = self._prefix(call, start)
        slots, mask = edge
        index = slots[:, None, :, None]
        heads, sizes = call.key.shape[1], (call.key.shape[-1], call.value.shape[-1])
        key, value = (
            cache.gather(2, index.expand(-1, heads, -1, size))
            for cache, size in zip((call.key, call.value), sizes, strict=True)
        )
        few = masked_attention(call.query, key, value, mask, call.scaling, call.softcap)
        return merge([(out, lse), few]).to(call.query.dtype)

    def _prefix(self, call: AttentionCall, start: Tensor) -> tuple[Tensor, Tensor]:
        """Attention over the committed slots from `start` on, `[batch]`: the output and its sum of exponentials."""
        query, key, value = call.query, call.key, call.value
        more = key.shape[-1] - value.shape[-1]  # the kernel wants values of the keys' size
        if more > 0:
            value = F.pad(value, (0, more))
        out, lse, *_ = self._kernel(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            cache_seqlens=call.plan.lengths.int(),
            cache_leftpad=start.int(),
            softmax_scale=call.scaling,
            causal=False,
            softcap=call.softcap or 0.0,
            return_softmax_lse=True,
        )
        # Kernels differ in what they call the sum over nothing.
        is_empty = (start >= call.plan.lengths)[:, None, None]
        lse = lse.transpose(1, 2).masked_fill(is_empty, float("-inf"))
        return out[..., : call.value.shape[-1]], lse


def common_slots(plan: TreePlan, layer_type: str) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Where the committed slots begin that every node sees, and the other slots that some node sees.

    Returns:
        `[batch]`; and the others, `[batch, others]`, with a mask `[batch, nodes, others]`: the tree, and with a window
        as many slots before the common ones, because the windows of two nodes begin at most a tree's depth apart.
    """
    first, lengths, nodes = plan.first(layer_type).long(), plan.lengths, plan.nodes
    start = torch.minimum(first.max(1).values, lengths)
    index = torch.arange(nodes, device=first.device)
    slots, mask = lengths[:, None] + index, plan.visible(layer_type)
    if plan.reach(layer_type)[0] is not None:
        before = start[:, None] - nodes + index
        is_seen = (before >= 0)[:, None] & (before[:, None] >= first[:, :, None])
        slots, mask = torch.cat([before.clamp(min=0), slots], 1), torch.cat([is_seen, mask], 2)
    return start, (slots, mask)
