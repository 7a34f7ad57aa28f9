"""Attention over two sets of slots, merged to attention over both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Weighs each part by its sum of exponentials; exact up to rounding.

    "FlashAttention", arXiv 2205.14135, section 3.1, for the algebra.

    Args:
        parts: Attention over disjoint sets of slots, `[..., value_dim]`, and the logarithm of its sum of exponentials,
            `[...]`, float32; -inf where there was nothing to see (what stands in the output then is ignored). In one
            part at least there must be something.

    Returns:
        `[..., value_dim]`, float32.
    """
    lse = torch.stack([part[1].float() for part in parts])  # [parts, ...]
    weights = torch.softmax(lse, 0)[..., None]
    outs = [out.float().masked_fill(weight == 0, 0.0) for (out, _), weight in zip(parts, weights, strict=True)]
    return sum((out * weight for out, weight in zip(outs, weights, strict=True)), torch.zeros_like(outs[0]))


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention over a few slots, in float32, with the logarithm of its sum of exponentials.

    Args:
        query: `[batch, query heads, nodes, head_dim]`.
        key: `[batch, key heads, slots, head_dim]`.
        value: `[batch, key heads, slots, value_dim]`.
        mask: `[batch, nodes, slots]`, bool; a node may see nothing.
        scaling: Factor of the scores.
        softcap: Cap of the scores, or None.

    Returns:
        `[batch, nodes, query heads, value_dim]` and `[batch, nodes, query heads]`, float32.
    """
    batch, heads, nodes, size = query.shape
    groups = heads // key.shape[1]
    rows = query.reshape(batch, heads // groups, groups * nodes, size)
    scores = (rows @ key.transpose(2, 3)).float() * scaling  # [B, key heads, groups * N, S]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask.repeat(1, groups, 1)[:, None], float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    out = (weights.to(value.dtype) @ value).float()
    shape = batch, heads, nodes
    return out.reshape(*shape, -1).transpose(1, 2), lse.reshape(shape).transpose(1, 2)
