"""What the probe has found, kept on disk: a new process makes no passes for it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from specdec.common.folders import cache_folder
from specdec.passes.masks import MaskFormat
from specdec.passes.probe import LARGEST_HALF_NOISE
from specdec.passes.tolerance import noise_of, remember_noise

if TYPE_CHECKING:
    from specdec.passes.capability import Capability

FORMAT = 2
LEAST_PARAMETERS = 10_000_000
"""Keeps answers of models with at least this many parameters: smaller ones are probed faster than a file is worth."""


def file_of(model: Any, key: tuple[Any, ...]) -> Path | None:
    """The file of an answer; None where it must not be kept, as the model is not told by its class and config alone.

    Args:
        model: The target.
        key: What else the answer depends on: how it was probed, attention implementation, dtype, mode.
    """
    from specdec import __version__

    kind = type(model)
    is_altered = getattr(model, "_hf_peft_config_loaded", False) or any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.modules()
    )
    is_own = kind.__module__.startswith("transformers.models.")
    if not is_own or is_altered or sum(p.numel() for p in model.parameters()) < LEAST_PARAMETERS:
        return None
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    device = model.device
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    versions = FORMAT, __version__, torch.__version__, transformers.__version__
    layout = sorted(map(str, getattr(model, "hf_device_map", {}).values()))
    told = repr((kind.__module__, kind.__qualname__, key, device.type, card, versions, layout))
    text = told + json.dumps(config, sort_keys=True, default=str)
    return cache_folder() / "capability" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def read(file: Path | None, model: Any, names: Sequence[str]) -> Capability | None:
    """An answer from disk, or None. A file that cannot be read, or says what no probe says, counts as none.

    Args:
        file: See `file_of`.
        model: The target.
        names: Backends of tree attention that the answer may name.
    """
    from specdec.passes.capability import Capability

    if file is None:
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        noise = float(values.pop("noise"))
        mask = values.pop("mask_format")
        if mask is not None:
            mask = MaskFormat(**{**mask, "layer_types": tuple(mask["layer_types"])})
        found = Capability(**values)
        if found.mode not in ("tree", "chain") or (mask is None) == (found.mode == "tree"):
            return None
        if not 0 <= noise <= LARGEST_HALF_NOISE or (found.mode == "tree" and found.attention not in names):
            return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    remember_noise(model, model.dtype, noise)
    return replace(found, mask_format=mask)


def write(file: Path | None, model: Any, found: Capability) -> None:
    """Keeps an answer; nothing happens where the folder cannot be written to."""
    if file is None:
        return
    values = {**asdict(found), "rejected": dict(found.rejected), "noise": noise_of(model, model.dtype)}
    part = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(values, indent=1), encoding="utf-8")
        part.replace(file)
    except OSError:
        with suppress(OSError):
            part.unlink()
