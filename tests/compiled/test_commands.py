"""The flags of the commands that compile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from specdec.cli import app
from tests.compiled.builders import built_by, uncompiled
from tests.test_cli import PROMPT, completion, save_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "target", layers=1, seed=0)


def test_generate(folder: Path) -> None:
    args = ["--model", folder, "--drafter", "lookahead", "--max-new-tokens", 12, "--report", "json", "--compiled"]
    with built_by(uncompiled) as built:
        result = CliRunner().invoke(app, ["generate", PROMPT, *map(str, args)])
    assert result.exit_code == 0, result.output
    assert result.stdout == completion(folder, max_new_tokens=12, do_sample=False) + "\n"
    assert json.loads(result.stderr)["compiled"].startswith("yes") and len(built) == 1


def test_bench(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler() -> None:
        raise RuntimeError("no compiler in tests")

    monkeypatch.setattr("specdec.benchmark.methods.CompileConfig", no_compiler)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPT)
    args = ["bench", "--model", folder, "--prompts", prompts, "--limit", 1, "--tokens", 4, "--temperature", 0]
    args += ["--drafter", "lookahead", "--compiled", "--json", tmp_path / "out.json"]
    with built_by(uncompiled) as built:
        result = CliRunner().invoke(app, list(map(str, args)))
    assert result.exit_code == 0, result.output
    methods = json.loads((tmp_path / "out.json").read_text())["parts"]["greedy"]["methods"]
    assert {"specdec off, compiled", "specdec lookahead, compiled"} <= {row["method"] for row in methods}
    assert len(built) == 1
