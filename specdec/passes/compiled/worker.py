"""The process that compiles in the background: `python -m specdec.passes.compiled.worker FOLDER PID`."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from specdec.passes.compiled.background import BUSY, REQUEST
from specdec.passes.compiled.forward import register_grouped_attention
from specdec.passes.compiled.package import failure_file, keep, locked, write_package
from specdec.passes.compiled.structure import restored

LOOKS_EVERY = 0.5
"""Seconds between looks whether the process that asked still lives."""


def main(folder: Path, asker: int) -> int:
    """Compiles what a folder asks for; returns the exit code."""
    threading.Thread(target=_end_with, args=(asker, folder), daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(19)
    torch.set_num_threads(1)
    module, shapes, dynamic, file = restored((folder / REQUEST).read_bytes())
    with locked(file, waits=False) as is_mine:
        if not is_mine:
            return BUSY
        if file.exists():
            return 0
        try:
            inputs = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in shapes]
            register_grouped_attention()
            package = write_package(folder, module, inputs, dynamic)
        except Exception as error:  # whatever a model, torch or the compiler may raise
            reason = f"{type(error).__name__}: {str(error).strip()[:300]}"
            failure_file(file).write_text(reason, encoding="utf-8")
            return 1
        return 0 if keep(package, file) else 2


def _end_with(asker: int, folder: Path) -> None:
    while os.getppid() == asker:
        time.sleep(LOOKS_EVERY)
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
