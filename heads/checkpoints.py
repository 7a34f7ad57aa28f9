"""Checkpoints of Medusa heads, read and written: Medusa's own layouts and vLLM's."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec.heads import calibration
from specdec.heads.calibration import HeadCalibration
from specdec.heads.config import MedusaConfig, check_token_map
from specdec.heads.files import fetch

if TYPE_CHECKING:
    from specdec.heads.medusa import MedusaHeads

CONFIG_FILE = "config.json"
MEDUSA_FILE = "medusa_lm_head.safetensors"
PICKLED_FILE = "medusa_lm_head.pt"
VLLM_FILE = "model.safetensors"
WEIGHT_FILES = (MEDUSA_FILE, PICKLED_FILE, VLLM_FILE)
LAYOUTS = ("1", "2", "vllm")
TOKEN_MAP = "token_map"
"""The tokens that heads with a small vocabulary can name: vLLM's, here also in Medusa's layouts."""
PREFIX = re.compile(r"^medusa_heads?\.")

Place = tuple[str, int, int]
"""A tensor's kind (a field of `Names`), head and layer; a projection counts as the layer after the last."""


class Names(NamedTuple):
    """Names of tensors in a layout, with places for the numbers of head and layer."""

    weights: str
    biases: str
    projections: str

    def of(self, num_heads: int, num_layers: int, biases: bool = True, projections: bool = True) -> dict[Place, str]:
        """The names of a whole set of heads."""
        names: dict[Place, str] = {}
        for head in range(num_heads):
            for layer in range(num_layers):
                names["weights", head, layer] = self.weights.format(head=head, layer=layer)
                if biases:
                    names["biases", head, layer] = self.biases.format(head=head, layer=layer)
            if projections:
                names["projections", head, num_layers] = self.projections.format(head=head, layer=num_layers)
        return names

    def place(self, name: str) -> Place | None:
        """Where a tensor of this name belongs; None if nowhere."""
        for kind, template in self._asdict().items():
            pattern = (
                re.escape(template).replace(r"\{head\}", r"(?P<head>\d+)").replace(r"\{layer\}", r"(?P<layer>\d+)")
            )
            if match := re.fullmatch(pattern, name):
                return kind, int(match["head"]), int(match.groupdict().get("layer", 0))
        return None


MEDUSA = Names("{head}.{layer}.linear.weight", "{head}.{layer}.linear.bias", "{head}.{layer}.weight")
VLLM = Names("blocks.{head}.layers.{layer}.weight", "blocks.{head}.layers.{layer}.bias", "lm_heads.{head}.weight")


class Checkpoint(NamedTuple):
    """Heads as read.

    Args:
        config: Sizes, from the tensors.
        tensors: By their names in `MedusaHeads`.
        calibration: The folder's, if it holds one.
    """

    config: MedusaConfig
    tensors: dict[str, Tensor]
    calibration: HeadCalibration | None


def read_checkpoint(source: str | Path, revision: str | None = None, token: str | bool | None = None) -> Checkpoint:
    """Reads heads from a folder or the hub; see `MedusaHeads.from_pretrained`."""
    weights = next((path for name in WEIGHT_FILES if (path := fetch(source, name, revision, token))), None)
    if weights is None:
        raise FileNotFoundError(
            f"no heads in {str(source)!r}: none of {', '.join(WEIGHT_FILES)} is there, nor in the hub's local cache; "
            "give the folder or the hub name that holds them"
        )
    config_path = fetch(source, CONFIG_FILE, revision, token)
    config = _read_config(config_path) if config_path else {}
    tensors = _read_tensors(weights)
    try:
        sizes, assembled = _assemble(tensors, config)
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from error
    _warn_of_wrong_config(config, sizes, str(config_path))
    calibrated = fetch(source, calibration.FILE_NAME, revision, token)
    return Checkpoint(sizes, assembled, _read_calibration(calibrated, sizes.num_heads) if calibrated else None)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object")
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = (
            torch.load(path, map_location="cpu", weights_only=True)
            if path.suffix == ".pt"
            else load_file(path, device="cpu")
        )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged or holds pickled objects, which are refused because reading them can run code; save "
            f"the heads' state_dict() as {MEDUSA_FILE}"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read, it may be cut short: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} is not a dictionary of tensors; save the heads' state_dict() as {MEDUSA_FILE}")
    return {PREFIX.sub("", str(name)): tensor for name, tensor in tensors.items()}


