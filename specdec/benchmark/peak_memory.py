"""The most memory that a call has needed."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
RESET_PEAK = "5"
"""Written to `CLEAR`, this sets the process's largest memory to its present one (Linux, proc(5))."""


def reset_peak(device: torch.device) -> None:
    """Starts anew, where that is possible."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        try:
            CLEAR.write_text(RESET_PEAK)
        except OSError:
            return


def peak_bytes(device: torch.device) -> int | None:
    """Largest memory since `reset_peak`: torch's tensors on a GPU, the whole process on the CPU; None if unknown.

    The largest memory that `getrusage` tells is that of the process's whole life, and says nothing of one call.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        lines = STATUS.read_text().splitlines() if os.access(CLEAR, os.W_OK) else []
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
