"""Facts about a causal LM that its config and modules tell."""

from __future__ import annotations

import inspect
from typing import Any, TypeAlias

import torch
from transformers.generation import GenerationMixin

from specdec.compat import cache_layers

CausalLM: TypeAlias = Any
"""A `PreTrainedModel` that is a `GenerationMixin`; transformers has no type for the two together."""


INNER_MODELS = ("pretrained_model", "model", "module")
"""Where wrappers whose `generate` delegates keep the transformers model: value heads, control vectors."""


def cache_layer_types(model: CausalLM) -> list[str]:
    """What each layer keeps between steps, in transformers' words (`"full_attention"`, `"linear_attention"`, ...)."""
    return [kind for kind, _ in cache_layers(model.config.get_text_config(decoder=True))]


def accepts(model: CausalLM, name: str) -> bool:
    """Whether the model's forward takes an argument of this name."""
    return name in inspect.signature(model.forward).parameters


def is_on_one_device(model: CausalLM) -> bool:
    """Whether accelerate has not spread the model over several devices."""
    return len(set(map(str, getattr(model, "hf_device_map", {}).values()))) <= 1


def input_device(model: CausalLM) -> torch.device:
    """Where the model takes its inputs: accelerate runs a model elsewhere than where it keeps offloaded weights."""
    device: torch.device = model.device
    if device.type != "meta":
        return device
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    for part in (*getattr(hook, "hooks", ()), hook):
        if getattr(part, "execution_device", None) is not None:
            return torch.device(part.execution_device)
    return device


def embedding_rows(model: CausalLM) -> int:
    """Token ids that the model can take are below."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return int(weight.shape[0] if weight is not None else model.config.get_text_config().vocab_size)


def unwrapped(model: Any) -> CausalLM:
    """The transformers model inside a PEFT model or another wrapper that generates by it; any other model itself."""
    if hasattr(model, "get_base_model"):
        return unwrapped(model.get_base_model())
    if isinstance(model, GenerationMixin):
        return model
    inner = (getattr(model, name, None) for name in INNER_MODELS)
    return next((unwrapped(part) for part in inner if hasattr(part, "generate")), model)
