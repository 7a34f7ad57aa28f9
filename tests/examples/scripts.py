"""Imports the modules of the examples, which import each other by bare name as a script's neighbours do."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "examples"


@contextmanager
def imported(folders: Sequence[str], names: Sequence[str]) -> Iterator[dict[str, ModuleType]]:
    """Modules by name, and the import path with them; afterwards both are as they were.

    Args:
        folders: Of the examples.
        names: Of modules in these folders.
    """
    kept = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    path = list(sys.path)
    sys.path[:0] = [str(EXAMPLES / folder) for folder in folders]
    try:
        yield {name: __import__(name) for name in names}
    finally:
        sys.path[:] = path
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(kept)
