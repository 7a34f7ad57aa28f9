"""A draft model made of the target's own first layers."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from specdec.target import CausalLM

HOOKED = ("forward", "_hf_hook", "_old_forward")
"""What accelerate leaves in a module that it has hooked; bound to that very module."""


def first_layers(model: CausalLM, layers: int) -> CausalLM:
    """A model of the first layers, with the embeddings, the last norm and the output embedding of the whole.

    All weights are shared, and the model is left as it is: only the modules on the way to the list of layers are
    copied, without their contents.

    Args:
        model: A causal LM.
        layers: How many to keep.

    Raises:
        ValueError: There are not more layers than these, or they cannot be told from the model's structure.
    """
    total = model.config.get_text_config(decoder=True).num_hidden_layers
    if not 1 <= layers < total:
        raise ValueError(
            f"layers={layers} must be at least 1 and below the target's {total}: the draft model is a part of it"
        )
    lists = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == total
    ]
    if len(lists) != 1:
        raise ValueError(
            f"draft_model='self' needs one list of {total} layers in the model, {type(model).__name__} has "
            f"{len(lists)} ({', '.join(lists) or 'none'}); pass a draft model of its own"
        )
    config = _config_of(model.config, layers)
    top = part = _shallow(model, config)
    *above, last = lists[0].split(".")
    for name in above:
        part._modules[name] = _shallow(part._modules[name], config)
        part = part._modules[name]
    part._modules[last] = nn.ModuleList(list(part._modules[last])[:layers])
    return top


def _shallow(module: Any, config: Any) -> Any:
    """A module that shares all parts with another one, and of which parts can be replaced."""
    twin = copy.copy(module)
    vars(twin)["_modules"] = dict(module._modules)
    for name in HOOKED:
        vars(twin).pop(name, None)
    if hasattr(module, "config"):
        is_whole = type(module.config) is type(config)
        twin.config = config if is_whole else config.get_text_config(decoder=True)
    return twin


def _config_of(config: Any, layers: int) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config
