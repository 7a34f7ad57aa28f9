"""The benchmark of reasoning: a limit on the thought is the same for all, figures add up."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

from specdec.benchmark.runs import Measurement, Sample, Settings

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("bench_reasoning", "task", "judging")


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    for folder in ("benchmarks", "examples/reasoning"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("bench_reasoning")
    for name in ("RESULTS", "PICTURES"):
        monkeypatch.setattr(module, name, tmp_path)
    yield module
    for name in NAMES:
        sys.modules.pop(name, None)


def test_a_thought_is_ended_behind_its_budget_and_no_sooner(benchmark_module: ModuleType) -> None:
    end = benchmark_module.EndOfThought(prompt_length=2, budget=3, end=7)
    scores = torch.randn(1, 10)
    assert end(torch.tensor([[7, 1, 2, 3]]), scores) is scores  # an end within the prompt is none of the thought
    forced = end(torch.tensor([[7, 1, 2, 3, 4]]), scores)
    assert forced.argmax().item() == 7
    assert forced.isinf().sum() == 9
    assert end(torch.tensor([[0, 1, 2, 7, 4]]), scores) is scores
    assert end(torch.tensor([[0, 1, 2, 3, 4, 7, 5]]), scores) is scores


def sample(
    method: str, prompt: str, seconds: float, output: list[int], figures: dict[str, int] | None = None
) -> Sample:
    report = None if figures is None else {"drafter_figures": figures}
    made = Sample(method, prompt, 0, [output], len(output), seconds, 0.0, 4, report=report)
    made.identical_rows = [method == "HF generate"]
    return made


class Words:
    """Decodes token n to what it was made of."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(self.texts[i] for i in ids)


def test_figures_of_methods(benchmark_module: ModuleType, tmp_path: Path) -> None:
    words = Words(["</think>\n\nThe result is 46.", "</think>\n\nThe result is 51."])
    figures = {"judged": 4, "kept": 3, "question_tokens": 20, "salvaged_tokens": 2}
    measured = Measurement("HF generate", Settings.of(8))
    for prompt in ("0", "1"):
        measured.samples.append(sample("HF generate", prompt, 2.0, [0]))
        measured.samples.append(sample("SpecReason 7", prompt, 1.0, [int(prompt)], figures))
    rows = benchmark_module.rows_of(measured, {"0": 46, "1": 46}, words)
    plain, reasoned = rows
    assert (plain["accuracy"], reasoned["accuracy"]) == (1.0, 0.5)
    assert (plain["speedup"], reasoned["speedup"]) == (1.0, 2.0)
    assert (plain["kept_share"], reasoned["kept_share"]) == (None, 0.75)
    assert (plain["num_identical"], reasoned["num_identical"]) == (2, 0)
    assert reasoned["seconds_quartiles"] == [1.0, 1.0]
    assert benchmark_module.table(rows, "title").row_count == 2
    benchmark_module.plot({"unlimited": rows}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_all_methods_are_measured(benchmark_module: ModuleType, tmp_path: Path) -> None:
    result = CliRunner().invoke(benchmark_module.app, ["--problems", "2", "--threads", "1"])
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "reasoning.json").read_text())
    assert set(results["parts"]) == {"unlimited", "budget"}
    exact = {"HF generate", "specdec off", "lookahead", "draft model"}
    for rows in results["parts"].values():
        for row in rows:
            assert len(row["seconds_quartiles"]) == 2
            if row["method"] in exact:
                assert row["num_identical"] == 2
