"""The ablation names what there is, and leaves nothing changed."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("ablation", ROOT / "benchmarks" / "ablation.py")
assert SPEC is not None and SPEC.loader is not None
ablation: Any = importlib.util.module_from_spec(SPEC)
sys.modules["ablation"] = ablation
SPEC.loader.exec_module(ablation)
ENTRIES = list(ablation.ablations())


def module_of(path: str) -> Any:
    return importlib.import_module(f"specdec.{path}")


def state() -> list[str]:
    from specdec.budgeting.ledger import Backoff
    from specdec.drafters.merging.known import SourceWorth

    constants = [key.rsplit(".", 1) for key in ablation.CONSTANTS]
    values = [getattr(module_of(path), name) for path, name in constants]
    return [*map(repr, values), repr(Backoff.skips), repr(SourceWorth.skips)]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_patch_changes_something_and_is_taken_back(entry: Any) -> None:
    before = state()
    with entry.patch():
        is_other = entry.drafter is not ablation.AutoDrafter or entry.fixed or entry.arguments
        assert state() != before or is_other or entry.name == "A again"
    assert state() == before


def test_no_constant_is_built_into_a_kernel() -> None:
    from numba.core.registry import CPUDispatcher

    for path, name in (key.rsplit(".", 1) for key in ablation.CONSTANTS):
        kernels = [value for value in vars(module_of(path)).values() if isinstance(value, CPUDispatcher)]
        assert not any(name in loop.py_func.__code__.co_names for loop in kernels)


def test_every_constant_of_the_controller_is_in_the_table_or_built_in() -> None:
    built_in = {"REJECTED", "SCORE_BINS", "DEPTH_CLASSES", "MOST_SURE", "LEAST_COUNTED", "LEAST_LIKELY", "MAX_SOURCES"}
    for path in ("budget", "budgeting.ledger", "budgeting.pass_times", "drafting", "drafters.merged"):
        text = Path(module_of(path).__file__).read_text("utf-8")
        found = set(re.findall(r"^([A-Z_]+) = -?[\d.]", text, re.M))
        assert found - built_in == {key.rsplit(".", 1)[1] for key in ablation.CONSTANTS if key.startswith(f"{path}.")}


def test_settings_do_not_learn_from_each_other() -> None:
    usual = {key: getattr(module_of(key[0]), key[1]) for key in ablation.LEARNED}
    with ablation.in_use({}):
        assert not any(getattr(module_of(path), name) is usual[path, name] for path, name in usual)
        assert module_of("budget").LEARNED is module_of("budgeting.profiles").LEARNED
    assert all(getattr(module_of(path), name) is usual[path, name] for path, name in usual)


def test_names_are_distinct() -> None:
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)
