"""The promise on a GPU: the same identity in fp32; in bf16 a difference at a near-tie only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import specdec
from specdec.budget import Budget
from specdec.tree import NODE_BUCKETS
from tests.conformance import DRAFTERS, OracleDrafter, answers_of, assert_identical, eos_ids, reference
from tests.tiny_models import new_model, prompts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    """Full fp32: TF32 rounds a one-token and a many-token pass differently."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on_gpu(*lengths: int) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in prompts(*lengths).items()}


@pytest.mark.parametrize("lengths", [(12,), (12, 3, 9, 7, 1)], ids=["one-row", "ragged"])
@pytest.mark.parametrize("kwargs", [{"do_sample": False}, {"do_sample": True}, {"do_sample": True, "top_p": 0.9}])
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3-mixed-windows"])
def test_tokens_and_generator_state_are_those_of_generate(
    name: str, drafter: str, kwargs: dict[str, Any], lengths: tuple[int, ...]
) -> None:
    model = new_model(name).cuda()
    for seed in range(3):
        expected = reference(model, on_gpu(*lengths), seed, max_new_tokens=32, **kwargs)
        state = torch.cuda.get_rng_state()
        inputs = on_gpu(*lengths)
        assert_identical(model, DRAFTERS[drafter], inputs, seed=seed, expected=expected, max_new_tokens=32, **kwargs)
        assert torch.equal(torch.cuda.get_rng_state(), state)


def test_bf16_differs_at_near_ties_only() -> None:
    model = new_model("llama").to("cuda", torch.bfloat16)
    inputs = on_gpu(12)
    plain = model.generate(**inputs, max_new_tokens=200, output_logits=True, return_dict_in_generate=True)
    answers = answers_of(plain.sequences, 12, eos_ids(model, {}))
    fast = specdec.accelerate(model, OracleDrafter(answers), strict=True, budget=Budget(16, fixed=True))
    ids = fast.generate(**inputs, max_new_tokens=200)
    length = min(ids.shape[1], plain.sequences.shape[1])
    differs = (ids[0, :length] != plain.sequences[0, :length]).nonzero()
    if len(differs):
        logits = plain.logits[int(differs[0]) - 12][0]
        first, second = logits.topk(2).values
        assert first - second < 0.05 * logits.std()


def test_trees_come_in_few_widths() -> None:
    model = new_model("llama").cuda()
    widths = set()
    expected = reference(model, on_gpu(12), max_new_tokens=60)
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.add(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        assert_identical(
            model, DRAFTERS["random-tree"], on_gpu(12), expected=expected, budget=Budget(64), max_new_tokens=60
        )
    finally:
        hook.remove()
    assert widths <= {*NODE_BUCKETS, 12, 9, 7, 3}  # and the prompts of the call and of the probe
