"""Triton kernels: tree attention and the commit of a path. Imported where triton is installed only."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scores(query, key, scaling, softcap, HAS_CAP: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores in base 2, `[rows, slots]`."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scaling
    if HAS_CAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), which is right for infinite exponentials too.
        scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2_E / softcap)) + 1.0))
    return scores * LOG2_E


@triton.jit
def _add(scores, value, highest, total, out, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """One block of the running softmax. Hidden places have a score of -inf."""
    new = tl.maximum(highest, tl.max(scores, 1))
    shift = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet
    weights = tl.exp2(scores - shift[:, None])
    kept = tl.exp2(highest - shift)
    total = total * kept + tl.sum(weights, 1)
    out = out * kept[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
    return new, total, out


@triton.jit
def attend_parts(  # type: ignore[no-untyped-def]
    query,  # [batch, query heads, nodes, HEAD]
    key,  # [batch, key heads, slots, HEAD]
    value,  # [batch, key heads, slots, VALUE]
    first,  # [batch, nodes], int32: first visible slot
    lengths,  # [batch], int64: committed slots
    bits,  # [batch, nodes, words], int32: visible nodes
    partial,  # [batch, query heads, nodes, splits + 1, VALUE], float32
    partial_lse,  # [batch, query heads, nodes, splits + 1], float32, base 2
    query_row,
    query_head,
    query_node,
    key_row,
    key_head,
    key_slot,
    value_row,
    value_head,
    value_slot,
    scaling,
    softcap,
    nodes,
    words,
    splits,
    blocks,
    GROUPS: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of one block of packed rows over one split of the committed slots, or over the tree.

    A row of the block is a node of one of the query heads that share a key head. Programs of the first dimension: the
    splits, then the tree. How long a split is follows from the row's length on the device.
    """
    split = tl.program_id(0)
    head = (tl.program_id(1) // blocks).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    packed = (tl.program_id(1) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    node = packed // GROUPS
    is_row = node < nodes
    query_at = head * GROUPS + packed % GROUPS
    d = tl.arange(0, BLOCK_D)
    v = tl.arange(0, BLOCK_V)

    where = query + row * query_row + query_at[:, None] * query_head + node[:, None] * query_node + d[None, :]
    q = tl.load(where, mask=is_row[:, None] & (d < HEAD)[None, :], other=0.0)
    length = tl.load(lengths + row).to(tl.int32)
    starts = tl.load(first + row * nodes + node, mask=is_row, other=0)
    lowest = tl.load(first + row * nodes)  # of the root: the deeper a node, the later its first slot
    keys = key + row * key_row + head * key_head
    values = value + row * value_row + head * value_head

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)

    span = tl.cdiv(tl.cdiv(tl.maximum(length - lowest, 0), BLOCK_S), splits) * BLOCK_S
    begin = lowest + split * span
    end = tl.where(split < splits, tl.minimum(begin + span, length), begin)
    for at in range(begin, end, BLOCK_S):
        slot = at + tl.arange(0, BLOCK_S)
        is_slot = slot < end
        k = tl.load(
            keys + slot[:, None] * key_slot + d[None, :], mask=is_slot[:, None] & (d < HEAD)[None, :], other=0.0
        )
        scores = _scores(q, k, scaling, softcap, HAS_CAP, PRECISION)
        is_visible = is_slot[None, :] & (slot[None, :] >= starts[:, None])
        scores = tl.where(is_visible, scores, float("-inf"))
        x = tl.load(
            values + slot[:, None] * value_slot + v[None, :], mask=is_slot[:, None] & (v < VALUE)[None, :], other=0.0
        )
        highest, total, out = _add(scores, x, highest, total, out, PRECISION)

    for at in range(0, tl.where(split < splits, 0, nodes), BLOCK_T):
        other = at + tl.arange(0, BLOCK_T)
        slot = length + other
        is_slot = other < nodes
        k = tl.load(
            keys + slot[:, None] * key_slot + d[None, :], mask=is_slot[:, None] & (d < HEAD)[None, :], other=0.0
        )
        scores = _scores(q, k, scaling, softcap, HAS_CAP, PRECISION)
        word = tl.load(bits + (row * nodes + node) * words + at // 32, mask=is_row, other=0)
        scores = tl.where(((word[:, None] >> (other % 32)[None, :]) & 1) != 0, scores, float("-inf"))
        x = tl.load(
            values + slot[:, None] * value_slot + v[None, :], mask=is_slot[:, None] & (v < VALUE)[None, :], other=0.0
        )
        highest, total, out = _add(scores, x, highest, total, out, PRECISION)

    heads = tl.num_programs(1) // blocks * GROUPS
    place = ((row * heads + query_at) * nodes + node) * (splits + 1) + split
    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    lse = tl.where(is_empty, float("-inf"), highest + tl.log2(total))
    tl.store(partial_lse + place, lse, mask=is_row)
    where = partial + place[:, None] * VALUE + v[None, :]
    tl.store(where, out / total[:, None], mask=is_row[:, None] & (v < VALUE)[None, :])


@triton.jit
def merge_parts(  # type: ignore[no-untyped-def]
    partial,  # [batch, query heads, nodes, parts, VALUE], float32
    partial_lse,  # [batch, query heads, nodes, parts], float32, base 2
    out,  # [batch, nodes, query heads, VALUE]
    heads,
    nodes,
    parts,
    VALUE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Weighs the parts of one row by their sums of exponentials. Every node sees itself, so some part has a sum."""
    row = tl.program_id(0).to(tl.int64)  # (batch * heads + head) * nodes + node
    part = tl.arange(0, BLOCK_P)
    v = tl.arange(0, BLOCK_V)
    lse = tl.load(partial_lse + row * parts + part, mask=part < parts, other=float("-inf"))
    weights = tl.exp2(lse - tl.max(lse, 0))
    where = partial + (row * parts + part[:, None]) * VALUE + v[None, :]
    x = tl.load(where, mask=(part < parts)[:, None] & (v < VALUE)[None, :], other=0.0)
    merged = tl.sum(x * weights[:, None], 0) / tl.sum(weights, 0)
    node = row % nodes
    head = row // nodes % heads
    batch = row // nodes // heads
    place = ((batch * nodes + node) * heads + head) * VALUE + v
    tl.store(out + place, merged.to(out.dtype.element_ty), mask=v < VALUE)


@triton.jit
def move_path(  # type: ignore[no-untyped-def]
    keys,  # [layers, batch, heads, slots, KEY]
    values,  # [layers, batch, heads, slots, VALUE]
    rows,  # [rows], int64
    source,  # [rows, count], int64
    target,  # [rows, count], int64: ascending, none behind its source
    key_layer,
    key_row,
    key_head,
    key_slot,
    value_layer,
    value_row,
    value_head,
    value_slot,
    heads,
    count,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Moves the slots of one row, layer and head, one after another: a target may be a later one's source."""
    layer = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    moved = tl.program_id(1)
    row = tl.load(rows + moved)
    keys += layer * key_layer + row * key_row + head * key_head
    values += layer * value_layer + row * value_row + head * value_head
    d = tl.arange(0, BLOCK)
    for i in range(count):
        old = tl.load(source + moved * count + i)
        new = tl.load(target + moved * count + i)
        if old != new:
            key = tl.load(keys + old * key_slot + d, mask=d < KEY, other=0.0)
            value = tl.load(values + old * value_slot + d, mask=d < VALUE, other=0.0)
            tl.debug_barrier()  # all threads have read what one of them may overwrite next
            tl.store(keys + new * key_slot + d, key, mask=d < KEY)
            tl.store(values + new * value_slot + d, value, mask=d < VALUE)
            tl.debug_barrier()
