"""Warnings of calls that the model's own `generate` does."""

from __future__ import annotations

import inspect

from specdec.common.provenance import versions
from specdec.compat import TESTED, has_default_cache
from specdec.kv_cache import ATTENTION_LAYER_TYPES
from specdec.target import CausalLM, cache_layer_types


class FallbackWarning(UserWarning):
    """The model's own `generate` did the work, because the call cannot be speculated on."""


class UnexpectedFallbackWarning(FallbackWarning):
    """The same for a model that should take drafts: most likely the installed versions do not fit together."""


def takes_drafts(model: CausalLM) -> bool:
    """Whether nothing in a model's config and signature explains why it cannot be run ahead.

    True for models whose layers all attend to a kv cache that transformers makes for them.
    """
    try:
        kinds = set(cache_layer_types(model))
    except Exception:  # configs of remote code may lack what transformers reads
        return False
    # By part of the name, as versions of transformers name it differently.
    takes_cache = any("cache" in name or "past" in name for name in inspect.signature(model.forward).parameters)
    return kinds <= ATTENTION_LAYER_TYPES | {"dummy"} and takes_cache and has_default_cache(model)


def remedy(model: CausalLM) -> str:
    """What to do about a model that should take drafts and does not."""
    installed = ", ".join(f"{name} {version or '(unknown)'}" for name, version in versions().items())
    oldest, newest = TESTED
    return (
        f"{type(model).__name__} has attention layers only and should take drafts; these versions may not fit "
        f"together: {installed}. Install transformers {oldest} to {newest}, which specdec is tested with, or a newer "
        "specdec. If the model itself is the cause, capability='plain' says so and ends this warning."
    )
