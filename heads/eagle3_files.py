"""Checkpoints of EAGLE-3 heads: EAGLE's own layout (SafeAILab, SpecForge, NVIDIA) and speculators'."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig

from specdec.heads.eagle3 import NUM_STATES, Eagle3Config, Eagle3Head, default_target_layers
from specdec.heads.files import fetch

CONFIG_FILE, WEIGHT_FILES = "config.json", ("model.safetensors", "pytorch_model.bin")
LAYER_PREFIXES = ("midlayer.", "layers.0.")
IGNORED = frozenset({"t2d", "verifier_lm_head.weight", "verifier_norm.weight", "rotary_emb.inv_freq"})
"""Tensors that follow from others, or that are copies of the target's."""


def read_head(source: str | Path, revision: str | None = None, token: str | bool | None = None) -> Eagle3Head:
    """See `Eagle3Head.from_pretrained`."""
    found = {name: fetch(source, name, revision, token) for name in (CONFIG_FILE, *WEIGHT_FILES)}
    weights = next((found[name] for name in WEIGHT_FILES if found[name]), None)
    described = found[CONFIG_FILE]
    if weights is None or described is None:
        raise FileNotFoundError(
            f"no EAGLE-3 head in {str(source)!r}: {CONFIG_FILE} and one of {', '.join(WEIGHT_FILES)} are needed, there "
            "or in the hub's local cache; give the folder or the hub name that holds them"
        )
    tensors = _read_tensors(weights)
    stored = {_own_name(name): tensor for name, tensor in tensors.items() if name.split("model.")[-1] not in IGNORED}
    offsets = stored.pop("d2t", None)
    try:
        config = _read_config(json.loads(described.read_text(encoding="utf-8")), stored)
        head = _filled(config, stored, offsets)
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from error
    return head


def is_eagle3(config: dict[str, Any]) -> bool:
    """Whether a checkpoint's `config.json` says that it is an EAGLE-3 head."""
    names = " ".join(config.get("architectures") or [])
    return "Eagle3" in names or config.get("speculators_model_type") == "eagle3"


