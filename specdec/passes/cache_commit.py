"""Commits without a copy: accepted nodes move to their places in all layers at once."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor


def move_slots(
    keys: Tensor, values: Tensor, rows: Tensor, source: Tensor, target: Tensor, kernel: bool | None = None
) -> None:
    """Copies slots to slots within each row, in all layers of a pool: on CUDA by one kernel, if triton is installed.

    Nothing is read by the host, so the call can be captured. Slots that are in place already are not touched.

    Args:
        keys: `[layers, batch, heads, slots, head_dim]`.
        values: `[layers, batch, heads, slots, value_dim]`.
        rows: Rows of the batch to move in, each once, `[rows, 1]`, int64.
        source: `[rows, count]`, int64.
        target: `[rows, count]`, int64: ascending, and none behind its source. A path of a tree is like that, as parents
            stand before their children; so nothing is overwritten before it has been moved.
        kernel: Use the kernel or not; None: where it is fit.
    """
    if kernel is None:
        kernel = keys.is_cuda and has_triton() and keys.shape[:4] == values.shape[:4]
    if kernel:
        with device_of(keys):
            _launch(keys, values, rows, source, target)
        return
    for tensor in (keys, values):
        tensor[:, rows, :, target] = tensor[:, rows, :, source]


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Inside, Triton launches on a tensor's device; it takes the current one otherwise."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def has_triton() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


def _launch(keys: Tensor, values: Tensor, rows: Tensor, source: Tensor, target: Tensor) -> None:
    from specdec.passes.attention.triton_kernels import move_path

    layers, _, heads, _, key_size = keys.shape
    count = source.shape[1]
    block = 1 << (max(key_size, values.shape[-1]) - 1).bit_length()
    move_path[(layers * heads, len(source))](
        keys,
        values,
        rows.contiguous(),
        source.contiguous(),
        target.contiguous(),
        *keys.stride()[:4],
        *values.stride()[:4],
        heads,
        count,
        KEY=key_size,
        VALUE=values.shape[-1],
        BLOCK=block,
        num_warps=1 if block <= 128 else 2,
    )
