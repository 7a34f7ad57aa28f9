"""Lengths at which a model begins to treat all tokens of a pass otherwise, so that passes over many tokens differ."""

from __future__ import annotations

from typing import Any

from specdec.target import CausalLM

SWITCHING_ROPE = ("longrope", "dynamic")
"""Rotary embeddings whose frequencies depend on the largest position of the pass."""


def length_limit(model: CausalLM) -> tuple[int, str] | None:
    """Up to how many tokens a pass over many tokens is the same as many passes, and what changes beyond; None for ever.

    What the probe finds out holds for short sequences. These are the known cases, of any architecture of transformers,
    in which longer ones behave otherwise.
    """
    config = model.config.get_text_config(decoder=True)
    limits = [*_rope_limits(config)]
    if getattr(config, "attn_temperature_tuning", False) and hasattr(config, "floor_scale"):
        limits.append((int(config.floor_scale), "attention is scaled by the slot in the kv cache"))
    if "local" in getattr(config, "attention_layers", ()):
        limits.append((config.window_size, "layers have a window that their kv cache does not tell of"))
    return min(limits, default=None)


def _rope_limits(config: Any) -> list[tuple[int, str]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    found = []
    for rope in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        if (kind := rope.get("rope_type")) in SWITCHING_ROPE:
            length = rope.get("original_max_position_embeddings")
            length = length or getattr(config, "original_max_position_embeddings", None)
            found.append((int(length or config.max_position_embeddings), f"{kind} rotary embeddings change"))
    return found
