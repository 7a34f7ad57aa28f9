"""A profile lets a new process start where the last one ended; one that does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import specdec
from specdec import budget as budget_module
from specdec.budgeting import pass_times as step_times
from specdec.budgeting import profiles
from specdec.drafters import LookaheadDrafter, MergedDrafter, RecyclingDrafter
from tests.conformance import reference
from tests.tiny_models import new_model, prompts


def as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    times, learned = type(step_times.TIMES)(), type(budget_module.LEARNED)()
    for module in (step_times, profiles):
        monkeypatch.setattr(module, "TIMES", times)
    for module in (budget_module, profiles):
        monkeypatch.setattr(module, "LEARNED", learned)


def tuned(model: Any) -> specdec.SpeculativeModel:
    fast = specdec.accelerate(model, "auto", strict=True, max_nodes=8)
    fast.tune([prompts(9), prompts(4)["input_ids"][0].tolist()], max_new_tokens=30, eos_token_id=None)
    return fast


def test_tuning_measures_with_and_without_drafts_and_leaves_the_generator_alone() -> None:
    fast = specdec.accelerate(new_model("llama"), "auto", strict=True, max_nodes=8)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = fast.tune([prompts(9), prompts(4)], max_new_tokens=30, do_sample=True, eos_token_id=None)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.tokens == 60
    assert found.speedup > 0
    assert 1 <= found.tokens_per_pass <= 30


def test_a_new_process_starts_where_the_last_one_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = new_model("llama"), tmp_path / "profiles" / "code.json"
    first = tuned(model)
    first.save_profile(file, text="code")
    learned, drafter, before = first.speculation.budget.learned, first.drafter, step_times.TIMES[model]
    as_in_a_new_process(monkeypatch)
    same = new_model("llama")
    second = specdec.accelerate(same, "auto", strict=True, max_nodes=8)
    assert second.load_profile(file) == "code"
    assert isinstance(drafter, MergedDrafter) and isinstance(second.drafter, MergedDrafter)
    assert np.array_equal(second.drafter._known[False].tried, drafter._known[False].tried)
    assert second.drafter._known[False].state_dict() == drafter._known[False].state_dict()
    mine, theirs = (merged.sources[1] for merged in (second.drafter, drafter))
    assert isinstance(mine, RecyclingDrafter) and isinstance(theirs, RecyclingDrafter)
    assert np.array_equal(mine._counts.tried, theirs._counts.tried)
    known = {at: times.known()[1].tolist() for at, times in step_times.TIMES[same].items()}
    assert known == {at: times.known()[1].tolist() for at, times in before.items()}
    monkeypatch.setattr(budget_module.Budget, "observe", lambda *_: None)
    monkeypatch.setattr(budget_module, "IDLE_DECAY", 1.0)
    expected = reference(same, prompts(9), max_new_tokens=20, eos_token_id=None)
    assert second.generate(**prompts(9), max_new_tokens=20, eos_token_id=None).tolist() == expected.ids.tolist()
    assert np.array_equal(second.speculation.budget.learned.tried, learned.tried)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    model, file = new_model("llama"), tmp_path / "profile.json"
    fast = tuned(model)
    fast.save_profile(file)
    whole = file.read_text()
    changed = json.loads(whole)
    changed["body"]["learned"][0]["tried"][0] += 1
    for content, message in (
        (whole[: len(whole) // 2], "is damaged or no profile"),
        (json.dumps(changed), "does not match its checksum"),
        (json.dumps(json.loads(whole) | {"version": 99}), "has version 99"),
        ("{}", "is not a specdec profile"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            fast.load_profile(file)
    file.write_text(whole)
    for other, message in (
        (specdec.accelerate(new_model("gpt2"), "auto", max_nodes=8), "model 'LlamaForCausalLM' there"),
        (specdec.accelerate(new_model("llama", rms_norm_eps=0.1), "auto", max_nodes=8), "config '"),
        (specdec.accelerate(model, "recycling"), "drafter 'AutoDrafter' there, 'RecyclingDrafter' here"),
        (specdec.accelerate(model, ["auto", LookaheadDrafter(max_depth=3)]), "settings '"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_profile(file)
    assert fast.load_profile(file) == ""


@pytest.mark.parametrize(("given", "error"), [([], ValueError), ("text", ValueError), (["text"], TypeError)])
def test_wrong_prompts_are_refused(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="prompts must be"):
        specdec.accelerate(new_model("llama"), "auto").tune(given)
