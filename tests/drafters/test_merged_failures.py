"""Merged drafters: sources that fail, drafts that are drawn at random, and wrong settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import specdec
from specdec.budget import Budget
from specdec.drafters import (
    DraftContext,
    Drafter,
    DraftModelDrafter,
    LookaheadDrafter,
    MergedDrafter,
    RecyclingDrafter,
)
from specdec.drafters.base import DrafterSwitchedOffWarning
from specdec.tree import TokenTree
from tests.conformance import FailingDrafter, OracleDrafter, draft_of, reference
from tests.drafters.merging import ScriptedDrafter, context_of, paths_of, paths_tree, session_of
from tests.tiny_models import VOCAB, prompts, tiny_model

# --- sources that fail, and drawn drafts ------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "at_step"), [("start", 0), ("propose", 0), ("propose", 3), ("observe", 2)])
def test_source_that_raises_is_left_out_and_the_others_go_on(method: str, at_step: int) -> None:
    expected = reference(tiny_model(), prompts(5, 9), max_new_tokens=30, eos_token_id=None)
    failing = FailingDrafter(OracleDrafter([]), method, at_step)
    drafter = MergedDrafter([failing, OracleDrafter(expected.answers)])
    fast = specdec.accelerate(tiny_model(), drafter, budget=Budget(16, fixed=True))
    with pytest.warns(
        DrafterSwitchedOffWarning, match=rf"'failing' of the merged drafter failed in {method}\(\)"
    ) as caught:
        ids = fast.generate(**prompts(5, 9), max_new_tokens=30, eos_token_id=None)
    assert len(caught) == 1
    assert ids.tolist() == expected.ids.tolist()
    assert fast.report.drafter_error is None
    assert fast.report.num_accepted_tokens > 20
    assert fast.report.drafter_figures["failing"]["error"] == "RuntimeError: the drafter is broken"
    failing.at_step = -1
    fast.generate(**prompts(5, 9), max_new_tokens=8, eos_token_id=None)
    assert "error" not in fast.report.drafter_figures["failing"], "the next call begins with all sources"


def test_strict_raises_what_a_source_raised() -> None:
    drafter = MergedDrafter([FailingDrafter(OracleDrafter([])), RecyclingDrafter()])
    with pytest.raises(RuntimeError, match="the drafter is broken"):
        specdec.accelerate(tiny_model(), drafter, strict=True).generate(**prompts(5), max_new_tokens=20)


BAD_TREES: dict[str, tuple[Any, str]] = {
    "token": (lambda: paths_tree(9, {(VOCAB,): 0.5}), "draft tokens must be in"),
    "root": (lambda: paths_tree(8, {(1,): 0.5}), "the roots must be the rows' last tokens"),
    "parent": (lambda: TokenTree(torch.tensor([[9, 1]]), torch.tensor([[-1, 1]])), "every parent must stand before"),
    "rows": (lambda: TokenTree(torch.zeros(2, 2).long(), torch.tensor([[-1, 0]] * 2)), "a tree of"),
    "dtype": (lambda: TokenTree(torch.tensor([[9, 1]]).int(), torch.tensor([[-1, 0]]).int()), "must be int64"),
    "no tree": (lambda: None, "a TokenTree is needed"),
}


@pytest.mark.parametrize("case", BAD_TREES)
def test_a_wrong_tree_is_not_merged(case: str) -> None:
    make, message = BAD_TREES[case]

    class Wrong(Drafter):
        def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
            return make()

    session = session_of(Wrong(), ScriptedDrafter(lambda _: paths_tree(9, {(1,): 0.5})))
    with pytest.warns(DrafterSwitchedOffWarning, match=message):
        assert set(paths_of(session.propose(context_of([9]), 8))) == {(1,)}
    with pytest.raises((TypeError, ValueError), match=message):
        session_of(Wrong()).propose(context_of([9], strict=True), 8)


@pytest.mark.parametrize("verifier", ["block", "traversal"])
def test_the_first_source_that_draws_is_alone(verifier: str) -> None:
    draft = DraftModelDrafter(draft_of("llama"), growth="chain" if verifier == "block" else "dynamic", max_nodes=8)
    asked: list[int] = []

    class Late(LookaheadDrafter):
        def grow(self, *args: Any) -> int:
            asked.append(1)
            return super().grow(*args)

    drafter = MergedDrafter([draft, Late()])
    fast = specdec.accelerate(tiny_model(), drafter, verifier, strict=True, budget=Budget(8, fixed=True))
    fast.generate(**prompts(5, 9), max_new_tokens=24, do_sample=True, eos_token_id=None)
    assert not asked
    assert fast.report.guarantee == "distribution"
    assert fast.report.num_accepted_tokens > 0
    fast.generate(**prompts(5, 9), max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert asked, "greedy drafts are merged"


def test_deterministic_sources_are_merged_under_every_verifier() -> None:
    drafter = MergedDrafter([LookaheadDrafter(), RecyclingDrafter()])
    fast = specdec.accelerate(tiny_model(), drafter, "traversal", strict=True, budget=Budget(8, fixed=True))
    fast.generate(**prompts(5, 9), max_new_tokens=40, do_sample=True, eos_token_id=None)
    assert {figures["calls"] > 0 for figures in fast.report.drafter_figures.values()} == {True}


# --- settings ---------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "none": (lambda: MergedDrafter([]), ValueError, "0 drafters were given; 1 to 8"),
    "many": (
        lambda: MergedDrafter([LookaheadDrafter(shared_bytes=4096, corpus_bytes=4096) for _ in range(9)]),
        ValueError,
        "9 drafters",
    ),
    "name": (lambda: MergedDrafter(["lookahead"]), TypeError, "sources must be Drafters, got 'lookahead'"),  # type: ignore[list-item]
    "twice": (lambda: MergedDrafter([RecyclingDrafter()] * 2), ValueError, "one drafter was given twice"),
    "memory": (lambda: MergedDrafter([RecyclingDrafter()], memory=0), ValueError, "memory=0 must be at least 1"),
    "empty list": (lambda: specdec.accelerate(tiny_model(), []), ValueError, r"drafter=\[\] is empty"),
    "none in list": (lambda: specdec.accelerate(tiny_model(), ["recycling", None]), ValueError, "has None in it"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_sources_are_refused(case: str) -> None:
    make, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        make()


def test_settings_are_those_of_all_sources() -> None:
    settings = MergedDrafter([RecyclingDrafter(top_k=4), RecyclingDrafter(top_k=5)]).settings()
    assert settings["max_nodes"] == 64
    assert {name: values["top_k"] for name, values in settings["sources"].items()} == {"recycling": 4, "recycling-2": 5}
