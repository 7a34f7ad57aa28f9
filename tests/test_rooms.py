"""Imports go from the story to the rooms, and from methods to the core, never back."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METHODS = ("drafters", "heads", "verifiers")
TOP = ("api", "cli", "__main__", "commands", "benchmark", "training")
"""What uses the library as a user would."""
LOWEST = ("common", "compat", "kernels")
"""What nothing of specdec stands below."""
STORY = ("generation", "decoding")
CORE = ("tree", "rows", "passes", "budgeting", "inspection")
FORBIDDEN = {
    **{name: {*CORE, *STORY, *METHODS, *TOP} for name in LOWEST},
    **{name: {*STORY, *TOP} for name in (*CORE, *METHODS, "kv_cache", "sampling")},
    **{name: {"generation", *TOP} for name in ("target", "step", "drafting", "budget", "report", "decoding")},
    "generation": set(TOP),
    "training": {"commands", "cli"},
    "benchmark": {"commands", "cli"},
    "api": {"commands", "benchmark", "training", "cli"},
}
"""What each room or module must not import, at the top of a file or in a function."""
BASES = {"specdec.drafters.base", "specdec.verifiers.base"}
"""What the core knows of methods: what a drafter and a verifier are."""


def modules() -> dict[str, Path]:
    found = {}
    for folder in ("specdec", *METHODS, "training"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if folder == "specdec" and len(parts) > 1 and parts[1] in (*METHODS, "training"):
                continue  # the symlinks
            parts = parts if folder == "specdec" else ("specdec", *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(nodes: list[ast.stmt], only_top: bool) -> set[str]:
    """The modules of specdec that are imported, but for what type checkers alone see."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "specdec":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
        elif not (only_top and isinstance(node, ast.FunctionDef)):
            for part in ("body", "orelse", "handlers", "finalbody"):
                found |= imports(getattr(node, part, []), only_top)
    return found


def parsed(module: str, only_top: bool = False) -> set[str]:
    return imports(ast.parse(MODULES[module].read_text(encoding="utf-8")).body, only_top)


def room(module: str) -> str:
    return [*module.split("."), ""][1]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module: str) -> None:
    upward = {name for name in parsed(module) if room(name) in FORBIDDEN.get(room(module), ())}
    assert not upward, f"{module} must not import {sorted(upward)}; see the map in CONTRIBUTING.md"


def test_the_core_knows_no_method_by_name() -> None:
    core = [name for name in MODULES if name != "specdec" and room(name) not in (*METHODS, *TOP)]
    named = {name: {i for i in parsed(name) if room(i) in METHODS and i not in BASES} for name in core}
    assert not {name: sorted(found) for name, found in named.items() if found}


def test_there_is_no_import_cycle() -> None:
    graph = {name: parsed(name, only_top=True) - {name} for name in MODULES}
    while leaves := {name for name, needed in graph.items() if not needed & set(graph)}:
        graph = {name: needed for name, needed in graph.items() if name not in leaves}
    assert not graph, f"these import each other, or what does: {sorted(graph)}"
