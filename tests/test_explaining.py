"""`explain()` says in words and figures what is used, at what size and why, and what each source has earned."""

from __future__ import annotations

from typing import Any

import pytest

import specdec
from specdec.budget import Budget
from specdec.budgeting import pass_times as step_times
from specdec.budgeting.pass_times import StepTimes
from specdec.drafters import MergedDrafter, RecyclingDrafter
from specdec.tree import NODE_BUCKETS
from tests.conformance import AlwaysWrongDrafter, FailingDrafter, OracleDrafter, reference
from tests.tiny_models import new_model, prompts, tiny_model

KWARGS: dict[str, Any] = {"max_new_tokens": 40, "eos_token_id": None}


def explained(fast: specdec.SpeculativeModel, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    fast.explain()
    return capsys.readouterr().out


def test_sources_sizes_and_reasons_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_times, "first_seconds", lambda *_: {n: 0.01 if n <= 8 else 0.02 for n in NODE_BUCKETS})
    monkeypatch.setattr(StepTimes, "update", lambda self, nodes, seconds: None)
    model = new_model("llama")
    answers = reference(model, prompts(8), **KWARGS).answers
    fast = specdec.accelerate(model, [OracleDrafter(answers, decoys=False), "recycling"], strict=True)
    assert "known after the first generate()" in explained(fast, capsys)
    fast.generate(**prompts(8), **KWARGS)
    text = explained(fast, capsys)
    assert "drafter 'merged', verifier 'exact': output is token-identical to that of generate()" in text
    assert f"last call: 40 tokens in {fast.report.num_row_passes} passes" in text
    assert "the target was run on trees" in text
    assert "size: decisions by number of nodes so far (1 is no draft): " in text
    assert "1 in 10.00 ms = 100 tokens/s without a draft" in text
    assert "source 'oracle': asked" in text
    assert "source 'recycling': asked" in text


def test_no_draft_is_told_with_its_reason(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_times, "first_seconds", lambda *_: {n: 0.01 if n == 1 else 0.9 for n in NODE_BUCKETS})
    monkeypatch.setattr(StepTimes, "update", lambda self, nodes, seconds: None)
    model = new_model("llama")
    answers = reference(model, prompts(8), **KWARGS).answers
    fast = specdec.accelerate(model, AlwaysWrongDrafter(answers), strict=True)
    fast.generate(**prompts(8), **KWARGS)
    assert "nodes promised more than 1 in " in explained(fast, capsys)


@pytest.mark.parametrize(
    ("attention", "words"),
    [
        ("auto", "the model's own (sdpa); on a CPU nothing else is tried"),
        ("sdpa", "sdpa; demanded by attention='sdpa'"),
    ],
)
def test_attention_is_told_with_its_reason(attention: Any, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    fast = specdec.accelerate(tiny_model(), "lookahead", attention=attention)
    fast.generate(**prompts(8), max_new_tokens=4)
    assert f"attention over trees: {words}" in explained(fast, capsys)


def test_errors_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    failing = FailingDrafter(OracleDrafter([]), at_step=1)
    for drafter, message in (
        (failing, "the drafter was switched off: RuntimeError: the drafter is broken"),
        (MergedDrafter([failing, RecyclingDrafter()]), "left out after RuntimeError: the drafter is broken"),
    ):
        failing.calls.clear()
        fast = specdec.accelerate(tiny_model(), drafter, budget=Budget(8, fixed=True))
        with pytest.warns(RuntimeWarning):
            fast.generate(**prompts(8), **KWARGS)
        text = explained(fast, capsys)
        assert message in text
        assert "up to 8 nodes, because the budget is fixed" in text


def test_drafting_off_and_fallbacks_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    fast = specdec.accelerate(tiny_model(), None)
    fast.generate(**prompts(8), max_new_tokens=4)
    assert explained(fast, capsys).startswith("no drafter, verifier 'exact'")
    with pytest.warns(UserWarning, match="without speculation"):
        fast.generate(**prompts(8), max_new_tokens=4, num_beams=2)
    assert "done by the model's own generate(), because the decoding method is beam search" in explained(fast, capsys)
