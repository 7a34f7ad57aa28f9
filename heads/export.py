"""Checkpoints of Medusa heads, written: Medusa's own layouts and vLLM's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from specdec.heads import calibration
from specdec.heads.checkpoints import CONFIG_FILE, MEDUSA_FILE, TOKEN_MAP, VLLM_FILE, WEIGHT_FILES

if TYPE_CHECKING:
    from specdec.heads.medusa import MedusaHeads

LAYOUTS = ("1", "2", "vllm")


def write_checkpoint(heads: MedusaHeads, folder: Path, layout: str | None = None) -> None:
    """Saves heads; see `MedusaHeads.save_pretrained`."""
    layout = heads.config.version if layout is None else layout
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not one of {', '.join(map(repr, LAYOUTS))}")
    file_name = VLLM_FILE if layout == "vllm" else MEDUSA_FILE
    _check_folder(folder, file_name)
    tensors = _vllm_tensors(heads) if layout == "vllm" else _medusa_tensors(heads, layout)
    config = _vllm_config(heads) if layout == "vllm" else _medusa_config(heads, layout)

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / file_name, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if heads.calibration is not None:
        heads.calibration.save(folder)
    else:
        (folder / calibration.FILE_NAME).unlink(missing_ok=True)


def _check_folder(folder: Path, file_name: str) -> None:
    """Heads must not replace a model's files, nor lie beside other heads that would be read instead of them."""
    if others := [name for name in WEIGHT_FILES if name != file_name and (folder / name).exists()]:
        raise ValueError(f"{folder} holds {', '.join(others)} already, which is not of this layout; use another folder")
    path = folder / CONFIG_FILE
    if not path.exists():
        return
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict) or not ("medusa_num_heads" in config or config.get("model_type") == "medusa"):
        raise ValueError(f"{path} belongs to something else than heads; use another folder")


def _medusa_config(heads: MedusaHeads, layout: str) -> dict[str, Any]:
    config = heads.config
    return {
        "base_model_name_or_path": config.base_model_name_or_path,
        "medusa_num_heads": config.num_heads,
        "medusa_num_layers": config.num_layers,
        "version": layout,
        "hidden_size": config.hidden_size,
    } | ({"vocab_size": config.vocab_size} if config.vocab_size is not None else {})


def _vllm_config(heads: MedusaHeads) -> dict[str, Any]:
    config = heads.config
    return {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "base_model_name_or_path": config.base_model_name_or_path,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "truncated_vocab_size": config.draft_vocab_size or config.vocab_size,
        "num_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "medusa_fc_bias": True,
        "original_lm_head": config.version == "2",
        "dtype": str(heads.dtype).removeprefix("torch."),
    }


def _medusa_tensors(heads: MedusaHeads, layout: str) -> dict[str, Tensor]:
    if layout == "2":
        _check_projections_are_shared(heads)
    tensors = {}
    for layer in range(heads.config.num_layers):
        for head in range(heads.config.num_heads):
            tensors[f"{head}.{layer}.linear.weight"] = _saved(heads.weights[layer][head])
            tensors[f"{head}.{layer}.linear.bias"] = _saved(heads.biases[layer][head])
    if layout == "1":
        for head in range(heads.config.num_heads):
            tensors[f"{head}.{heads.config.num_layers}.weight"] = _saved(_projection(heads, head))
    return tensors | _token_map(heads)


def _vllm_tensors(heads: MedusaHeads) -> dict[str, Tensor]:
    tensors = {}
    for head in range(heads.config.num_heads):
        for layer in range(heads.config.num_layers):
            tensors[f"blocks.{head}.layers.{layer}.weight"] = _saved(heads.weights[layer][head])
            tensors[f"blocks.{head}.layers.{layer}.bias"] = _saved(heads.biases[layer][head])
    # vLLM does not take the running target's output embedding: with `original_lm_head` it wants one copy in the file.
    for head in range(heads.config.num_heads if heads.config.version == "1" else 1):
        tensors[f"lm_heads.{head}.weight"] = _saved(_projection(heads, head))
    return tensors | _token_map(heads)


def _token_map(heads: MedusaHeads) -> dict[str, Tensor]:
    return {} if heads.token_map is None else {TOKEN_MAP: _saved(heads.token_map)}


def _projection(heads: MedusaHeads, head: int) -> Tensor:
    """A head's own projection, or the target's for heads that share it; of the tokens that they can name."""
    return _shared_projection(heads) if heads.projections is None else heads.projections[head]


def _shared_projection(heads: MedusaHeads) -> Tensor:
    weight = heads.output_embedding.weight()
    return weight if heads.token_map is None else weight[heads.token_map.to(weight.device)]


def _saved(tensor: Tensor) -> Tensor:
    # A copy even where none seems needed: safetensors refuses tensors that share memory.
    return tensor.detach().to("cpu", copy=True).contiguous()


def _check_projections_are_shared(heads: MedusaHeads) -> None:
    if heads.projections is None:
        return
    shared = _shared_projection(heads).to(heads.device, torch.float32)
    different = {
        head: difference
        for head, projection in enumerate(heads.projections.detach(), 1)
        if (difference := float((projection.float() - shared).abs().max())) > 0
    }
    if different:
        listed = ", ".join(f"{head} (by up to {difference:.3g})" for head, difference in different.items())
        raise ValueError(
            f"layout='2' has no projections, and those of heads {listed} differ from the model's output embedding, "
            "which version 2 heads share; save them as layout='1' or 'vllm'"
        )
