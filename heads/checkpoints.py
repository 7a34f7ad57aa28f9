"""Checkpoints of Medusa heads, read: Medusa's own layouts and vLLM's."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from specdec.heads import calibration
from specdec.heads.calibration import HeadCalibration
from specdec.heads.config import MedusaConfig, check_token_map

CONFIG_FILE = "config.json"
MEDUSA_FILE = "medusa_lm_head.safetensors"
PICKLED_FILE = "medusa_lm_head.pt"
VLLM_FILE = "model.safetensors"
WEIGHT_FILES = (MEDUSA_FILE, PICKLED_FILE, VLLM_FILE)

MEDUSA_NAME = re.compile(r"(?P<head>\d+)\.(?P<layer>\d+)\.(?P<kind>linear\.weight|linear\.bias|weight)")
VLLM_NAME = re.compile(r"blocks\.(?P<head>\d+)\.layers\.(?P<layer>\d+)\.(?P<kind>weight|bias)")
VLLM_PROJECTION = re.compile(r"lm_heads\.(?P<head>\d+)\.weight")
TOKEN_MAP = "token_map"
"""The tokens that heads with a small vocabulary can name: vLLM's, here also in Medusa's layouts."""
PREFIX = re.compile(r"^medusa_heads?\.")


@dataclass
class Checkpoint:
    """Heads as read.

    Args:
        config: Sizes, from the tensors.
        tensors: By their names in `MedusaHeads`.
        calibration: Where the folder holds one.
    """

    config: MedusaConfig
    tensors: dict[str, Tensor]
    calibration: HeadCalibration | None


Place = tuple[str, int, int]
"""Where a tensor belongs: `"weights"` or `"biases"`, head, layer; or `"projections"`, head, 0."""


@dataclass
class NamedTensors:
    """Tensors of a checkpoint in the order of the layout's names.

    Args:
        places: Where each tensor belongs, by its name in the file.
        tensors: By their names in the file.
        unknown: Names for which the layout has no use.
        layout: `"medusa"` or `"vllm"`.
    """

    places: dict[str, Place]
    tensors: dict[str, Tensor]
    unknown: list[str]
    layout: str

    def name(self, place: Place) -> str:
        """What the layout calls a tensor."""
        kind, head, layer = place
        if self.layout == "vllm":
            if kind == "projections":
                return f"lm_heads.{head}.weight"
            return f"blocks.{head}.layers.{layer}.{'weight' if kind == 'weights' else 'bias'}"
        if kind == "projections":
            return f"{head}.{layer}.weight"
        return f"{head}.{layer}.linear.{'weight' if kind == 'weights' else 'bias'}"

    def of_kind(self, kind: str) -> list[Place]:
        """Places of one kind that the file fills."""
        return [place for place in self.places.values() if place[0] == kind]


def read_checkpoint(source: str | Path, revision: str | None = None, token: str | bool | None = None) -> Checkpoint:
    """Reads heads from a folder or the hub; see `MedusaHeads.from_pretrained`."""
    weights = next((path for name in WEIGHT_FILES if (path := _fetch(source, name, revision, token))), None)
    if weights is None:
        raise FileNotFoundError(
            f"no heads in {str(source)!r}: none of {', '.join(WEIGHT_FILES)} is there, nor in the hub's local cache; "
            "give the folder or the hub name that holds them"
        )
    config_path = _fetch(source, CONFIG_FILE, revision, token)
    config = _read_config(config_path) if config_path else {}
    named = _named(_read_tensors(weights), config)
    if not named.of_kind("weights"):
        raise ValueError(
            f"{weights} holds no Medusa heads: no tensor is named like {named.name(('weights', 0, 0))!r}; "
            f"its tensors are {_listed(named.unknown)}"
        )
    try:
        sizes, tensors = _assemble(named, config)
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from error
    _warn_of_wrong_config(config, sizes, str(config_path))
    calibrated = _fetch(source, calibration.FILE_NAME, revision, token)
    return Checkpoint(sizes, tensors, _read_calibration(calibrated, sizes.num_heads) if calibrated else None)


def _fetch(source: str | Path, name: str, revision: str | None, token: str | bool | None) -> Path | None:
    """A file of the folder or of the hub's repository; None if it has no such file."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(str(source), name, revision=revision, token=token))
    except EntryNotFoundError:
        return None
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(f"{str(source)!r} is neither a folder nor a repository of the hub") from error


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
        raise ValueError(f"{path} can not be read, it may be cut short: {error}") from error
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


def _named(tensors: dict[str, Tensor], config: dict[str, Any]) -> NamedTensors:
    """Sorts tensors by their names."""
    is_vllm = any(VLLM_NAME.fullmatch(name) for name in tensors)
    places = {}
    ignored: set[str] = set()
    if is_vllm:
        places = {name: place for name in tensors if (place := _vllm_place(name))}
        if config.get("original_lm_head"):
            # The one projection, under either name, is a copy of the target's output embedding.
            ignored = {name for name in tensors if name == "lm_head.weight" or VLLM_PROJECTION.fullmatch(name)}
            places = {name: place for name, place in places.items() if name not in ignored}
    else:
        places = {name: place for name in tensors if (place := _medusa_place(name))}
    ignored.add(TOKEN_MAP)
    unknown = [name for name in tensors if name not in places and name not in ignored]
    return NamedTensors(places, tensors, unknown, "vllm" if is_vllm else "medusa")


