"""What a step of a model must at least read and compute."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specdec.compat import CACHE
from specdec.target import input_device

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token")
TOKENS = 4
"""Tokens by which the size of the kv cache is found out."""


@dataclass(frozen=True)
class StepCosts:
    """Bytes and operations of one step, from the model's own weights and cache.

    Args:
        weight_bytes: Weights that every step reads: all but experts, and but an input embedding that is not shared.
        expert_bytes: Weights of all experts.
        num_experts: Experts of a layer; 0 where there are none.
        num_chosen: Experts that a token goes to.
        kv_bytes: Keys and values per token of context and row.
        node_flops: Operations of the matrix products per node, chosen experts alone.
        attention_flops: Operations of attention per node and token of context.
    """

    weight_bytes: int
    expert_bytes: int
    num_experts: int
    num_chosen: int
    kv_bytes: int
    node_flops: int
    attention_flops: int

    def active_share(self, nodes: int) -> float:
        """Share of the experts that so many nodes are expected to need, if each chooses at random."""
        if not self.num_experts:
            return 0.0
        return 1.0 - (1.0 - self.num_chosen / self.num_experts) ** nodes

    def bytes(self, nodes: int, context: int, batch: int = 1) -> float:
        """Bytes that a step reads, over all rows."""
        experts = self.expert_bytes * self.active_share(nodes * batch)
        return self.weight_bytes + experts + self.kv_bytes * (context + nodes) * batch

    def flops(self, nodes: int, context: int, batch: int = 1) -> float:
        """Operations of a step, over all rows."""
        return batch * nodes * (self.node_flops + self.attention_flops * (context + nodes))

    def floor(self, nodes: int, context: int, bandwidth: float, flops: float, batch: int = 1) -> float:
        """Seconds that no step can be below.

        Args:
            nodes: Of the tree.
            context: Tokens in the kv cache.
            bandwidth: Bytes per second.
            flops: Operations per second.
            batch: Rows.
        """
        return max(self.bytes(nodes, context, batch) / bandwidth, self.flops(nodes, context, batch) / flops)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


def step_costs(model: Any) -> StepCosts:
    """The costs of a model's steps; runs it on a few tokens to see what its cache holds."""
    config = model.config.get_text_config(decoder=True)
    num_experts = next((n for name in EXPERTS if (n := getattr(config, name, None))), 0)
    num_chosen = next((n for name in CHOSEN if (n := getattr(config, name, None))), num_experts)
    share = num_chosen / num_experts if num_experts else 0.0
    weight_bytes = expert_bytes = 0
    flops = 0.0
    tied = _input_embedding(model)
    for name, weight in model.named_parameters():
        size = weight.numel() * weight.element_size()
        if ".experts." in name and num_experts:
            expert_bytes += size
            flops += 2 * weight.numel() * share
        elif weight is not tied:
            weight_bytes += size
            flops += 2 * weight.numel() if weight.dim() > 1 else 0
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_bytes = _kv_bytes(model)
    return StepCosts(
        weight_bytes, expert_bytes, num_experts, num_chosen, kv_bytes, int(flops), 4 * heads * head_dim * layers
    )


def _input_embedding(model: Any) -> Tensor | None:
    """The weight of the input embedding, of which a step reads a few rows, unless it is the output embedding too."""
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    output = getattr(model.get_output_embeddings(), "weight", None)
    return None if embedding is output else embedding


@torch.no_grad()
def _kv_bytes(model: nn.Module) -> int:
    outputs = model(torch.ones((1, TOKENS), dtype=torch.int64, device=input_device(model)), use_cache=True)
    total = 0
    for layer in outputs[CACHE].layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            total += 0 if tensor is None else tensor.numel() * tensor.element_size()
    return total // TOKENS
