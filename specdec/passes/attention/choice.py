"""Which backend computes attention over trees: a fixed rule, or the caller's choice."""

from __future__ import annotations

from collections.abc import Callable

import torch

from specdec.passes.attention.base import TreeAttention
from specdec.passes.attention.dense import SdpaAttention
from specdec.passes.attention.flash import FlashTreeAttention
from specdec.passes.attention.triton_attention import TritonTreeAttention

AttentionLike = str
"""`"auto"`, `"model"` (what the model was loaded with, given a mask), or the name of a backend."""

BACKENDS: dict[str, Callable[[], TreeAttention]] = {
    "sdpa": SdpaAttention,
    "triton": TritonTreeAttention,
    "flash": FlashTreeAttention,
}
"""Backends by name, beside `"model"`."""


def check_attention(attention: AttentionLike) -> None:
    """Refuses unknown names and backends that are not installed.

    Raises:
        ValueError: The name is not known.
        TypeError: It is not a name.
        ImportError: The backend needs a package that is missing.
    """
    known = ", ".join(map(repr, ("auto", "model", *BACKENDS)))
    if not isinstance(attention, str):
        raise TypeError(f"attention={attention!r} must be one of {known}; backends are not chosen by measurement")
    if attention == "flex":
        raise ValueError("attention='flex' was removed; use 'triton', which skips what no node sees, or 'sdpa'")
    if attention not in ("auto", "model", *BACKENDS):
        raise ValueError(f"attention={attention!r} is not known; use one of {known}")
    if attention in BACKENDS and (missing := BACKENDS[attention]().missing()):
        raise ImportError(f"attention={attention!r} cannot be used: {missing}")


def candidates(attention: AttentionLike, implementation: str, device: torch.device) -> list[str]:
    """Names in the order in which the probe tries them; the first one that is right is used.

    On CUDA that is Triton, then packed SDPA, then what the model was loaded with; elsewhere the latter alone. The
    prompt always goes through what the model was loaded with.

    Args:
        attention: The caller's choice.
        implementation: What the model was loaded with, as transformers names it.
        device: Where the model runs.
    """
    if attention != "auto":
        return [attention]
    is_flash = implementation.startswith("flash_attention")
    if device.type != "cuda" or not (is_flash or implementation in ("sdpa", "eager")):
        return ["model"]
    names = ["sdpa"] if BACKENDS["triton"]().missing() else ["triton", "sdpa"]
    return names if is_flash else [*names, "model"]  # flash attention takes no tree mask


def backend_of(name: str) -> TreeAttention | None:
    """A backend by name; None for what the model was loaded with."""
    return None if name == "model" else BACKENDS[name]()
