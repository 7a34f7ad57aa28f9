"""A draft model's pass as one compiled function: a small model spends most of a pass in Python and in small kernels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from specdec.capability import Capability
from specdec.kv_cache import ATTENTION_LAYER_TYPES, TreeCache
from specdec.target import CausalLM, cache_layer_types


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, written at given slots; attention sees all slots, and the mask hides some.

    Args:
        keys: `[batch, heads, slots, head_dim]`.
        values: `[batch, heads, slots, head_dim]`.
        rows: `[batch, 1]`.
        slots: Where new tokens go, `[batch, nodes]`.
    """

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, slots: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.rows, self.slots = keys, values, rows, slots
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("keys and values are given")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        self.keys[self.rows, :, self.slots] = key_states.transpose(1, 2)
        self.values[self.rows, :, self.slots] = value_states.transpose(1, 2)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        assert self.keys is not None
        return self.keys.shape[-2], 0

    def get_max_length(self) -> int:
        assert self.keys is not None
        return int(self.keys.shape[-2])


class CompiledPass:
    """Runs a draft model over new nodes with `torch.compile`, on the slots of a `TreeCache`.

    One node and several nodes are two compiled functions; the rest of the shape is left open, so that a longer cache
    or another width needs none of its own. If a model cannot be compiled, it runs as it is, after one warning.
    """

    def __init__(self) -> None:
        # Code of its own: torch.compile counts its versions per code object, and each model has some.
        function = FunctionType(run.__code__.replace(), run.__globals__, "run", run.__defaults__, run.__closure__)
        self._function: Any = torch.compile(function, dynamic=True)
        self.failure: str | None = None

    def __call__(self, model: CausalLM, cache: TreeCache, tokens: Tensor, positions: Tensor, mask: Any) -> Tensor:
        """Logits at each node, `[batch, nodes, vocab]`.

        Args:
            model: The draft model.
            cache: After its prefill, of layers that all hold keys and values in allocations of their own.
            tokens: `[batch, nodes]`.
            positions: `[batch, nodes]`.
            mask: As the model takes it, over the slots in use; None to see all of these.
        """
        nodes = tokens.shape[1]
        used = cache.width + cache.staged + nodes
        cache.reserve(used)
        if mask is None:
            mask = torch.ones((len(tokens), 1, nodes, used), dtype=torch.bool, device=tokens.device)
        if isinstance(mask, dict):
            mask = {kind: _widened(part, cache.capacity) for kind, part in mask.items()}
        else:
            mask = _widened(mask, cache.capacity)
        layers = cache.tree_layers()
        keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
        inputs: tuple[Any, ...] = (model, tokens, positions, mask, *cache.new_slots(nodes, tokens.device), keys, values)
        if self.failure is None:
            try:
                logits: Tensor = self._function(*inputs)
                return logits
            except Exception as error:
                self.failure = f"{type(error).__name__}: {str(error)[:300]}"
                warnings.warn(
                    f"the draft model {type(model).__name__} cannot be compiled, and runs as it is; leave out "
                    f"compiled=True, or see that torch.compile works here. {self.failure}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return run(*inputs)


def run(
    model: CausalLM,
    tokens: Tensor,
    positions: Tensor,
    mask: Any,
    rows: Tensor,
    slots: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
) -> Tensor:
    """What is compiled: a forward whose new keys and values go to given slots, `[batch, nodes]`."""
    layers: list[Any] = [_SlotLayer(*parts, rows, slots) for parts in zip(keys, values, strict=True)]
    logits: Tensor = model(
        input_ids=tokens,
        position_ids=positions,
        attention_mask=mask,
        past_key_values=Cache(layers=layers),
        use_cache=True,
        return_dict=True,
    ).logits
    return logits


_PASSES: WeakKeyDictionary[nn.Module, CompiledPass] = WeakKeyDictionary()


def compiled_pass(model: CausalLM) -> CompiledPass:
    """The compiled pass of a model, the same for all drafters that ask it; it is compiled when it first runs."""
    if model not in _PASSES:
        _PASSES[model] = CompiledPass()
    return _PASSES[model]


def check_compilable(model: CausalLM, capability: Capability) -> None:
    """Raises a ValueError for a draft model whose passes have no fixed places for keys and values."""
    reason = f"it can only be run on chains ({capability.reason})" if capability.mode != "tree" else None
    if others := set(cache_layer_types(model)) - ATTENTION_LAYER_TYPES:
        reason = reason or f"it has {', '.join(sorted(others))} layers"
    if reason is not None:
        raise ValueError(f"compiled=True cannot be used with {type(model).__name__}: {reason}; leave it out")


def _widened(mask: Tensor, slots: int) -> Tensor:
    """The mask with hidden slots up to a number of them."""
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return nn.functional.pad(mask, (0, slots - mask.shape[-1]), value=hidden)
