"""Tree attention with Triton kernels: split-KV over the committed slots, bits for the tree."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.passes.attention.base import AttentionCall, TreeAttention, UnsupportedAttentionError
from specdec.passes.attention.dense import SdpaAttention
from specdec.passes.attention.plan import WORD
from specdec.passes.cache_commit import device_of

MAX_SPLITS = 31
"""Splits and the tree are 32 parts at most, which the merging kernel holds in registers."""

BLOCK_BYTES = 32 * 1024
"""Keys and values of a block at most; two blocks and the queries are in shared memory at once."""


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below."""
    return 1 << (number - 1).bit_length()


@dataclass
class TritonTreeAttention(TreeAttention):
    """Flash-decoding over the committed slots in splits, and the tree as one more part.

    The committed slots need no mask: a node sees all from its first one on (left padding, windows and chunks are that
    one number). In the tree it sees what its ancestor bits name. Query heads that share a key head are packed as rows,
    so that heads times nodes fill the tensor cores and a key is loaded once for all of them. The parts are merged by
    their sums of exponentials. Grids and shapes follow from batch, nodes and slots alone, lengths are read on the
    device: the calls can be captured in a CUDA graph. "Flash-Decoding for long-context inference" (Dao and others,
    2023); "DeFT: Decoding with Flash Tree-Attention", arXiv 2404.00242, for trees.

    Args:
        splits: Splits of the committed slots; None for as many as fill the device.
    """

    splits: int | None = None
    name = "triton"

    def missing(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "it needs the package triton, which comes with torch for CUDA; else: pip install triton"
        return None

    def attend(self, call: AttentionCall) -> Tensor:
        import triton

        if not call.plan.is_left_padded:  # one number per node does not tell what it sees then
            return SdpaAttention().attend(call)
        if call.query.device.type == "cpu" and not triton.knobs.runtime.interpret:
            raise UnsupportedAttentionError("'triton' needs a GPU; use attention='sdpa' or 'model'")
        with device_of(call.query):
            return self._launch(call)

    def _launch(self, call: AttentionCall) -> Tensor:
        from specdec.passes.attention.triton_kernels import attend_parts, merge_parts

        plan = call.plan
        query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (call.query, call.key, call.value))
        batch, heads, nodes, head_size = query.shape
        key_heads, value_size = key.shape[1], value.shape[-1]
        sizes = BlockSizes.of(call.groups * nodes, head_size, value_size, query.dtype)
        blocks = -(-call.groups * nodes // sizes.rows)
        splits = self.splits or splits_for(query.device, batch * key_heads * blocks, plan.slots // sizes.slots)
        parts = splits + 1
        partial = torch.empty((batch, heads, nodes, parts, value_size), dtype=torch.float32, device=query.device)
        partial_lse = torch.empty((batch, heads, nodes, parts), dtype=torch.float32, device=query.device)
        bits = plan.bits(call.layer_type)
        exact = query.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
        attend_parts[(parts, key_heads * blocks, batch)](
            query,
            key,
            value,
            plan.first(call.layer_type),
            plan.once("lengths", plan.lengths.contiguous),  # in a static step a column of something wider
            bits,
            partial,
            partial_lse,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            call.scaling,
            call.softcap or 1.0,
            nodes,
            bits.shape[-1],
            splits,
            blocks,
            GROUPS=call.groups,
            HEAD=head_size,
            VALUE=value_size,
            BLOCK_D=sizes.head,
            BLOCK_V=sizes.value,
            BLOCK_M=sizes.rows,
            BLOCK_S=sizes.slots,
            BLOCK_T=min(sizes.slots, WORD),
            HAS_CAP=call.softcap is not None,
            PRECISION="ieee" if exact else "tf32",
            num_warps=sizes.warps,
            num_stages=2,
        )
        out = torch.empty((batch, nodes, heads, value_size), dtype=query.dtype, device=query.device)
        merge_parts[(batch * heads * nodes,)](
            partial,
            partial_lse,
            out,
            heads,
            nodes,
            parts,
            VALUE=value_size,
            BLOCK_V=sizes.value,
            BLOCK_P=next_power_of_2(parts),
            num_warps=4,
        )
        return out


@dataclass(frozen=True)
class BlockSizes:
    """What one program works on at a time.

    Args:
        rows: Packed rows: nodes times query heads of a key head.
        slots: Keys and values.
        head: Size of a key, padded to a power of two.
        value: Size of a value, padded to a power of two.
        warps: Groups of 32 threads.
    """

    rows: int
    slots: int
    head: int
    value: int
    warps: int

    @classmethod
    def of(cls, rows: int, head_size: int, value_size: int, dtype: torch.dtype) -> BlockSizes:
        """Sizes that stay within the registers and the shared memory of the smaller cards too.

        Args:
            rows: Nodes times query heads of a key head.
            head_size: Size of a key.
            value_size: Size of a value.
            dtype: Of keys and values.
        """
        head, value = max(next_power_of_2(head_size), 16), max(next_power_of_2(value_size), 16)
        most = 128 if max(head, value) <= 128 else 64
        if dtype.itemsize > 2:
            most = 32
        block = min(max(next_power_of_2(rows), 16), most)
        fitting = max(BLOCK_BYTES // ((head + value) * dtype.itemsize), 16)
        slots = min(1 << (fitting.bit_length() - 1), 64)
        return cls(block, slots, head, value, 8 if block > 64 else 4)


def splits_for(device: torch.device, programs: int, most: int) -> int:
    """Splits that give every multiprocessor two programs, and each split at least one block of slots.

    Args:
        device: Where it runs.
        programs: Programs per split.
        most: Blocks of slots.
    """
    if device.type != "cuda":
        return max(1, min(2, most))
    wanted = -(-2 * torch.cuda.get_device_properties(device).multi_processor_count // programs)
    return max(1, min(wanted, most, MAX_SPLITS))
