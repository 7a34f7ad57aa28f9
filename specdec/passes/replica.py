"""A model's modules with configs of their own, over the same weights."""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

PRE_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


def replica_of(model: Any) -> Any:
    """A model of the same weights and hooks, in which one call may switch attention or experts unseen by others.

    transformers reads these settings from the config that each module holds. So modules and configs are copied
    shallowly, milliseconds of work; parameters, buffers and hooks are the model's. Forwards that another library has
    put on a module (accelerate's, for one) are bound to its copy.

    Args:
        model: A transformers model. It is not changed.
    """
    copies: dict[int, Any] = {}
    for module in model.modules():
        copies[id(module)] = object.__new__(type(module))
    for module in model.modules():
        values = {name: _own(value, copies) for name, value in vars(module).items()}
        for name in ("_parameters", "_buffers"):
            values[name] = dict(values[name])
        parts = module._modules.items()
        values["_modules"] = {name: None if part is None else copies[id(part)] for name, part in parts}
        values.pop("_compiled_call_impl", None)  # of `model.compile()`: it calls the module it was made for
        copies[id(module)].__dict__.update(values)
    return copies[id(model)]


def _own(value: Any, copies: dict[int, Any]) -> Any:
    """What takes an attribute's place in a copy."""
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, PreTrainedConfig):
        if id(value) not in copies:
            own = copies[id(value)] = copy.copy(value)
            own.__dict__.update({name: _own(part, copies) for name, part in vars(value).items()})
        return copies[id(value)]
    if isinstance(value, types.MethodType) and id(value.__self__) in copies:
        return types.MethodType(value.__func__, copies[id(value.__self__)])
    if isinstance(value, functools.partial):
        bound = functools.partial(value.func, *(_own(part, copies) for part in value.args), **value.keywords)
        bound.__dict__.update(value.__dict__)
        return bound
    return value


def configs_of(replica: Any) -> list[Any]:
    """The configs that a model's modules read, each once."""
    configs = [getattr(module, "config", None) for module in replica.modules()]
    return list({id(config): config for config in configs if hasattr(config, "_attn_implementation")}.values())


def set_attention(configs: list[Any], implementation: str) -> None:
    """Names the attention function that the modules of these configs look up."""
    for config in configs:
        config._attn_implementation = {"": implementation}  # a dict leaves the configs inside it alone


def keep_hooks_apart(module: nn.Module) -> None:
    """Gives a module of a replica pre-hooks of its own; those it has stay."""
    for name in PRE_HOOKS:
        setattr(module, name, getattr(module, name).copy())
