"""Tree attention with a mask of one boolean per node and slot."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from specdec.passes.attention.base import AttentionCall, TreeAttention, UnsupportedAttentionError


@dataclass
class ModelAttention(TreeAttention):
    """What the model was loaded with, given a mask.

    Args:
        implementation: Its name in transformers.
    """

    implementation: str = "sdpa"
    name = "model"

    def attend(self, call: AttentionCall) -> Tensor:
        if self.implementation != "sdpa":  # a mask of one boolean per node and slot is what SDPA takes
            raise UnsupportedAttentionError(f"'model' is {self.implementation!r} here, which cannot be compared")
        plan = call.plan
        mask = None if plan.needs_no_mask else plan.dense_mask(call.layer_type)
        function = AttentionInterface()[self.implementation]
        out: Tensor = function(call.module, call.query, call.key, call.value, mask, **call.options)[0]
        return out


@dataclass
class SdpaAttention(TreeAttention):
    """torch's scaled dot-product attention with a mask.

    Query heads that share a key head are packed as rows of one head, so that keys and values need not be copied for
    each of them, which a mask demands of the kernels otherwise.
    """

    name = "sdpa"

    def attend(self, call: AttentionCall) -> Tensor:
        if call.softcap is not None:
            raise UnsupportedAttentionError("'sdpa' cannot cap scores; use attention='flex' or 'triton'")
        plan, groups = call.plan, call.groups
        mask = None if plan.needs_no_mask else plan.dense_mask(call.layer_type, groups)
        batch, heads, nodes, size = call.query.shape
        query = call.query.reshape(batch, heads // groups, groups * nodes, size)
        key, value = call.key[:, :, : plan.slots], call.value[:, :, : plan.slots]
        out = F.scaled_dot_product_attention(query, key, value, mask, scale=call.scaling)
        return out.reshape(batch, heads, nodes, out.shape[-1]).transpose(1, 2)
