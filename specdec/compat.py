"""Names that differ among the supported versions of transformers, and its private names: nowhere else are they used.

Names are detected by feature, never by version number. `make compat` runs the tests with the oldest and the newest
supported version.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import fsdp
from transformers import GenerationConfig
from transformers import cache_utils as caches
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation import GenerationMixin
from transformers.generation import utils as generation_utils
from transformers.generation.configuration_utils import GenerationMode
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

Model: TypeAlias = Any

TESTED = ("5.17", "5.24")
"""The oldest and the newest minor version of transformers that the tests run with."""

CACHE = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
"""Name of the kv cache among the arguments of `generate` and of a forward, and in their outputs.

`"cache"` since transformers 5.24, where the earlier `"past_key_values"` warns of deprecation.
"""

DummyLayer: type[Any] = getattr(caches, "DummyLayer", None) or caches.LinearAttentionLayer
"""A cache layer that holds nothing. Before transformers 5.23 an empty `LinearAttentionLayer` serves as one."""

PREFILL_ONLY = frozenset(
    {"mm_encoder_outputs", *getattr(generation_utils, "MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL", ())}
)
"""Arguments of a forward, pictures for one, that `generate` hands to the prefill alone."""

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
"""Arguments of the model's forward with one id per token, which tells text from pictures."""

_MARKS_CACHES = "_is_user_defined" in getattr(
    getattr(getattr(GenerationMixin, "_prepare_cache_for_generation", None), "__code__", None), "co_names", ()
)

_METHODS = {
    GenerationMode.BEAM_SEARCH: "_beam_search",
    GenerationMode.BEAM_SAMPLE: "_beam_search",
    GenerationMode.ASSISTED_GENERATION: "_assisted_decoding",
}

_WITHOUT_ATTENTION = ("moe", "mlp")
"""Layer types that keep nothing; since transformers 5.23 transformers itself calls them `"dummy"`."""


