"""What a measured figure depends on besides its settings: machine, versions, commit, models."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

SHORT_LINE = 240
"""Characters up to which an object or a list of a results file stands on one line."""


def circumstances() -> dict[str, Any]:
    """What a figure depends on besides the settings: time, command, hardware, versions, commit."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name.replace("__main__.py", "specdec"), *sys.argv[1:]]),
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
    }


def hardware() -> dict[str, Any]:
    """Processor, cores, threads, memory in GiB and accelerators of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else None
    cuda = torch.cuda
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gib": memory and round(memory, 1),
        "platform": platform.platform(),
        "gpus": [cuda.get_device_name(i) for i in range(cuda.device_count())] if cuda.is_available() else [],
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("specdec-hf", "torch", "transformers", "numpy", "numba"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """The checkout's commit, with `+changes` if files differ from it; None outside a checkout of this project."""
    root = Path(__file__).resolve().parents[2]

    def git(*args: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def model_info(name: str, model: Any) -> dict[str, Any]:
    """What to say of a model beside its figures."""
    return {
        "name": name,
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attention": getattr(model.config, "_attn_implementation", None),
    }


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    """Writes results, an entry of a list or a short object a line, making the folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_laid_out(results) + "\n", encoding="utf-8")


def _laid_out(value: Any, depth: int = 0, in_list: bool = False) -> str:
    text = json.dumps(value)
    if in_list or len(text) <= SHORT_LINE or not isinstance(value, Mapping | list):
        return text
    margin = "\n" + " " * (depth + 1)
    if isinstance(value, Mapping):
        lines = [f"{json.dumps(key)}: {_laid_out(entry, depth + 1)}" for key, entry in value.items()]
        return "{" + margin + f",{margin}".join(lines) + margin[:-1] + "}"
    lines = [_laid_out(entry, depth + 1, in_list=True) for entry in value]
    return "[" + margin + f",{margin}".join(lines) + margin[:-1] + "]"
