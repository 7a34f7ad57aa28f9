"""The benchmark of the GPU's step runs anywhere, and its model and drafts are what they are said to be."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
SESSION = ROOT / "benchmarks" / "gpu_session.sh"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("bench_gpu_step")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_counts(module: ModuleType, dtype: torch.dtype) -> None:
    preset = module.PRESETS["tiny"]
    model = module.counting_model(preset, torch.device("cpu")).to(dtype)
    ids = module.prompt(2, 20, 512, torch.device("cpu"))
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
    assert torch.equal(out[:, 20:], (ids[:, -1:] + torch.arange(1, 31)) % 512)


def test_all_parts(module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What transformers compiles has no place in a test.
    monkeypatch.setattr(module, "hf_compiled", lambda model: module.hf_generate(model))
    arguments = ["--preset", "tiny", "--device", "cpu", "--cuda-graphs", "eager", "--output", str(tmp_path)]
    result = CliRunner().invoke(module.app, arguments)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "gpu_step_tiny.json").read_text())
    assert {"commit", "hardware", "versions", "limits", *module.PARTS} <= set(written)
    for row in written["accept"]:
        assert not any("failed" in of for of in row["methods"].values()), row
        for wanted, reached in row["tokens_per_pass"].items():
            # The prefill's pass gives one token, and the last pass may be cut short.
            assert float(wanted) * 0.6 < reached <= float(wanted), (wanted, reached)
    for row in written["off"]:
        assert set(row["methods"]) == {"specdec off", "HF generate", "HF compiled"}
        assert all(of["of_copy_bandwidth"] > 0 for of in row["methods"].values())
    assert [row["batch"] for row in written["batches"]] == [1, 2]


def session(folder: Path, python: str, *parts: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": python}
    return subprocess.run(["bash", str(SESSION), str(folder), *parts], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("python", "status"), [("true", "status   0"), ("false", "status   1")])
def test_a_part_of_a_session_that_fails_costs_no_other(python: str, status: str, tmp_path: Path) -> None:
    done = session(tmp_path / "new", python)
    assert done.returncode == 0, done.stderr
    summary = (tmp_path / "new" / "summary.txt").read_text().splitlines()
    parts = ["smoke", "kernels", "off", "step", "tests", "accept", "batches", "pair", "bench"]
    assert [line.split()[0] for line in summary] == parts
    assert all(status in line for line in summary)
    assert all((tmp_path / "new" / f"{part}.log").exists() for part in parts)


def test_parts_of_a_session_are_named(tmp_path: Path) -> None:
    assert session(tmp_path, "true", "off", "bench").returncode == 0
    assert len((tmp_path / "summary.txt").read_text().splitlines()) == 2
    assert "No such part: of" in session(tmp_path, "true", "of").stderr


def test_what_was_measured_is_written_before_the_next_row(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_short(*args: object) -> object:
        yield {"batch": 1, "methods": {"specdec off": {"tokens_per_second": 1.0}}}
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "batches", cut_short)
    arguments = ["--preset", "tiny", "--device", "cpu", "--part", "batches", "--output", str(tmp_path)]
    assert CliRunner().invoke(module.app, arguments).exit_code != 0
    assert len(json.loads((tmp_path / "gpu_step_tiny.json").read_text())["batches"]) == 1