def _read_calibration(path: Path, num_heads: int) -> HeadCalibration:
    found = HeadCalibration.load(path.parent)
    if found.num_heads != num_heads:
        raise ValueError(
            f"{path} is of {found.num_heads} heads, the checkpoint of {num_heads}; delete it or measure it again"
        )
    return found


def _assemble(tensors: dict[str, Tensor], config: dict[str, Any]) -> tuple[MedusaConfig, dict[str, Tensor]]:
    """Sizes from the tensors, and the tensors stacked; one error names every tensor that does not fit."""
    is_vllm = any((place := VLLM.place(name)) and place[0] != "projections" for name in tensors)
    names = VLLM if is_vllm else MEDUSA
    token_map = tensors.get(TOKEN_MAP)
    tensors = {name: tensor for name, tensor in tensors.items() if name != TOKEN_MAP}
    if is_vllm and config.get("original_lm_head"):
        # The one projection, under either name, is a copy of the target's output embedding.
        tensors = {name: t for name, t in tensors.items() if not re.fullmatch(r"lm_head(s\.\d+)?\.weight", name)}
    places = {name: place for name in tensors if (place := names.place(name))}
    if not any(kind == "weights" for kind, _, _ in places.values()):
        raise ValueError(
            f"holds no Medusa heads: no tensor is named like {MEDUSA.weights.format(head=0, layer=0)!r}; "
            f"its tensors are {_listed(list(tensors))}"
        )
    sizes, projected = _sizes(tensors, places, token_map, config)
    has_biases = not is_vllm or any(kind == "biases" for kind, _, _ in places.values())
    wanted = names.of(sizes.num_heads, sizes.num_layers, has_biases, sizes.version == "1")
    hidden = sizes.hidden_size
    shapes = {"weights": (hidden, hidden), "biases": (hidden,), "projections": (projected, hidden)}
    _check(tensors, {name: shapes[kind] for (kind, _, _), name in wanted.items()})
    dtype = reduce(torch.promote_types, (tensors[name].dtype for name in wanted.values()))

    def stacked(kind: str, layer: int) -> Tensor:
        return torch.stack([tensors[wanted[kind, head, layer]].to(dtype) for head in range(sizes.num_heads)])

    assembled = {f"weights.{layer}": stacked("weights", layer) for layer in range(sizes.num_layers)}
    for layer in range(sizes.num_layers):
        zeros = torch.zeros(sizes.num_heads, hidden, dtype=dtype)
        assembled[f"biases.{layer}"] = stacked("biases", layer) if has_biases else zeros
    if sizes.version == "1":
        assembled["projections"] = stacked("projections", sizes.num_layers)
    if token_map is not None:
        assembled[TOKEN_MAP], order = token_map.sort()
        check_token_map(assembled[TOKEN_MAP], sizes.vocab_size)
        assembled[TOKEN_MAP] = assembled[TOKEN_MAP].long()
        if sizes.version == "1":  # of the tokens that can be named, in the order of the map, or of all
            if projected not in (len(token_map), sizes.vocab_size):
                raise ValueError(f"{TOKEN_MAP} lists {len(token_map)} tokens, but projections cover {projected}")
            rows = order if projected == len(token_map) else assembled[TOKEN_MAP]
            assembled["projections"] = assembled["projections"][:, rows]
    return sizes, assembled


