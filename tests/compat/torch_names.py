"""The names of torch that the package uses; run as a script it looks for them in the torch that is installed.

`python -m tests.compat.torch_names` prints those that this torch lacks, `--write` rewrites the list of those it has.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("specdec", "drafters", "heads", "training", "verifiers")
KNOWN = Path(__file__).with_name("torch_names.txt")


def used() -> set[str]:
    """Dotted names, as far as they can be told from the source: modules, functions, classes and their attributes."""
    sources = {path.resolve() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    return {name for path in sources for name in _of_source(path.read_text(encoding="utf-8"))}


def _of_source(source: str) -> Iterator[str]:
    tree = ast.parse(source)
    homes: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    homes[alias.asname or "torch"] = alias.name if alias.asname else "torch"
                    yield alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                homes[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        parts: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name) and inner.id in homes:
            yield ".".join([homes[inner.id], *reversed(parts)])


def exists(name: str) -> bool:
    """Whether the installed torch has a name."""
    found: object = importlib.import_module("torch")
    path = "torch"
    for part in name.split(".")[1:]:
        path += f".{part}"
        if not hasattr(found, part):
            try:
                importlib.import_module(path)
            except ImportError:
                return False
        found = getattr(found, part)
    return True


def known() -> set[str]:
    """The names that the oldest supported torch has."""
    return {line for line in KNOWN.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")}


if __name__ == "__main__":
    import torch

    names = {name: exists(name) for name in sorted(used())}
    print(f"torch {torch.__version__} lacks:", ", ".join(name for name, is_there in names.items() if not is_there))
    if "--write" in sys.argv:
        version = torch.__version__.split("+")[0]
        lines = [f"# Names of torch {version} that the package uses. See torch_names.py.", *filter(names.get, names)]
        KNOWN.write_text("\n".join(lines) + "\n", encoding="utf-8")
