"""What a captured step takes for granted of a model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Hook = TypeVar("Hook", bound=Callable[..., Any])
OUTPUTS = "transformers.utils.output_capturing"
"""Its hooks stay on a model for good, and do nothing unless attentions or hidden states are wanted."""
HOOKS = frozenset(
    {
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
    }
)
"""Left out of fingerprints: `hooked` finds those that matter."""
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def fingerprint(model: Any) -> int:
    """A number that is another one when the model's next forward may do other work than the last one.

    A graph is a list of launches with addresses: it knows nothing of weights that were moved or replaced, adapters that
    were switched, hooks that were added, attention that was changed. So whatever modules and configs hold counts: plain
    values by value, tensors by address, the rest by identity.
    """
    parts: list[Any] = [module_state(model)]
    for config in (model.config, model.config.get_text_config(decoder=True)):
        parts += _values(config.__dict__)
    return hash(tuple(parts))


def module_state(module: nn.Module) -> int:
    """The same of any module, its configs left out."""
    parts: list[Any] = list(_switches())
    for part in module.modules():
        parts += [id(part), id(type(part).forward)]
        parts += _values(part.__dict__)
    return hash(tuple(parts))


def quiet(hook: Hook) -> Hook:
    """Marks a forward hook that need not be called for a step that is replayed from a graph."""
    hook.needs_every_pass = False  # type: ignore[attr-defined]
    return hook


def out_of_sight(model: Any) -> str | None:
    """What runs in the model's passes besides its own code, and may treat rows of a batch differently; or None."""
    if kind := hooked(model):
        return f"a hook on {kind}"
    for module in model.modules():  # accelerate's move tensors between devices
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            return f"the patched forward of {type(module).__name__}"
    return None


def changes(model: Any) -> Hashable:
    """What may change in a model from call to call and decide how it can be run: hooks, adapters, mode, autocast."""
    odd = []
    for index, module in enumerate(model.modules()):
        hooks = _hooks(module)
        adapters = vars(module).get("_active_adapter"), vars(module).get("_disable_adapters")
        if hooks or module.training or "forward" in vars(module) or any(adapters):
            names = [str(getattr(getattr(hook, "func", hook), "__qualname__", type(hook))) for hook in hooks]
            odd.append((index, module.training, "forward" in vars(module), str(adapters), *names))
    kind = model.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return tuple(odd), autocast


def hooked(model: Any) -> str | None:
    """The kind of a module whose forward hooks must be called in each pass, which a graph does not do; or None."""
    return next((type(module).__name__ for module in model.modules() if _hooks(module)), None)


def _hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Forward hooks that do something in every pass."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return [h for h in hooks if getattr(h, "needs_every_pass", True) and getattr(h, "__module__", None) != OUTPUTS]


def _values(values: Mapping[str, Any]) -> Iterator[Any]:
    for name, value in values.items():
        if name in HOOKS:
            continue
        if isinstance(value, PLAIN):
            yield name, value
        elif isinstance(value, Tensor):
            yield name, _address(value)
        elif isinstance(value, Mapping):
            if value:
                yield name, tuple((str(key), _item(item)) for key, item in value.items())
        elif isinstance(value, (list, tuple, set, frozenset)):
            if value:
                yield name, _items(value)
        else:
            yield name, id(value)


def _items(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(map(_item, values))


def _item(value: Any) -> Any:
    if isinstance(value, PLAIN):
        return value
    return _address(value) if isinstance(value, Tensor) else id(value)


def _address(tensor: Tensor) -> Any:
    try:
        return tensor.data_ptr(), tensor.dtype
    except RuntimeError:  # no storage of its own: a wrapper of quantised weights, say
        return id(tensor)


def _switches() -> tuple[Any, ...]:
    """Settings of torch that decide which kernels are launched."""
    cuda = torch.backends.cuda
    return (
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )
