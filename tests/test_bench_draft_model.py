"""The benchmark of the draft model: its figures add up, and it leaves everything as it was."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

from specdec.benchmark.measuring import EncodedPrompt, Settings
from specdec.drafters.small_model.lists import DraftLists
from specdec.drafters.small_model.session import DraftModelSession
from tests.compiled.builders import built_by, uncompiled
from tests.conformance import draft_of
from tests.test_cli import PROMPT, save_model
from tests.tiny_models import prompts, tiny_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("bench_draft_model")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


@pytest.fixture(autouse=True)
def without_a_compiler() -> Iterator[None]:
    """What would be compiled runs as it is."""
    with built_by(uncompiled):
        yield


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("growth", ["chain", "dynamic"])
def test_split_of_the_drafting_time(benchmark_module: ModuleType, growth: str, compiled: bool) -> None:
    draft = draft_of("llama")
    untouched = (DraftModelSession.propose, DraftLists.make, vars(draft).get("forward"))
    encoded = [EncodedPrompt(str(i), prompts(9, seed=i)["input_ids"]) for i in range(2)]
    split = benchmark_module.profile(
        benchmark_module.growing(growth, compiled), draft, tiny_model(), encoded, Settings.of(16, do_sample=True)
    )
    assert (DraftModelSession.propose, DraftLists.make, vars(draft).get("forward")) == untouched
    assert sum(split["share"].values()) == pytest.approx(1.0)
    assert split["share_outside_forwards"] == pytest.approx(1.0 - split["share"]["forwards"])
    assert split["prompt_ms_per_call"] > 0
    assert split["num_forwards"] >= split["num_drafts"] > 0
    assert all(split["share"][part] > 0 for part in ("forwards", "masks and cache", "lists", "tree", "rest"))


def test_time_of_inner_parts_counts_once(benchmark_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    draft_profile = importlib.import_module("draft_profile")
    now = [0.0]
    monkeypatch.setattr(draft_profile, "perf_counter", lambda: now[0])
    split = draft_profile.Split(torch.device("cpu"))

    def take(seconds: float) -> None:
        now[0] += seconds

    inner = split.timed("forwards", lambda: take(3))
    outer = split.timed("rest", lambda: (take(1), inner(), inner()))
    whole = split.timed("prompt", lambda: (take(5), inner()))
    outer()
    whole()
    outer()
    assert split.calls == {"forwards": 4, "rest": 2, "prompt": 1}
    assert split.seconds == {"forwards": 12, "rest": 2, "prompt": 8}


def test_benchmark_writes_all_its_tables(
    benchmark_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark_module.CompiledGenerate, "prepare", lambda self: self.model)
    target = save_model(tmp_path / "target", layers=2, seed=0)
    draft = save_model(tmp_path / "draft", layers=1, seed=1)
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{PROMPT} + {i}"}) + "\n" for i in range(3)))
    args = ["--model", target, "--draft-model", draft, "--prompt-file", file, "--prompts", 1, "--tuning-prompts", 1]
    result = CliRunner().invoke(benchmark_module.app, [str(arg) for arg in [*args, "--tokens", 6, "--compile"]])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "draft_model.json").read_text())
    assert set(written["parts"]) == {"greedy", "sampled", "distribution"}
    rows = {part: {row["method"]: row for row in figures["methods"]} for part, figures in written["parts"].items()}
    exact = {"draft model, chain", "draft model, dynamic"}
    compiled = {f"{growth}, {which}" for growth in ("chain", "dynamic") for which in ("compiled", "both compiled")}
    exact |= compiled | {"HF generate, compiled", "specdec off, compiled"}
    assert exact | {"HF generate", "HF assisted", "HF assisted, best setting"} < set(rows["greedy"])
    assert exact | {"chain, uncoupled", "dynamic, uncoupled"} < set(rows["sampled"])
    for part in ("greedy", "sampled"):
        assert all(row["num_identical"] == row["num_runs"] for name, row in rows[part].items() if "HF" not in name)
        assert written["hf_assisted_settings"][part]["best"]["num_assistant_tokens"] in benchmark_module.ASSISTED_TOKENS
        assert set(written["profile"][part]) == {*benchmark_module.GROWTHS, "chain, compiled", "dynamic, compiled"}
    assert set(rows["distribution"]) == {"HF generate", "chain, block", "dynamic, traversal"}
    acceptance = written["acceptance"]["sampled"]
    assert {counts["guarantee"] for name, counts in acceptance.items() if name in rows["distribution"]} == {
        "distribution"
    }
    assert {counts["guarantee"] for name, counts in acceptance.items() if name in exact} == {"token-identical"}
