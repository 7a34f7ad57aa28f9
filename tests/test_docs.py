"""Figures that stand in the docs are those of the code."""

from __future__ import annotations

import re
import runpy
from dataclasses import fields
from pathlib import Path

import pytest

from specdec.drafters import DRAFTERS, LookaheadDrafter
from specdec.drafters.base import Drafter

ROOT = Path(__file__).parents[1]


def test_lookahead_settings_are_all_listed_with_their_defaults() -> None:
    table = dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", (ROOT / "docs/lookahead.md").read_text(), re.MULTILINE))
    assert table == {field.name: str(field.default) for field in fields(LookaheadDrafter) if field.init}


def test_every_drafter_stands_in_the_method_table() -> None:
    readme = (ROOT / "README.md").read_text()
    for drafter in set(DRAFTERS.values()):
        assert issubclass(drafter, Drafter)
        assert f"`{drafter.__module__.removeprefix('specdec.').replace('.', '/')}.py`" in readme


def test_quickstart_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples/quickstart.py"))
    assert "identical to model.generate: True" in capsys.readouterr().out
