"""The table of ablations names what there is, all of it, and leaves nothing changed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from numba.core.registry import CPUDispatcher

SPEC = importlib.util.spec_from_file_location(
    "ablation", Path(__file__).resolve().parents[1] / "benchmarks" / "ablation.py"
)
assert SPEC is not None and SPEC.loader is not None
ablation: Any = importlib.util.module_from_spec(SPEC)
__import__("sys").modules["ablation"] = ablation
SPEC.loader.exec_module(ablation)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def constants(path: str) -> dict[str, Any]:
    return {f"{path}.{name}": value for name, value in vars(ablation.module_of(path)).items() if name.isupper()}


def test_every_numeric_constant_is_in_the_table() -> None:
    import ast
    import inspect

    found = set()
    for path in ablation.MODULES:
        for node in ast.parse(inspect.getsource(ablation.module_of(path))).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            names = [name.id for t in targets for name in ast.walk(t) if isinstance(name, ast.Name)]
            found |= {f"{path}.{n}" for n in names if is_number(constants(path).get(f"{path}.{n}"))}
    assert found == set(ablation.OFF) | set(ablation.NOT_SWITCHED)
    assert not set(ablation.OFF) & set(ablation.NOT_SWITCHED)


def test_no_entry_changes_what_is_built_into_a_kernel() -> None:
    for path in ablation.MODULES:
        module = ablation.module_of(path)
        read = {
            name
            for value in vars(module).values()
            if isinstance(value, CPUDispatcher) and value.__module__ == module.__name__
            for name in value.py_func.__code__.co_names
        }
        assert not {f"{path}.{name}" for name in read} & set(ablation.OFF)


@pytest.mark.parametrize("entry", ablation.ABLATIONS, ids=lambda entry: entry.name)
def test_a_patch_is_taken_back(entry: Any) -> None:
    def state() -> list[Any]:
        values: list[Any] = []
        for path in (*ablation.MODULES, "drafters.medusa", "drafters.draft_model"):
            for value in [v for k, v in sorted(vars(ablation.module_of(path)).items()) if not k.startswith("__")]:
                values.append(value)
                if isinstance(value, type) and value.__module__.startswith("specdec"):
                    values += [(k, v) for k, v in sorted(vars(value).items()) if callable(v) or isinstance(v, property)]
                    values.append(getattr(value.__init__, "__defaults__", None))
                    is_dear = getattr(value, "is_dear", None)
                    values.append(getattr(is_dear, "__defaults__", None))
        return [repr(value) for value in values]

    before = state()
    with entry.patch():
        changed = state() != before
    assert state() == before
    assert changed or entry.patch is ablation.nothing_changed


def test_settings_do_not_learn_from_each_other() -> None:
    import re

    package = Path(ablation.module_of("budget").__file__).parent
    files = [*package.glob("*.py"), *(package / "drafters").glob("*.py")]
    holding = {
        (file.relative_to(package).as_posix().removesuffix(".py").replace("/", "."), name)
        for file in files
        for name in re.findall(r"^(\w*(?:LEARNED|KNOWN|TIMES)): WeakKeyDictionary", file.read_text("utf-8"), re.M)
    }
    assert holding - {("passes.capability", "_KNOWN")} <= set(ablation.LEARNED)
    usual = {key: getattr(ablation.module_of(key[0]), key[1]) for key in ablation.LEARNED}
    with ablation.Memory().in_use():
        assert not any(getattr(ablation.module_of(path), name) is usual[path, name] for path, name in usual)
        assert ablation.module_of("budget").LEARNED is ablation.module_of("budgeting.ledger").LEARNED
    assert all(getattr(ablation.module_of(path), name) is usual[path, name] for path, name in usual)


def test_names_are_distinct() -> None:
    names = [entry.name for entry in ablation.ABLATIONS]
    assert len(set(names)) == len(names)
