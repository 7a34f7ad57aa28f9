"""What is compiled: a model's own forward whose new keys and values go to given slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import sdpa_mask

from specdec.compat import CACHE, DummyLayer
from specdec.passes.hidden_states import FINAL, joined, state_reader
from specdec.passes.replica import configs_of, keep_hooks_apart, replica_of, set_attention

IMPLEMENTATION = "specdec_grouped_sdpa"
"""Under this name transformers finds `grouped_sdpa`."""


@dataclass(frozen=True)
class Layout:
    """How the inputs of a pass are laid out; passes of one layout share a compiled function.

    Args:
        places: Per layer the number of its pool and its place there; None for a layer without keys and values.
        mask_kinds: Layer types that have a mask each; None for one mask for all.
        has_positions: Whether the model is given positions.
        extra: What else its forward is given, by name.
        states: Which hidden states are returned; see `HiddenStates`.
    """

    places: tuple[tuple[int, int] | None, ...]
    mask_kinds: tuple[str, ...] | None
    has_positions: bool
    extra: tuple[tuple[str, Any], ...]
    states: tuple[int, ...] = (FINAL,)

    @property
    def num_masks(self) -> int:
        """Masks among the inputs."""
        return 1 if self.mask_kinds is None else len(self.mask_kinds)


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer of a pool, written at given slots; attention sees the first `width` ones.

    Args:
        keys: Of the pool, `[layers, batch, heads, slots, head_dim]`.
        values: Likewise.
        place: Of the layer in the pool.
        rows: `[batch, 1]`.
        slots: Where new tokens go, `[batch, nodes]`.
        width: As the mask is wide.
    """

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, place: int, rows: Tensor, slots: Tensor, width: int) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.place, self.rows, self.slots, self.width = place, rows, slots, width
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("keys and values are given")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        # On the pool itself: what is written to a view of one layer would be copied back.
        layer = torch.full_like(self.rows, self.place)
        self.keys[layer, self.rows, :, self.slots] = key_states.transpose(1, 2)
        self.values[layer, self.rows, :, self.slots] = value_states.transpose(1, 2)
        return self.keys[self.place, :, :, : self.width], self.values[self.place, :, :, : self.width]

    def get_seq_length(self) -> int:
        return self.width - self.slots.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.width, 0

    def get_max_length(self) -> int:
        return self.width


class SlotForward(nn.Module):
    """A function of tensors alone.

    Args:
        model: A causal LM.
        layout: Of the inputs.
    """

    def __init__(self, model: Any, layout: Layout) -> None:
        super().__init__()
        self.model = model
        self.layout = layout

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One pass over new nodes.

        Args:
            inputs: Tokens, `[batch, nodes]`; rows, `[batch, 1]`; slots, `[batch, nodes]`; positions,
                `[..., batch, nodes]`, if there are any; the masks, `[batch, 1, nodes, width]`; keys and values of each
                pool, `[layers, batch, heads, slots, head_dim]`, which are written to.

        Returns:
            Logits, `[batch, nodes, vocab]`, and the states of the layout, `[batch, nodes, layers * hidden]`; none where
            the model has no output embedding that it calls.
        """
        layout = self.layout
        (tokens, rows, slots), rest = inputs[:3], inputs[3:]
        given: dict[str, Any] = dict(layout.extra)
        if layout.has_positions:
            given["position_ids"], rest = rest[0], rest[1:]
        masks, pools = rest[: layout.num_masks], rest[layout.num_masks :]
        kinds = layout.mask_kinds
        given["attention_mask"] = masks[0] if kinds is None else dict(zip(kinds, masks, strict=True))
        width = masks[0].shape[-1]
        layers: list[Any] = []
        for at in layout.places:
            if at is None:
                layers.append(DummyLayer())
            else:
                keys, values = pools[2 * at[0] : 2 * at[0] + 2]
                layers.append(_SlotLayer(keys, values, at[1], rows, slots, width))
        with _states_taken(self.model, layout.states) as states:
            given[CACHE] = Cache(layers=layers)
            logits = self.model(input_ids=tokens, use_cache=True, return_dict=True, **given).logits
        return (
            logits,
            *([joined([states[place] for place in sorted(states)])] if len(states) == len(layout.states) else []),
        )


@contextmanager
def _states_taken(model: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Gives a dictionary that is filled, inside, with the first states of each layer, by its place among them."""
    found: dict[int, Tensor] = {}

    def take(place: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.setdefault(place, next(iter((*args, *kwargs.values()))))

    with ExitStack() as hooks:
        for place, layer in enumerate(layers):
            module = state_reader(model, layer)
            if module is not None:
                hooks.callback(module.register_forward_pre_hook(partial(take, place), with_kwargs=True).remove)
        yield found


def exportable(model: Any) -> Any:
    """A replica to export: on a CPU with SDPA it does not copy keys for each query head that shares them."""
    replica = replica_of(model)
    for module in replica.modules():
        keep_hooks_apart(module)
    if model.device.type == "cpu":
        register_grouped_attention()
        set_attention([c for c in configs_of(replica) if c._attn_implementation == "sdpa"], IMPLEMENTATION)
    return replica


def register_grouped_attention() -> None:
    """Lets transformers find `grouped_sdpa`, in each process that exports."""
    AttentionInterface.register(IMPLEMENTATION, grouped_sdpa)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def grouped_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """SDPA as transformers has it, but for keys that query heads share.

    Args:
        module: The model's attention module.
        query: `[batch, query heads, nodes, head_dim]`.
        key: `[batch, key heads, slots, head_dim]`.
        value: `[batch, key heads, slots, value_dim]`.
        attention_mask: `[batch, 1, nodes, slots]`.
        dropout: As the model passes it.
        scaling: Factor of the scores.
        options: What else the model passes.

    Returns:
        `[batch, nodes, query heads, value_dim]`, and None in place of the weights.
    """
    known: Sequence[str] = ("is_causal", "sliding_window", "position_ids", "use_cache", "cache_position")
    others = [name for name, option in options.items() if name not in known and option is not None]
    if query.shape[1] == key.shape[1] or attention_mask is None or others:
        plain = AttentionInterface()["sdpa"]
        found: tuple[Tensor, Tensor | None] = plain(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return found
    out = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None
