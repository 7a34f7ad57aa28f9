"""Figures that stand in the docs are those of the code."""

from __future__ import annotations

import re
import runpy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from specdec.drafters import (
    DRAFTERS,
    DraftModelDrafter,
    LookaheadDrafter,
    MedusaDrafter,
    MergedDrafter,
    RecyclingDrafter,
    SpecReasonDrafter,
)
from specdec.drafters.base import Drafter
from specdec.verifiers import VERIFIERS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("drafter", "page"),
    [
        (LookaheadDrafter, "lookahead"),
        (MedusaDrafter, "medusa"),
        (DraftModelDrafter, "draft_models"),
        (RecyclingDrafter, "recycling"),
        (SpecReasonDrafter, "spec_reason"),
        (MergedDrafter, "merged"),
    ],
)
def test_settings_are_all_listed_with_their_defaults(drafter: Any, page: str) -> None:
    text = (ROOT / f"docs/{page}.md").read_text()
    table = dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", text, re.MULTILINE))
    defaults = {field.name: str(field.default) for field in fields(drafter) if field.init}
    assert table == {name: default.replace("\n", "\\n") for name, default in defaults.items()}


def test_every_drafter_stands_in_the_method_table() -> None:
    readme = (ROOT / "README.md").read_text()
    for drafter in set(DRAFTERS.values()):
        assert issubclass(drafter, Drafter)
        assert f"`{drafter.__module__.removeprefix('specdec.').replace('.', '/')}.py`" in readme


def test_every_verifier_stands_in_the_docs_with_its_promise() -> None:
    text = (ROOT / "docs/verifiers.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| `([\w/]+)\.py` \| ([\w-]+) \|", text, re.MULTILINE)
    assert {row[0]: row[1:] for row in rows} == {
        name: (verifier.__module__.removeprefix("specdec.").replace(".", "/"), verifier.guarantee)
        for name, verifier in VERIFIERS.items()
    }


def test_quickstart_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples/quickstart.py"))
    assert "identical to model.generate: True" in capsys.readouterr().out