def cache_layers(config: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """What each layer keeps between steps: its type in transformers' words, and the settings of its cache layer.

    Args:
        config: Of the text decoder.
    """
    types, settings = getattr(caches, "get_layer_types_and_kwargs", _layer_types)(config)
    types = ["dummy" if kind in _WITHOUT_ATTENTION else kind for kind in types]
    if isinstance(settings, Mapping):  # before transformers 5.19: the same for all layers
        settings = [settings] * len(types)
    return list(zip(types, settings, strict=True))


def _layer_types(config: Any) -> tuple[list[str], dict[str, Any]]:
    """What transformers' `get_layer_types_and_kwargs` returns for models of attention layers."""
    window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    local = "sliding_attention" if window is not None else "chunked_attention" if chunk is not None else None
    types = getattr(config, "layer_types", None) or [local or "full_attention"] * config.num_hidden_layers
    return list(types), {"sliding_window": chunk if "chunked_attention" in types else window}


def add_layers(cache: Cache, count: int) -> None:
    """Appends empty layers to a cache made without a config, as its first forward would, until it has `count`."""
    layer_class = getattr(cache, "layer_class_to_replicate", None)
    if layer_class is None and not cache.layers:
        layer_class = DynamicLayer
    while layer_class is not None and len(cache.layers) < count:
        cache.layers.append(layer_class())


def is_handed_in(cache: Cache | None) -> bool:
    """Whether the caller of `generate` passed this cache, and so will look at it afterwards.

    True for all caches where transformers does not mark the caller's: filling one that nobody reads costs a copy.
    """
    return cache is not None and bool(getattr(cache, "_is_user_defined", not _MARKS_CACHES))


def has_default_cache(model: Model) -> bool:
    """Whether `generate` makes a cache of attention layers for a model of such layers.

    False for recurrent models and for the few that keep something of their own, such as XLNet's memories.
    """
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    return not getattr(model, "_is_stateful", False) and (supports is None or bool(supports()))


def token_types(model_kwargs: dict[str, Any]) -> dict[str, int] | None:
    """The type of every generated token, by argument; None where it differs from row to row."""
    found = {}
    for name in TOKEN_TYPES:
        given = model_kwargs.get(name)
        if isinstance(given, Tensor):
            last = [0] if name == "mm_token_type_ids" else given[..., -1].unique().tolist()
            if len(last) > 1:
                return None
            found[name] = int(last[0])
    return found


def prefill(model: Model, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> Any:
    """Runs a prompt as `generate` does, and returns the model's output.

    Without the private method the prompt runs in one piece, whatever `prefill_chunk_size` is.
    """
    if hasattr(model, "_prefill"):
        return model._prefill(input_ids, config, model_kwargs)
    cache: Cache | None = model_kwargs.get(CACHE)
    past = 0 if cache is None else cache.get_seq_length()
    embeds: Tensor | None = model_kwargs.get("inputs_embeds")
    mask: Tensor | None = model_kwargs.get("attention_mask")
    new = None
    if embeds is not None:
        new = embeds.shape[1] - past
    elif mask is None or mask.shape[1] == input_ids.shape[1]:  # else `input_ids` hold the new tokens only
        new = input_ids.shape[1] - past
    inputs = model.prepare_inputs_for_generation(
        input_ids, next_sequence_length=new, is_first_iteration=True, **model_kwargs
    )
    return model(**inputs, return_dict=True)


def next_inputs(
    model: Model, input_ids: Tensor, outputs: Any, model_kwargs: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Prepares the pass over one more token as plain decoding does.

    Args:
        model: A causal LM.
        input_ids: All tokens, the new one included, `[batch, length]`.
        outputs: Of the pass before.
        model_kwargs: As the pass before was prepared with.

    Returns:
        `model_kwargs` for the passes to come, and the arguments of this pass.
    """
    if hasattr(model, "_update_model_kwargs_for_generation"):
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
    else:
        model_kwargs = {**model_kwargs, CACHE: outputs[CACHE]}
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        if mask is not None:
            model_kwargs["attention_mask"] = torch.nn.functional.pad(mask, (0, 1), value=1)
        if positions is not None:
            model_kwargs["position_ids"] = positions[..., -1:] + 1
    return model_kwargs, model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)


def decoding_method(model: Model, mode: GenerationMode) -> Any:
    """The function that decodes in a mode, to be called with the model first."""
    names = getattr(generation_utils, "GENERATION_MODES_MAPPING", _METHODS)
    return getattr(type(model), names.get(mode, "_sample"), GenerationMixin._sample)


def runs_in_step(model: Model) -> bool:
    """Whether several processes must run the same number of passes, as each holds a part of the weights.

    By the model's own state: `generate` tells a custom method nothing of it, and does not see `fully_shard` itself.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    kinds = tuple(getattr(fsdp, name) for name in ("FSDPModule", "FullyShardedDataParallel") if hasattr(fsdp, name))
    return is_deepspeed_zero3_enabled() or any(isinstance(module, kinds) for module in model.modules())


def has_own_loop(model: Model) -> bool:
    """Whether a model's class has a sampling loop of its own in place of that of transformers."""
    return type(model)._sample is not GenerationMixin._sample


def runs_other_method(mode: GenerationMode) -> bool:
    """Whether a decoding method is none of the model's own: it was moved to a repository, and is loaded from there."""
    return "/" in getattr(generation_utils, "GENERATION_MODES_MAPPING", {}).get(mode, "")


def pad_token(config: GenerationConfig) -> int:
    """What finished rows are filled up with, as `generate` prepared it; 0 where there is none."""
    tokens = _token_ids(getattr(config, "_pad_token_tensor", config.pad_token_id))
    return tokens[0] if tokens else 0


def eos_tokens(config: GenerationConfig) -> list[int]:
    """The tokens that end a row, as `generate` prepared them."""
    return _token_ids(getattr(config, "_eos_token_tensor", config.eos_token_id))


def _token_ids(value: Any) -> list[int]:
    if value is None:
        return []
    if isinstance(value, Tensor):
        return [int(token) for token in value.flatten().tolist()]
    return [int(token) for token in value] if isinstance(value, (list, tuple)) else [int(value)]