def _read_config(stored: dict[str, Any], tensors: dict[str, Tensor]) -> Eagle3Config:
    if not is_eagle3(stored):
        kind = stored.get("speculators_model_type") or ", ".join(stored.get("architectures") or ["nothing"])
        raise ValueError(
            f"config.json says {kind}, and this reads EAGLE-3 heads; EAGLE-1, EAGLE-2 and P-EAGLE are not supported"
        )
    shape = dict(stored.get("transformer_layer_config") or stored)
    if int(shape.get("num_hidden_layers", 1)) != 1:
        raise ValueError(f"the head has {shape['num_hidden_layers']} layers; EAGLE-3 heads with one are supported")
    if "fc.weight" not in tensors:
        raise ValueError(f"there is no tensor fc.weight; its tensors are {_listed(tensors)}")
    target_hidden = int(stored.get("target_hidden_size") or shape.get("target_hidden_size") or shape["hidden_size"])
    layers = stored.get("eagle_aux_hidden_state_layer_ids")
    layers = layers or (stored.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    count = tensors["fc.weight"].shape[1] // target_hidden
    if layers is None:
        number = stored.get("target_num_hidden_layers")
        layers = default_target_layers(int(number)) if number else None
    if (NUM_STATES if layers is None else len(layers)) != count:
        raise ValueError(f"fc.weight takes {count} states of {target_hidden}, config.json names the layers {layers}")
    kept = {
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
        "rms_norm_eps", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "hidden_act",
        "attention_bias", "mlp_bias",
    }  # fmt: skip
    layer = LlamaConfig(num_hidden_layers=1, **{k: v for k, v in shape.items() if k in kept and v is not None})
    verifier = (stored.get("speculators_config") or {}).get("verifier") or {}
    return Eagle3Config(
        layer=layer,
        draft_vocab_size=int(stored.get("draft_vocab_size") or layer.vocab_size),
        target_hidden_size=target_hidden,
        target_layers=None if layers is None else tuple(int(number) for number in layers),
        norm_before_residual=bool(stored.get("norm_before_residual", False)),
        fc_norm=bool(stored.get("fc_norm", False)),
        norm_before_fc=bool(stored.get("norm_before_fc", False)),
        norm_output=bool(stored.get("norm_output", False)),
        qk_norm="q_norm.weight" in tensors,
        target=verifier.get("name_or_path"),
    )


def _filled(config: Eagle3Config, stored: dict[str, Tensor], offsets: Tensor | None) -> Eagle3Head:
    with torch.device("meta"):
        head = Eagle3Head(config)
    wanted = {name: tensor for name, tensor in head.state_dict().items() if name != "draft_tokens"}
    embedding = stored.pop("embed_tokens.weight", None)
    missing, unknown = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if missing or unknown:
        raise ValueError(f"missing tensors: {_listed(missing)}; tensors without a place: {_listed(unknown)}")
    for name, tensor in wanted.items():
        if stored[name].shape != tensor.shape:
            raise ValueError(f"{name} is {list(stored[name].shape)}, config.json asks for {list(tensor.shape)}")
    if offsets is not None and offsets.shape != (config.draft_vocab_size,):
        raise ValueError(f"d2t is {list(offsets.shape)}, config.json asks for [{config.draft_vocab_size}]")
    if offsets is None and config.draft_vocab_size != config.layer.vocab_size:
        raise ValueError(f"draft_vocab_size={config.draft_vocab_size}, and no tensor d2t says which tokens these are")
    tokens = torch.arange(config.draft_vocab_size)
    tokens = tokens if offsets is None else tokens + offsets.long()
    if int(tokens.min()) < 0 or int(tokens.max()) >= config.layer.vocab_size:
        raise ValueError(f"d2t names tokens {int(tokens.min())} to {int(tokens.max())} of {config.layer.vocab_size}")
    head.load_state_dict({**stored, "draft_tokens": tokens}, assign=True)
    if embedding is not None:
        if embedding.shape[1] != config.layer.hidden_size:
            raise ValueError(f"embed_tokens.weight is {list(embedding.shape)}, hidden_size {config.layer.hidden_size}")
        head.embed_tokens = nn.Embedding.from_pretrained(embedding)
    head.rotary = type(head.rotary)(config.layer)  # its frequencies are in no checkpoint
    return head.requires_grad_(True)


def write_head(head: Eagle3Head, folder: Path, layout: str) -> None:
    """See `Eagle3Head.save_pretrained`."""
    if layout not in ("speculators", "eagle"):
        raise ValueError(f"layout={layout!r} is not known; use 'speculators' or 'eagle'")
    config, prefix = head.config, LAYER_PREFIXES[layout == "speculators"]
    tensors = {
        _file_name(name, prefix, config): tensor.detach().contiguous() for name, tensor in head.state_dict().items()
    }
    tokens = tensors.pop("draft_tokens").cpu()
    tensors["d2t"] = tokens - torch.arange(len(tokens))
    tensors["t2d"] = torch.zeros(config.layer.vocab_size, dtype=torch.bool).index_fill_(0, tokens, True)
    layer = {**config.layer.to_diff_dict(), "vocab_size": config.layer.vocab_size, "model_type": "llama"}
    common = {
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "eagle_aux_hidden_state_layer_ids": None if config.target_layers is None else list(config.target_layers),
        "norm_before_residual": config.norm_before_residual,
        "fc_norm": config.fc_norm,
        "norm_before_fc": config.norm_before_fc,
        "norm_output": config.norm_output,
    }
    if layout == "eagle":
        written = {**layer, **common, "architectures": ["LlamaForCausalLMEagle3"]}
    else:
        proposal = {"proposal_type": "greedy", "speculative_tokens": 5, "verifier_accept_k": 1, "accept_tolerance": 0.0}
        written = {
            **common,
            "architectures": ["Eagle3DraftModel"],
            "speculators_model_type": "eagle3",
            "transformer_layer_config": layer,
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [proposal],
                "verifier": {"name_or_path": config.target, "architectures": []},
            },
        }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHT_FILES[0], metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def _own_name(name: str) -> str:
    """A tensor's name in `Eagle3Head`."""
    name = name.removeprefix("model.")
    for prefix in LAYER_PREFIXES:
        if name.startswith(prefix):
            name = name.removeprefix(prefix).removeprefix("self_attn.")
    if name.startswith("fc_norm."):
        return name.replace("fc_norm.", "input_norms.")
    return "input_norms.0.weight" if name == "input_norm.weight" else name


def _file_name(name: str, prefix: str, config: Eagle3Config) -> str:
    first = name.split(".")[0]
    if first in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
        return f"{prefix}self_attn.{name}"
    if first in ("input_layernorm", "hidden_norm", "post_attention_layernorm", "mlp"):
        return prefix + name
    return (
        "input_norm.weight"
        if first == "input_norms" and config.norm_before_fc
        else name.replace("input_norms.", "fc_norm.")
    )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as tensors only ({type(error).__name__}: {error})") from error
    return {name: tensor for name, tensor in loaded.items() if isinstance(tensor, Tensor)}


def _listed(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"