def _sizes(
    tensors: dict[str, Tensor], places: dict[str, Place], token_map: Tensor | None, config: dict[str, Any]
) -> tuple[MedusaConfig, int]:
    """What most tensors say, and how many rows projections have.

    Raises:
        ValueError: Projections cover a part of the vocabulary, and no map tells which.
    """
    shapes = {name: tensors[name].shape for name in places}
    projections = [shapes[name][:1] for name, place in places.items() if place[0] == "projections"]
    projected = _most_common(projections) if projections else 0
    said = config.get("vocab_size")
    if projections and token_map is None and said not in (None, projected):
        raise ValueError(
            f"projections cover {projected} tokens, {CONFIG_FILE} says {said} (vLLM's "
            f"truncated_vocab_size?), and there is no {TOKEN_MAP} that tells which; without it heads must cover the "
            "whole vocabulary"
        )
    sizes = MedusaConfig(
        hidden_size=_most_common(shapes[name][-1:] for name, place in places.items() if place[0] != "biases"),
        vocab_size=projected if projections and token_map is None else said,
        num_heads=1 + max(head for _, head, _ in places.values()),
        num_layers=max(layer + (kind != "projections") for kind, _, layer in places.values()),
        version="1" if projections else "2",
        base_model_name_or_path=config.get("base_model_name_or_path"),
        draft_vocab_size=None if token_map is None else token_map.numel(),
    )
    return sizes, projected


def _most_common(shapes: Iterable[torch.Size]) -> int:
    counts = Counter(shape[0] for shape in shapes if len(shape))
    if not counts:
        raise ValueError("its tensors are single numbers, not matrices")
    return counts.most_common(1)[0][0]


def _check(tensors: dict[str, Tensor], wanted: dict[str, tuple[int, ...]]) -> None:
    known = {name: tensor for name, tensor in tensors.items() if name in wanted}
    faults = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted],
        "of the wrong shape": [
            f"{name} {tuple(tensor.shape)} instead of {wanted[name]}"
            for name, tensor in known.items()
            if tuple(tensor.shape) != wanted[name]
        ],
        "not of floats": [name for name, tensor in known.items() if not tensor.is_floating_point()],
    }
    if any(faults.values()):
        listed = "; ".join(f"{what}: {', '.join(names)}" for what, names in faults.items() if names)
        raise ValueError(f"tensors do not make a set of heads: {listed}")


def _warn_of_wrong_config(config: dict[str, Any], sizes: MedusaConfig, path: str) -> None:
    """The tensors win: counts in configs of published heads are often those of a default."""
    keys: dict[str, tuple[str, ...]] = {
        "num_heads": ("medusa_num_heads", "num_heads"),
        "num_layers": ("medusa_num_layers", "num_hidden_layers"),
        "hidden_size": ("hidden_size",),
        "vocab_size": ("vocab_size",),
        "version": ("version",),
    }
    for name, aliases in keys.items():
        found = getattr(sizes, name)
        said = next((config[alias] for alias in aliases if alias in config), found)
        if str(said) != str(found):
            warnings.warn(f"{path} says {name} {said}, the tensors say {found}; the tensors are right", stacklevel=4)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown or "none"


def write_checkpoint(heads: MedusaHeads, folder: Path, layout: str | None = None) -> None:
    """Saves heads; see `MedusaHeads.save_pretrained`."""
    layout = heads.config.version if layout is None else layout
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not one of {', '.join(map(repr, LAYOUTS))}")
    file_name = VLLM_FILE if layout == "vllm" else MEDUSA_FILE
    _check_folder(folder, file_name)
    tensors = _tensors(heads, layout)
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


def _tensors(heads: MedusaHeads, layout: str) -> dict[str, Tensor]:
    """All tensors by their names in the layout."""
    if layout == "2":
        _check_projections_are_shared(heads)
    sizes, tensors = heads.config, {}
    names = VLLM if layout == "vllm" else MEDUSA
    for (kind, head, layer), name in names.of(sizes.num_heads, sizes.num_layers, projections=layout != "2").items():
        if kind != "projections":
            tensors[name] = getattr(heads, kind)[layer][head]
        elif layout == "1" or sizes.version == "1" or head == 0:  # vLLM reads a shared projection from the file, once
            tensors[name] = _shared_projection(heads) if heads.projections is None else heads.projections[head]
    if heads.token_map is not None:
        tensors[TOKEN_MAP] = heads.token_map
    # Copies even where none seems needed: safetensors refuses tensors that share memory.
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _shared_projection(heads: MedusaHeads) -> Tensor:
    weight = heads.output_embedding.weight()
    return weight if heads.token_map is None else weight[heads.token_map.to(weight.device)]


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
