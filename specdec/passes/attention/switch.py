"""Hands a model's attention to a backend for the time of one pass, through transformers' `AttentionInterface`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from specdec.passes.attention.base import AttentionCall, TreeAttention, UnsupportedAttentionError
from specdec.passes.attention.plan import TreePlan
from specdec.passes.replica import configs_of, set_attention

IMPLEMENTATION = "specdec_tree_attention"
"""Under this name transformers finds `tree_attention`."""

NOT_OURS = ("s_aux", "position_bias")
"""Arguments of attention that only the model's own implementation takes: sinks and biases."""


@dataclass
class _Pass:
    """A pass under way.

    Args:
        plan: What each node may attend to.
        backend: Computes attention.
        layer_types: By the address of the stand-in that the layers of a type are given as their mask.
        num_calls: Layers that have asked so far.
    """

    plan: TreePlan
    backend: TreeAttention
    layer_types: dict[int, str] = field(default_factory=dict)
    num_calls: int = 0


_PASS: ContextVar[_Pass | None] = ContextVar("specdec_pass", default=None)


@contextmanager
def switched_attention(replica: Any, plan: TreePlan, backend: TreeAttention) -> Iterator[Tensor | dict[str, Tensor]]:
    """Inside, the backend computes a replica's attention; see `replica_of`.

    Yields:
        What to pass as `attention_mask`: stand-ins of the right shape, one per layer type, without content.

    Raises:
        UnsupportedAttentionError: The model does not ask `AttentionInterface`.
    """
    AttentionInterface.register(IMPLEMENTATION, tree_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    state = _Pass(plan, backend)
    masks = {kind: _stand_in(plan) for kind in plan.mask_format.layer_types}
    state.layer_types = {_address(mask): kind for kind, mask in masks.items()}
    configs = configs_of(replica)
    before = [config._attn_implementation for config in configs]
    token = _PASS.set(state)
    try:
        set_attention(configs, IMPLEMENTATION)
        yield masks if plan.mask_format.by_layer_type else next(iter(masks.values()))
    finally:
        for config, implementation in zip(configs, before, strict=True):
            set_attention([config], implementation)
        _PASS.reset(token)
    if state.num_calls == 0:
        raise UnsupportedAttentionError("the model does not look attention up in transformers' AttentionInterface")


def _stand_in(plan: TreePlan) -> Tensor:
    """One element, shown as a mask: models hand masks on as they are, and its address tells the type of the layer."""
    one = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=plan.tree.tokens.device)
    return one.expand(len(plan.tree.tokens), 1, plan.nodes, plan.slots)


def _address(mask: Tensor) -> int:
    return mask.untyped_storage().data_ptr()


def tree_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """An attention function as transformers' `AttentionInterface` wants it.

    Args:
        module: The model's attention module.
        query: `[batch, query heads, nodes, head_dim]`.
        key: `[batch, key heads, slots, head_dim]`.
        value: `[batch, key heads, slots, value_dim]`.
        attention_mask: The stand-in of the layer's type.
        options: What else the model passes: `scaling`, `softcap`, `dropout`, ...

    Returns:
        `[batch, nodes, query heads, value_dim]`, and None in place of the weights.
    """
    state = _PASS.get()
    assert state is not None, "replicas are run inside `switched_attention` only"
    kind = None if attention_mask is None else state.layer_types.get(_address(attention_mask))
    if kind is None:
        raise UnsupportedAttentionError("the model makes its masks itself")
    given = [name for name in NOT_OURS if options.get(name) is not None]
    given += ["dropout"] if options.get("dropout") else []
    if given:
        raise UnsupportedAttentionError(f"its attention takes {' and '.join(given)}")
    state.num_calls += 1
    scaling = options.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    call = AttentionCall(query, key, value, state.plan, kind, scaling, options.get("softcap"))
    return state.backend.attend(call), None
