"""No two processes compile the same package."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def locked(file: Path, waits: bool) -> Iterator[bool]:
    """Holds the lock of a package; the system frees it when the process dies, however that may be.

    Args:
        file: The package.
        waits: Wait for whoever holds it.

    Yields:
        Whether it is held; True, too, where there are no locks, as in a folder that cannot be written to.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.with_suffix(".lock").open("w")
    except OSError:
        yield True
        return
    with lock:
        yield _take(lock.fileno(), waits)


def _take(descriptor: int, waits: bool) -> bool:
    try:
        fcntl: Any = importlib.import_module("fcntl")
        fcntl.flock(descriptor, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, or a file system without locks
        return True
    return True
