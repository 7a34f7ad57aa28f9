"""deterministic=True: trees follow from the call's text alone, whatever the clock says and earlier calls taught."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch

import specdec
from specdec.decoding import Decoder
from specdec.drafters import DraftModelDrafter, LookaheadDrafter, SpecReasonDrafter
from specdec.tree import TokenTree
from tests.conformance import reference
from tests.drafters.test_spec_reason_settings import draft_of
from tests.tiny_models import new_model, prompts

KWARGS: dict[str, Any] = {"max_new_tokens": 48, "eos_token_id": None}


@pytest.fixture
def trees(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Every tree that is verified."""
    seen: list[tuple[Any, Any]] = []
    right = Decoder._propose

    def propose(self: Decoder) -> TokenTree:
        tree = right(self)
        seen.append((tree.tokens.tolist(), tree.parents.tolist()))
        return tree

    monkeypatch.setattr(Decoder, "_propose", propose)
    return seen


def with_random_clock(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    generator, now = random.Random(seed), [0.0]

    def clock() -> float:
        now[0] += generator.choice([1e-6, 1e-3, 1.0, 30.0])
        return now[0]

    monkeypatch.setattr(time, "perf_counter", clock)


def drafters(answer: list[int]) -> dict[str, Any]:
    lookahead = LookaheadDrafter()
    lookahead.add([answer])
    return {
        "auto": "auto",
        "lookahead": lookahead,
        "recycling": "recycling",
        "draft-model": draft_of("llama"),
        "merged": ["auto", draft_of("llama")],
    }


@pytest.mark.parametrize("name", ["auto", "lookahead", "recycling", "draft-model", "merged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_call_verifies_the_same_trees(
    name: str, dtype: torch.dtype, trees: list[tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_model("llama").to(dtype)
    answer = reference(model, prompts(9), **KWARGS).answers[0]
    runs, outputs = [], []
    for seed, earlier_calls in ((1, 0), (2, 3)):
        with_random_clock(monkeypatch, seed)
        fast = specdec.accelerate(model, drafters(answer)[name], strict=True, capability="tree", deterministic=True)
        for length in range(earlier_calls):
            fast.generate(**prompts(5 + length), **KWARGS)
        trees.clear()
        outputs.append(fast.generate(**prompts(9), **KWARGS).tolist())
        runs.append(list(trees))
    assert runs[0] == runs[1]
    assert outputs[0] == outputs[1]
    assert any(len(tokens[0]) > 1 for tokens, _ in runs[0]), "something was drafted"


def test_a_call_after_others_that_were_not_deterministic_is_the_same(trees: list[tuple[Any, Any]]) -> None:
    model, runs = new_model("llama"), []
    for is_taught in (False, True):
        if is_taught:
            specdec.accelerate(model, "auto", capability="tree").generate(**prompts(9), **KWARGS)
        fast = specdec.accelerate(model, "auto", strict=True, capability="tree", deterministic=True)
        trees.clear()
        fast.generate(**prompts(9), **KWARGS)
        runs.append(list(trees))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("do_sample", [False, True])
def test_tokens_are_those_of_generate(do_sample: bool) -> None:
    model, inputs = new_model("llama"), prompts(9, 4)
    expected = reference(model, inputs, do_sample=do_sample, **KWARGS)
    fast = specdec.accelerate(model, "auto", strict=True, deterministic=True)
    torch.manual_seed(0)
    assert fast.generate(**inputs, do_sample=do_sample, **KWARGS).tolist() == expected.ids.tolist()
    assert fast.report.drafter == "auto" and fast.report.num_target_passes > 1
    fast.explain()


def test_the_corpus_and_a_predicted_output_are_part_of_the_call() -> None:
    model, inputs = new_model("llama"), prompts(9)
    answer = reference(model, inputs, **KWARGS).answers[0]
    for scope in ("corpus", "request"):
        drafter = LookaheadDrafter()
        drafter.add([answer], scope=scope)
        fast = specdec.accelerate(model, drafter, strict=True, deterministic=True)
        fast.generate(**inputs, **KWARGS)
        assert fast.report.num_target_passes < 40, scope
    fast = specdec.accelerate(model, LookaheadDrafter(), strict=True, deterministic=True)
    counts = []
    for _ in range(2):
        fast.generate(**inputs, **KWARGS)
        counts.append(fast.report.num_target_passes)
    assert counts[0] == counts[1], "the last call's output is not looked up"


def test_what_goes_by_the_clock_is_refused() -> None:
    for drafter in (DraftModelDrafter(draft_of("llama"), pipelined=True), SpecReasonDrafter(draft_of("llama"))):
        with pytest.raises(ValueError, match="cannot be used with deterministic=True"):
            drafter.fresh()
    with pytest.raises(ValueError, match="compiled='auto' cannot be used with deterministic=True"):
        specdec.accelerate(new_model("llama"), compiled="auto", deterministic=True)