def _medusa_place(name: str) -> Place | None:
    match = MEDUSA_NAME.fullmatch(name)
    if match is None:
        return None
    kind = {"linear.weight": "weights", "linear.bias": "biases", "weight": "projections"}[match["kind"]]
    return kind, int(match["head"]), int(match["layer"])


def _vllm_place(name: str) -> Place | None:
    if match := VLLM_NAME.fullmatch(name):
        return "weights" if match["kind"] == "weight" else "biases", int(match["head"]), int(match["layer"])
    if match := VLLM_PROJECTION.fullmatch(name):
        return "projections", int(match["head"]), 0
    return None


def _assemble(named: NamedTensors, config: dict[str, Any]) -> tuple[MedusaConfig, dict[str, Tensor]]:
    """Sizes from the tensors, and the tensors stacked; every one that does not fit is named in one error."""
    sizes, projected = _sizes(named, config)
    has_biases = named.layout == "medusa" or bool(named.of_kind("biases"))
    after = sizes.num_layers if named.layout == "medusa" else 0
    wanted: dict[Place, tuple[int, ...]] = {}
    for head in range(sizes.num_heads):
        for layer in range(sizes.num_layers):
            wanted["weights", head, layer] = (sizes.hidden_size, sizes.hidden_size)
            if has_biases:
                wanted["biases", head, layer] = (sizes.hidden_size,)
        if sizes.version == "1":
            wanted["projections", head, after] = (projected, sizes.hidden_size)
    _check(named, wanted)
    found = {place: named.tensors[name] for name, place in named.places.items()}
    token_map, rows = _token_map(named, sizes, projected)
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in found.values()))

    def stacked(kind: str, layer: int) -> Tensor:
        return torch.stack([found[kind, head, layer].to(dtype) for head in range(sizes.num_heads)])

    no_biases = torch.zeros(sizes.num_heads, sizes.hidden_size, dtype=dtype)
    tensors = {f"weights.{layer}": stacked("weights", layer) for layer in range(sizes.num_layers)}
    for layer in range(sizes.num_layers):
        tensors[f"biases.{layer}"] = stacked("biases", layer) if has_biases else no_biases.clone()
    if sizes.version == "1":
        tensors["projections"] = stacked("projections", after)
        if rows is not None:
            tensors["projections"] = tensors["projections"][:, rows]
    if token_map is not None:
        tensors[TOKEN_MAP] = token_map
    return sizes, tensors


def _token_map(named: NamedTensors, sizes: MedusaConfig, projected: int) -> tuple[Tensor | None, Tensor | None]:
    """The tokens that the heads can name, ascending, and which rows of a projection are theirs.

    Args:
        named: Of the file.
        sizes: Of the heads.
        projected: Rows of a projection in the file: of the tokens that can be named, or of all.
    """
    if sizes.draft_vocab_size is None:
        return None, None
    tokens = named.tensors[TOKEN_MAP]
    ascending, order = tokens.sort()
    check_token_map(ascending, sizes.vocab_size)
    ascending = ascending.long()
    if sizes.version == "1" and projected not in (len(tokens), sizes.vocab_size):
        raise ValueError(f"{TOKEN_MAP} lists {len(tokens)} tokens, but projections cover {projected}")
    return ascending, order if projected == len(tokens) else ascending


def _sizes(named: NamedTensors, config: dict[str, Any]) -> tuple[MedusaConfig, int]:
    """What most tensors say, and how many rows projections have.

    Raises:
        ValueError: Projections cover a part of the vocabulary, and no map tells which.
    """
    shapes = {name: named.tensors[name].shape for name in named.places}
    projections = [shapes[name][:1] for name, place in named.places.items() if place[0] == "projections"]
    projected = _most_common(projections) if projections else 0
    token_map = named.tensors.get(TOKEN_MAP)
    said = config.get("vocab_size")
    if projections and token_map is None and said not in (None, projected):
        raise ValueError(
            f"projections cover {projected} tokens, {CONFIG_FILE} says {said} (vLLM's truncated_vocab_size?), and "
            f"there is no {TOKEN_MAP} that tells which; without it heads must cover the whole vocabulary"
        )
    sizes = MedusaConfig(
        hidden_size=_most_common(shapes[name][-1:] for name, place in named.places.items() if place[0] != "biases"),
        vocab_size=projected if projections and token_map is None else said,
        num_heads=1 + max(head for _, head, _ in named.places.values()),
        # In Medusa's names a projection is numbered like the layer after the last.
        num_layers=max(layer + (kind != "projections") for kind, _, layer in named.places.values()),
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


def _check(named: NamedTensors, wanted: dict[Place, tuple[int, ...]]) -> None:
    missing = [named.name(place) for place in wanted if place not in set(named.places.values())]
    extra = named.unknown + [name for name, place in named.places.items() if place not in wanted]
    misshapen = [
        f"{name} {tuple(named.tensors[name].shape)} instead of {wanted[place]}"
        for name, place in named.places.items()
        if place in wanted and tuple(named.tensors[name].shape) != wanted[place]
    ]
    not_float = [name for name in named.places if not named.tensors[name].is_floating_point()]
    faults = {"missing": missing, "unexpected": extra, "of the wrong shape": misshapen, "not of floats": not_float}
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
