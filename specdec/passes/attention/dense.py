"""Tree attention with a mask of one boolean per node and slot."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from specdec.passes.attention.base import AttentionCall, TreeAttention, UnsupportedAttentionError


@dataclass
class SdpaAttention(TreeAttention):
    """torch's scaled dot-product attention with a mask.

    Query heads that share a key head are packed as rows of one head, so that keys and values need not be copied for
    each of them, which a mask demands of the kernels otherwise.
    """

    name = "sdpa"

    def attend(self, call: AttentionCall) -> Tensor:
        if call.softcap is not None:
            raise UnsupportedAttentionError("'sdpa' cannot cap scores; use attention='triton' or 'model'")
        plan, groups = call.plan, call.groups
        mask = None if plan.needs_no_mask else plan.dense_mask(call.layer_type, groups)
        batch, heads, nodes, size = call.query.shape
        query = call.query.reshape(batch, heads // groups, groups * nodes, size)
        key, value = call.key[:, :, : plan.slots], call.value[:, :, : plan.slots]
        out = F.scaled_dot_product_attention(query, key, value, mask, scale=call.scaling)
        return out.reshape(batch, heads, nodes, out.shape[-1]).transpose(1, 2)
