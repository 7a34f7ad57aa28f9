"""Compiles in a process of its own, at the lowest priority, while eager passes go on."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from specdec.passes.compiled.package import failure_file, locked, package_file
from specdec.passes.compiled.structure import without_weights

REQUEST = "request"
"""Name of the file with what to compile, in a folder of the process."""
BUSY = 3
"""Exit code of a process that finds another one compiling the same."""


class Compilation:
    """One process that compiles one package; it dies with the process that started it.

    Args:
        module: What to compile. Its weights are not copied: the other process makes tensors of the same shapes.
        inputs: Examples, as for `compile_ahead`.
        dynamic: Likewise.

    Raises:
        Exception: The module cannot be pickled, or no process be started.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor], dynamic: Sequence[Any]) -> None:
        self.file = package_file(module, inputs, dynamic)
        self.started = time.monotonic()
        shapes = [(tuple(x.shape), x.dtype, str(x.device)) for x in inputs]
        content = without_weights(module, shapes, tuple(dynamic), self.file)
        self._folder = tempfile.mkdtemp(prefix="specdec-compile-")
        (Path(self._folder) / REQUEST).write_bytes(content)
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), "1")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "specdec.passes.compiled.worker", self._folder, str(os.getpid())],
            env={**os.environ, **one_thread, "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the generation; and what the compiler starts ends with the process
        )
        atexit.register(self.stop)

    @property
    def is_running(self) -> bool:
        """Whether the process still compiles."""
        if self.process.poll() is None:
            return True
        self._clean_up()
        return False

    @property
    def failure(self) -> str | None:
        """Why the ended process left no package; None where it left one, or where another one compiles."""
        if self.file.exists() or self.process.returncode in (0, BUSY):
            return None
        return remembered(self.file) or f"the process that compiled ended with code {self.process.returncode}"

    def stop(self) -> None:
        """Ends the process and whatever it has started, if it still runs."""
        if self.process.poll() is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except (AttributeError, OSError):  # no groups on this system
                self.process.kill()
            self.process.wait()
        self._clean_up()

    def _clean_up(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        atexit.unregister(self.stop)


def is_compiled_elsewhere(file: Path) -> bool:
    """Whether some process compiles this package now."""
    with locked(file, waits=False) as is_free:
        return not is_free


def remembered(file: Path) -> str | None:
    """Why an earlier process could not compile a package; None if none has failed."""
    try:
        return failure_file(file).read_text(encoding="utf-8")
    except OSError:
        return None
