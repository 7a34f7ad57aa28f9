"""The promise: the tokens of `model.generate`, under the same seed, and the same generator state afterwards."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from specdec.budget import Budget
from tests.conformance import DRAFT_MODELS, DRAFTERS, OracleDrafter, Reference, assert_identical, reference
from tests.tiny_models import MODELS, WINDOW, new_model, prompts, tiny_model, tiny_tokenizer

NEW_TOKENS = 24
SEEDS = 10

PROCESSORS: dict[str, dict[str, Any]] = {
    # top_k is 50 unless it is switched off
    "plain": {"top_k": 0},
    "temperature": {"temperature": 0.7, "top_k": 0},
    "top-k": {"top_k": 12},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.05, "top_k": 0},
    "repetition-penalty": {"repetition_penalty": 1.4},
    "no-repeat-ngram": {"no_repeat_ngram_size": 2},
    "min-new-tokens": {"min_new_tokens": 10, "eos_token_id": list(range(2, 40))},
    "stop-string": {"stop_strings": ["z", "9", "HJ", "ba"]},
    "several-eos": {"eos_token_id": [2, 20, 40, 60, 80], "top_k": 0},
}
SAMPLE_ONLY = {"temperature", "top-k", "top-p", "min-p"}
BATCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "single": (prompts(12), {}),
    "padded": (prompts(3, 11, 5, 12, 7), {}),
    "return-sequences": (prompts(9), {"num_return_sequences": 3}),
}


def cases() -> list[Any]:
    """Every drafter with every kind of batch, mode and processor, as far as they go together."""
    return [
        pytest.param(drafter, batch, do_sample, processor, id=f"{drafter}-{batch}-{mode}-{processor}")
        for batch in BATCHES
        for do_sample, mode in ((False, "greedy"), (True, "sampled"))
        for processor in PROCESSORS
        for drafter in DRAFTERS
        if do_sample
        or (batch != "return-sequences" and processor not in SAMPLE_ONLY and not drafter.endswith("-uncoupled"))
    ]


def call(batch: str, do_sample: bool, processor: str) -> tuple[dict[str, Any], dict[str, Any]]:
    inputs, extra = BATCHES[batch]
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": do_sample, **extra, **PROCESSORS[processor]}
    if "stop_strings" in kwargs:
        kwargs["tokenizer"] = tiny_tokenizer()
    return inputs, kwargs


@cache
def plain_decoding(batch: str, do_sample: bool, processor: str, seed: int) -> Reference:
    inputs, kwargs = call(batch, do_sample, processor)
    return reference(tiny_model(), inputs, seed, **kwargs)


@pytest.mark.parametrize(("drafter", "batch", "do_sample", "processor"), cases())
def test_same_tokens_and_generator_state(drafter: str, batch: str, do_sample: bool, processor: str) -> None:
    inputs, kwargs = call(batch, do_sample, processor)
    first = list(DRAFTERS).index(drafter) * 2  # each drafter has seeds of its own, so that each processor has ten
    # Draft models, of which there are many rows, have one seed each: they take the longest.
    for seed in range(first, first + (1 if drafter in DRAFT_MODELS else 2)) if do_sample else [0]:
        expected = plain_decoding(batch, do_sample, processor, seed % SEEDS)
        report = assert_identical(
            tiny_model(), DRAFTERS[drafter], inputs, seed=seed % SEEDS, expected=expected, **kwargs
        )
        assert report.fallback is None
        assert report.num_generated_tokens == sum(map(len, expected.answers)) or processor == "stop-string"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("drafter", ["medusa-taught", "oracle", "random-tree"])
def test_same_tokens_on_every_kind_of_attention(name: str, drafter: str) -> None:
    model = tiny_model(name)
    num_accepted = 0
    for inputs in (prompts(3 * WINDOW + 1), prompts(2 * WINDOW, 3, WINDOW - 1)):
        for do_sample in (False, True):
            kwargs = {"max_new_tokens": 3 * WINDOW, "do_sample": do_sample}
            report = assert_identical(model, DRAFTERS[drafter], inputs, seed=3, **kwargs)
            assert report.capability == "tree"
            num_accepted += report.num_accepted_tokens
    assert num_accepted > 20


@pytest.mark.parametrize("drafter", ["draft-model", "lookahead", "medusa-taught", "oracle", "random-tree"])
def test_same_tokens_under_the_adaptive_budget(drafter: str) -> None:
    for seed in range(3):
        assert_identical(
            tiny_model(),
            DRAFTERS[drafter],
            prompts(5, 9, 12),
            seed=seed,
            budget=Budget(16),
            max_new_tokens=32,
            do_sample=seed > 0,
        )


@pytest.mark.parametrize("drafter", ["draft-model", "lookahead", "medusa-taught", "random-tree"])
def test_same_tokens_over_512_tokens(drafter: str) -> None:
    report = assert_identical(
        tiny_model(), DRAFTERS[drafter], prompts(10), max_new_tokens=512, eos_token_id=None, do_sample=True
    )
    assert report.num_generated_tokens == 512
    assert report.num_target_passes < 512


def test_same_tokens_after_the_drafter_has_seen_earlier_calls() -> None:
    drafter = DRAFTERS["lookahead"]([])
    reports = [
        assert_identical(tiny_model(), drafter, prompts(8), max_new_tokens=32, do_sample=True, seed=seed)
        for seed in (0, 1, 0)
    ]
    assert reports[2].num_target_passes < reports[0].num_target_passes / 2


@pytest.mark.parametrize("batch", ["single", "padded"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_oracle_is_accepted_whole(batch: str, do_sample: bool) -> None:
    inputs, kwargs = call(batch, do_sample, "plain")
    report = assert_identical(tiny_model(), lambda answers: OracleDrafter(answers, decoys=False), inputs, **kwargs)
    assert report.num_draft_tokens > 0
    assert report.num_accepted_tokens == report.num_draft_tokens
    assert report.num_accepted_tokens + report.num_row_passes == report.num_generated_tokens


@pytest.mark.parametrize("do_sample", [False, True])
def test_right_path_is_found_among_decoys(do_sample: bool) -> None:
    inputs, kwargs = call("padded", do_sample, "plain")
    report = assert_identical(tiny_model(), DRAFTERS["oracle"], inputs, **kwargs)
    most = 3 * report.num_accepted_tokens
    # Of the last tree of a row, a decoy beyond the length limit is left out.
    assert most - len(inputs["input_ids"]) <= report.num_draft_tokens <= most
    assert report.num_accepted_tokens_per_pos[4] > 0
    assert report.num_accepted_tokens + report.num_row_passes == report.num_generated_tokens


@pytest.mark.parametrize("do_sample", [False, True])
def test_wrong_drafts_cost_no_token(do_sample: bool) -> None:
    inputs, kwargs = call("padded", do_sample, "plain")
    report = assert_identical(tiny_model(), DRAFTERS["always-wrong"], inputs, **kwargs)
    assert report.num_draft_tokens > 0
    assert report.num_accepted_tokens == 0
    assert report.num_row_passes == report.num_generated_tokens


def test_random_trees_are_accepted_in_part() -> None:
    inputs, kwargs = call("padded", True, "plain")
    report = assert_identical(tiny_model(), DRAFTERS["random-tree"], inputs, **kwargs)
    assert 0 < report.num_accepted_tokens < report.num_draft_tokens
    assert report.num_accepted_tokens_per_pos[0] < report.num_drafts, "some drafts are rejected at once"


@pytest.mark.parametrize("drafter", DRAFT_MODELS)
def test_drafts_of_a_model_are_accepted_in_part(drafter: str) -> None:
    inputs, kwargs = call("padded", True, "temperature")
    report = assert_identical(tiny_model(), DRAFTERS[drafter], inputs, seed=1, **kwargs)
    assert 0 < report.num_accepted_tokens < report.num_draft_tokens
    assert len(report.num_accepted_tokens_per_pos) > 1, "drafts are followed to their second level"


def test_a_prompt_of_one_token() -> None:
    for drafter in DRAFTERS.values():
        assert_identical(tiny_model(), drafter, prompts(1), max_new_tokens=12, do_sample=True)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3])
def test_fewer_tokens_than_a_tree_is_deep(max_new_tokens: int) -> None:
    for drafter in DRAFTERS.values():
        assert_identical(tiny_model(), drafter, prompts(4, 6), max_new_tokens=max_new_tokens, do_sample=True)


def test_generation_up_to_the_last_position_of_the_model() -> None:
    model = new_model("gpt2", n_positions=24)
    for drafter in DRAFTERS.values():
        report = assert_identical(model, drafter, prompts(4, 8), max_new_tokens=16, eos_token_id=None)
        assert report.fallback is None
