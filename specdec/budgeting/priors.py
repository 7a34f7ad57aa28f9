"""What step times start from: the shape of the kind of device, or what earlier processes have measured."""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from specdec.common.folders import cache_folder
from specdec.tree import NODE_BUCKETS

Shape = Mapping[int, float]
FLOAT32_CPU: Shape = {1: 42.0, 2: 58.0, 4: 58.0, 8: 58.0, 16: 70.0, 32: 96.0, 64: 146.0}
HALF_CPU: Shape = {1: 22.0, 2: 22.0, 4: 23.0, 8: 25.0, 16: 29.0, 32: 37.0, 64: 54.0}
GPU: Shape = {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.01, 16: 1.02, 32: 1.05, 64: 1.2}
"""Times of passes over so many tokens; only their ratios matter. The CPU's are those of a 135 M model on two cores."""
CPU_BANDWIDTH, GPU_BANDWIDTH = 12e9, 1.5e12
"""Bytes of weights read per second: sets the scale of step times until the first real step."""
GPU_OVERHEAD = 5e-3
"""Seconds per pass on a GPU beyond reading the weights, until the first real step."""
FORMAT, VERSION = "specdec step times", 1

Entry = tuple[list[Any], dict[int, float]]
"""Surroundings, and seconds by node count."""


def first_seconds(model: nn.Module, rows: int, max_nodes: int) -> dict[int, float]:
    """Seconds by node count that are assumed of a model before anything was measured.

    Args:
        model: The target.
        rows: Of the batch: a pass runs so many tokens per node.
        max_nodes: Largest node count of interest.
    """
    weights = list(model.parameters())
    device = weights[0].device if weights else torch.device("cpu")
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    if device.type != "cpu":
        shape, plain = GPU, GPU_OVERHEAD + size / GPU_BANDWIDTH
    else:
        is_half = bool(weights) and weights[0].dtype in (torch.bfloat16, torch.float16)
        shape, plain = HALF_CPU if is_half else FLOAT32_CPU, size / CPU_BANDWIDTH
    return {n: plain * _of_tokens(shape, rows * n) / _of_tokens(shape, 1) for n in NODE_BUCKETS if n <= max_nodes}


def _of_tokens(shape: Shape, tokens: int) -> float:
    """Time of a pass over so many tokens, a power of two; beyond the shape it grows as between its last two sizes."""
    return shape[tokens] if tokens in shape else shape[64] + (tokens - 64) / 32 * (shape[64] - shape[32])


def load_entries(model: nn.Module) -> list[Entry]:
    """What earlier processes have measured of this model on this device; nothing where the file is damaged."""
    try:
        whole = json.loads(_file(model).read_text(encoding="utf-8"))
        if (whole["format"], whole["version"]) != (FORMAT, VERSION):
            return []
        entries = [
            (list(at), {int(nodes): float(taken) for nodes, taken in times.items()}) for at, times in whole["times"]
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return []
    sane = (len(at) == 4 and times and all(0.0 < taken < 1e4 for taken in times.values()) for at, times in entries)
    return [entry for entry, is_sane in zip(entries, sane, strict=True) if is_sane]


def save_entries(model: nn.Module, entries: list[Entry]) -> None:
    """Keeps step times for later processes; says nothing where no folder can be written."""
    part = None
    try:
        file = _file(model)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".part", delete=False) as opened:
            part = Path(opened.name)
            json.dump({"format": FORMAT, "version": VERSION, "times": entries}, opened)
        part.replace(file)
    except (OSError, RuntimeError):
        if part is not None:
            part.unlink(missing_ok=True)


def _file(model: nn.Module) -> Path:
    """One file per kind of model, device, and number of threads."""
    weight = next(model.parameters(), torch.empty(0))
    device = torch.cuda.get_device_name(weight.device) if weight.is_cuda else platform.machine()
    config = getattr(model, "config", None)
    values: dict[str, Any] = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    values = {name: value for name, value in values.items() if name not in ("_name_or_path", "transformers_version")}
    told = [type(model).__name__, values, str(weight.dtype), device, torch.get_num_threads(), torch.__version__]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
    return cache_folder() / "step_times" / f"{digest[:24]}.json"
