"""`drafter="auto"` merges what can be had for nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import specdec
from specdec.budget import Budget
from specdec.drafters import AutoDrafter, LookaheadDrafter, MedusaDrafter, RecyclingDrafter
from specdec.drafters.base import DrafterSwitchedOffWarning
from specdec.drafters.medusa import FOLDER
from specdec.tree import NODE_BUCKETS
from tests.conformance import assert_identical, draft_of, random_heads
from tests.tiny_models import new_model, prompts, tiny_model


def names(fast: specdec.SpeculativeModel) -> list[str]:
    assert isinstance(fast.drafter, AutoDrafter)
    return [source.name for source in fast.drafter.sources]


def model_in(folder: Path, with_heads: bool) -> Any:
    """A model that was loaded from a folder, as far as anybody can tell."""
    model = new_model("llama")
    model.config._name_or_path = str(folder)
    if with_heads:
        random_heads(model).save_pretrained(folder / FOLDER)
    return model


def test_it_is_the_default() -> None:
    assert names(specdec.accelerate(tiny_model())) == ["lookahead", "recycling"]
    assert isinstance(specdec.speculate().drafter, AutoDrafter)


@pytest.mark.parametrize("do_sample", [False, True])
def test_same_tokens_under_the_adaptive_budget(do_sample: bool) -> None:
    for inputs in (prompts(10), prompts(3, 11, 5)):
        kwargs = {"max_new_tokens": 60, "do_sample": do_sample, "eos_token_id": None}
        assert_identical(tiny_model(), "auto", inputs, budget=Budget(16), **kwargs)


def test_heads_in_the_models_folder_join(tmp_path: Path) -> None:
    model = model_in(tmp_path, with_heads=True)
    fast = specdec.accelerate(model, strict=True, budget=Budget(16, fixed=True))
    assert names(fast) == ["lookahead", "recycling", "medusa"]
    report = assert_identical(model, "auto", prompts(9), max_new_tokens=12)
    assert report.drafter_figures["medusa"]["proposed"] > 0
    drafter = fast.drafter
    assert drafter is not None
    assert drafter.needs_hidden_states
    drafter.bind(tiny_model())
    assert names(fast) == ["lookahead", "recycling"]
    assert not drafter.needs_hidden_states


def test_heads_that_cannot_be_used_are_left_out_with_a_warning(tmp_path: Path) -> None:
    model = model_in(tmp_path, with_heads=False)
    (tmp_path / FOLDER).mkdir()
    with pytest.warns(DrafterSwitchedOffWarning, match="the heads in the model's folder are left out: "):
        fast = specdec.accelerate(model, strict=True)
    assert names(fast) == ["lookahead", "recycling"]
    assert fast.generate(**prompts(5), max_new_tokens=4).shape == (1, 9)


def test_other_drafters_join_in_a_list() -> None:
    fast = specdec.accelerate(tiny_model(), ["auto", draft_of("llama")])
    assert names(fast) == ["lookahead", "recycling", "draft-model"]


def test_a_drafter_of_the_same_kind_takes_the_place_of_its_own(tmp_path: Path) -> None:
    model = model_in(tmp_path, with_heads=True)
    mine, medusa = LookaheadDrafter(max_depth=3), MedusaDrafter(random_heads(model))
    fast = specdec.accelerate(model, ["auto", mine, medusa])
    assert names(fast) == ["recycling", "lookahead", "medusa"]
    assert isinstance(fast.drafter, AutoDrafter)
    assert fast.drafter.sources[1:] == [mine, medusa]
    assert isinstance(fast.drafter.sources[0], RecyclingDrafter)


def test_text_without_a_pattern_makes_drafting_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device where each node costs a pass nothing is drafted, whatever the sources promise."""
    from specdec.budgeting import pass_times as step_times
    from specdec.budgeting.pass_times import StepTimes

    monkeypatch.setattr(step_times, "first_seconds", lambda *_: {n: n / 100 for n in NODE_BUCKETS})
    monkeypatch.setattr(StepTimes, "update", lambda self, nodes, seconds: None)
    budget = Budget(64)
    kwargs = {"max_new_tokens": 100, "do_sample": True, "temperature": 5.0, "eos_token_id": None}
    report = assert_identical(new_model("llama"), "auto", prompts(10), budget=budget, **kwargs)
    assert report.num_drafts == 0
    assert set(budget.sizes) == {1}
