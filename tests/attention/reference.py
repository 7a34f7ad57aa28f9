"""Attention over a tree by its definition, and calls of every shape."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.passes.attention.base import AttentionCall
from specdec.passes.attention.plan import TreePlan
from specdec.passes.masks import MaskFormat
from tests.conformance import ancestors, random_tree

HAS_TRITON = sys.platform == "linux" or importlib.util.find_spec("triton") is not None
"""Its interpreter is part of the environment on Linux: there its tests fail without it."""
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is for Linux")
KIND = {"window": "sliding_attention", "chunk": "chunked_attention"}


@dataclass(frozen=True)
class Shape:
    """A call of attention.

    Args:
        nodes: Width of the tree.
        lengths: Committed slots per row.
        padding: Of these, left padding.
        heads: Query heads and key heads.
        sizes: Of a key and of a value.
        window: Of a sliding layer.
        chunk: Of a chunked layer.
        softcap: Of the scores.
        spare: Slots behind the tree, as a static cache has them.
    """

    nodes: int = 8
    lengths: tuple[int, ...] = (20,)
    padding: tuple[int, ...] | None = None
    heads: tuple[int, int] = (4, 2)
    sizes: tuple[int, int] = (16, 16)
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    spare: int = 0


SHAPES = {
    "one node": Shape(nodes=1),
    "one node, no prefix": Shape(nodes=1, lengths=(0,)),
    "no prefix": Shape(nodes=13, lengths=(0,)),
    "multi-head": Shape(heads=(3, 3), nodes=7),
    "grouped": Shape(heads=(6, 2), nodes=9, lengths=(33,)),
    "multi-query": Shape(heads=(5, 1), nodes=16, lengths=(70,)),
    "128 nodes": Shape(nodes=128, lengths=(40,), heads=(2, 2)),
    "64 nodes, long prefix": Shape(nodes=64, lengths=(600,), heads=(2, 1)),
    "33 nodes": Shape(nodes=33, lengths=(64,)),
    "ragged rows": Shape(nodes=12, lengths=(31, 5, 0, 64)),
    "left padding": Shape(nodes=8, lengths=(30, 30, 24), padding=(0, 11, 24)),
    "window": Shape(nodes=16, lengths=(100, 37), window=8),
    "window of one": Shape(nodes=6, lengths=(9,), window=1),
    "wide window": Shape(nodes=6, lengths=(9,), window=300),
    "window and padding": Shape(nodes=8, lengths=(40, 40), padding=(0, 35), window=12),
    "chunks": Shape(nodes=16, lengths=(61, 40), chunk=16),
    "chunks and padding": Shape(nodes=16, lengths=(61, 40), padding=(7, 3), chunk=16),
    "soft-cap": Shape(nodes=8, lengths=(50,), softcap=5.0),
    "soft-cap and window": Shape(nodes=8, lengths=(50, 20), softcap=20.0, window=9),
    "head size 80": Shape(nodes=4, sizes=(80, 80)),
    "head size 96": Shape(nodes=4, sizes=(96, 96), heads=(8, 2)),
    "head size 128": Shape(nodes=8, sizes=(128, 128), lengths=(150,)),
    "head size 256": Shape(nodes=8, sizes=(256, 256), lengths=(90,)),
    "other value size": Shape(nodes=9, sizes=(48, 32), heads=(4, 4), lengths=(45, 50)),
    "MLA": Shape(nodes=7, sizes=(192, 128), heads=(3, 3), lengths=(40, 21)),
    "spare slots": Shape(nodes=8, lengths=(20, 33), spare=29),
}


def call_of(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> AttentionCall:
    """A call with random queries, keys and values; what no node may see is full of noise."""
    batch, slots = len(shape.lengths), max(shape.lengths) + shape.nodes + shape.spare
    tree = random_tree(seed, batch=batch, nodes=shape.nodes)
    kind = next((name for reach, name in KIND.items() if getattr(shape, reach) is not None), "full_attention")
    prompt_mask = None
    if shape.padding is not None:
        prompt_mask = torch.arange(max(shape.padding)) >= torch.tensor(shape.padding)[:, None]
    generator = torch.Generator().manual_seed(seed)

    def random(heads: int, length: int, size: int) -> Tensor:
        values = torch.randn(batch, length, heads, size, generator=generator).to(device, dtype)
        return values.transpose(1, 2)  # laid out as models lay them out

    plan = TreePlan(
        tree.to(torch.device(device)),
        torch.tensor(shape.lengths, device=device),
        slots,
        MaskFormat(layer_types=(kind,), window=shape.window, chunk=shape.chunk),
        None if prompt_mask is None else prompt_mask.to(device),
    )
    query = random(shape.heads[0], shape.nodes, shape.sizes[0])
    key, value = (random(shape.heads[1], slots, size) for size in shape.sizes)
    scaling = shape.sizes[0] ** -0.5
    return AttentionCall(query, key, value, plan, kind, scaling, shape.softcap)


def visible_slots(shape: Shape, parents: Sequence[int], row: int, node: int) -> list[int]:
    """The slots that a node may look at, by the definition."""
    length, padding = shape.lengths[row], shape.padding[row] if shape.padding else 0
    depth = {other: len(ancestors(parents, other)) - 1 for other in range(len(parents))}
    path = ancestors(parents, node)
    position = length + depth[node]
    slots = []
    for slot in range(length + len(parents)):
        if slot < length:
            is_visible, at = slot >= padding, slot
        else:
            is_visible, at = slot - length in path, length + depth[slot - length]
        if shape.window is not None:
            is_visible &= position - at < shape.window
        if shape.chunk is not None:
            is_visible &= (position - padding) // shape.chunk == (at - padding) // shape.chunk
        if is_visible:
            slots.append(slot)
    return slots


def reference(call: AttentionCall, shape: Shape) -> Tensor:
    """`[batch, nodes, query heads, value_dim]`, one node and head at a time, in float64."""
    query, key, value = (t.double().cpu() for t in (call.query, call.key, call.value))
    batch, heads, nodes, _ = query.shape
    out = torch.zeros(batch, nodes, heads, value.shape[-1], dtype=torch.float64)
    for row in range(batch):
        parents = call.plan.tree.parents[row].tolist()
        for node in range(nodes):
            slots = visible_slots(shape, parents, row, node)
            for head in range(heads):
                of = head // call.groups
                scores = key[row, of, slots] @ query[row, head, node] * call.scaling
                if call.softcap is not None:
                    scores = call.softcap * torch.tanh(scores / call.softcap)
                out[row, node, head] = scores.softmax(0) @ value[row, of, slots]
    return out


def flash_attn_in_torch(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`flash_attn_with_kvcache` by its documentation, rows that see nothing included."""
    assert options["causal"] is False
    assert options["return_softmax_lse"]
    assert options["cache_seqlens"].dtype == options["cache_leftpad"].dtype == torch.int32
    groups = query.shape[2] // key.shape[2]
    key, value = (t.float().repeat_interleave(groups, 2) for t in (key, value))
    scores = torch.einsum("bnhd,bshd->bhns", query.float(), key) * options["softmax_scale"]
    if cap := options["softcap"]:
        scores = cap * torch.tanh(scores / cap)
    slot = torch.arange(key.shape[1])
    seen = (slot < options["cache_seqlens"][:, None]) & (slot >= options["cache_leftpad"][:, None])
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    lse = scores.logsumexp(-1)  # [B, H, N]
    out = torch.einsum("bhns,bshd->bnhd", (scores - lse[..., None]).exp(), value)
    return out.to(query.dtype), lse.masked_fill(lse == float("-inf"), float("inf"))
