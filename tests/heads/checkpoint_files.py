"""Heads and checkpoint files as others write them, for the tests of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from specdec.heads import MedusaHeads
from tests.heads.test_medusa import trained
from tests.tiny_models import VOCAB, tiny_model

HIDDEN = 6


def new_heads(version: str = "2", num_heads: int = 3, num_layers: int = 2, **settings: Any) -> MedusaHeads:
    """Heads bound to the tiny model; those of version 1 with projections of their own."""
    heads = MedusaHeads.for_model(tiny_model("llama"), num_heads, num_layers, version, **settings)
    return trained(heads)


def with_shared_projections() -> MedusaHeads:
    """Version 1 heads whose projections are still copies of the model's output embedding."""
    heads = new_heads("1")
    assert heads.projections is not None
    heads.projections.data.copy_(tiny_model("llama").lm_head.weight.expand_as(heads.projections))
    return heads


def assert_same(heads: MedusaHeads, others: MedusaHeads) -> None:
    state, other = heads.state_dict(), others.state_dict()
    assert list(state) == list(other)
    for name, tensor in state.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name
    assert vars(heads.config) == vars(others.config)


def save_raw(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None, file_name: str) -> Path:
    """Writes a directory as others do."""
    folder.mkdir(exist_ok=True)
    if file_name.endswith(".pt"):
        torch.save(tensors, folder / file_name)
    else:
        save_file(tensors, folder / file_name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wild(num_heads: int = 5, num_layers: int = 1, projections: bool = True) -> dict[str, Tensor]:
    """Tensors under the names of Medusa's published heads."""
    tensors = {}
    for head in range(num_heads):
        for layer in range(num_layers):
            tensors[f"{head}.{layer}.linear.weight"] = numbers(HIDDEN, HIDDEN, seed=100 * head + layer)
            tensors[f"{head}.{layer}.linear.bias"] = numbers(HIDDEN, seed=100 * head + 10 + layer)
        if projections:
            tensors[f"{head}.{num_layers}.weight"] = numbers(VOCAB, HIDDEN, seed=100 * head + 20)
    return tensors


def wild_vllm(num_heads: int = 3, num_layers: int = 2, bias: bool = False) -> dict[str, Tensor]:
    """Tensors under the names that vLLM reads."""
    tensors = {}
    for head in range(num_heads):
        for layer in range(num_layers):
            tensors[f"blocks.{head}.layers.{layer}.weight"] = numbers(HIDDEN, HIDDEN, seed=100 * head + layer)
            if bias:
                tensors[f"blocks.{head}.layers.{layer}.bias"] = numbers(HIDDEN, seed=100 * head + 10 + layer)
        tensors[f"lm_heads.{head}.weight"] = numbers(VOCAB, HIDDEN, seed=100 * head + 20)
    return tensors


def wild_logits(tensors: dict[str, Tensor], hidden: Tensor, num_heads: int, num_layers: int) -> Tensor:
    """What published heads compute, spelled out in their names."""
    logits = []
    for head in range(num_heads):
        x = hidden
        for layer in range(num_layers):
            linear = tensors[f"{head}.{layer}.linear.weight"], tensors[f"{head}.{layer}.linear.bias"]
            x = x + nn.functional.silu(nn.functional.linear(x, *linear))
        logits.append(x @ tensors[f"{head}.{num_layers}.weight"].T)
    return torch.stack(logits)


WILD_CONFIG = {
    "base_model_name_or_path": "lmsys/vicuna-7b-v1.3",
    "medusa_num_heads": 2,
    "medusa_num_layers": 1,
    "transformers_version": "4.31.0",
}
