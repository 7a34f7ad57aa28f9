"""The promise on a GPU: the same identity in fp32; in bf16 a difference at a near-tie only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import specdec
from specdec.budget import Budget
from specdec.capture.graphs import MAX_GRAPHS
from specdec.capture.store import store_of
from specdec.target import TreeTarget
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
@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["captured", "uncaptured"])
def test_tokens_and_generator_state_are_those_of_generate(
    cuda_graphs: bool, name: str, drafter: str, kwargs: dict[str, Any], lengths: tuple[int, ...]
) -> None:
    model = new_model(name).cuda()
    for seed in range(3):
        expected = reference(model, on_gpu(*lengths), seed, max_new_tokens=32, **kwargs)
        state = torch.cuda.get_rng_state()
        inputs = on_gpu(*lengths)
        report = assert_identical(
            model,
            DRAFTERS[drafter],
            inputs,
            seed=seed,
            expected=expected,
            cuda_graphs=cuda_graphs,
            max_new_tokens=32,
            **kwargs,
        )
        assert ("captured so far" in str(report.cuda_graphs)) == cuda_graphs
        assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["captured", "uncaptured"])
def test_bf16_differs_at_near_ties_only(cuda_graphs: bool) -> None:
    model = new_model("llama").to("cuda", torch.bfloat16)
    inputs = on_gpu(12)
    plain = model.generate(**inputs, max_new_tokens=200, output_logits=True, return_dict_in_generate=True)
    answers = answers_of(plain.sequences, 12, eos_ids(model, {}))
    fast = specdec.accelerate(
        model, OracleDrafter(answers), strict=True, budget=Budget(16, fixed=True), cuda_graphs=cuda_graphs
    )
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
            model,
            DRAFTERS["random-tree"],
            on_gpu(12),
            expected=expected,
            budget=Budget(64),
            cuda_graphs=False,
            max_new_tokens=60,
        )
    finally:
        hook.remove()
    assert widths <= {*NODE_BUCKETS, 12, 9, 7, 3}  # and the prompts of the call and of the probe


def test_graphs_are_bounded_and_serve_later_calls() -> None:
    model = new_model("llama").cuda()
    counts = []
    for seed, lengths in enumerate([(12,), (9,), (3, 9, 7), (12,), (5,)] * 3):
        expected = reference(model, on_gpu(*lengths), seed, max_new_tokens=40, do_sample=True)
        inputs = on_gpu(*lengths)
        assert_identical(
            model, DRAFTERS["random-tree"], inputs, seed=seed, expected=expected, cuda_graphs=True, max_new_tokens=40,
            do_sample=True,
        )  # fmt: skip
        graphs = store_of(model, True, model.device).graphs
        counts.append(graphs.num_recorded)
        assert len(graphs) <= MAX_GRAPHS
    assert counts[-1] <= counts[len(counts) // 2] + 2, "in the end there is hardly anything new to capture"
    assert all(graphs.failure is None for graphs in (store_of(model, True, model.device).graphs,))


def test_memory_stays_where_it_is_from_call_to_call() -> None:
    model = new_model("llama").cuda()
    fast = specdec.accelerate(model, DRAFTERS["random-tree"]([]), strict=True, cuda_graphs=True)
    used = []
    for _ in range(6):
        fast.generate(**on_gpu(12), max_new_tokens=40)
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert used[-1] == used[2]


def test_a_capture_that_fails_costs_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read of the host in the pass: capturing fails, and the stream and the generator are as before."""
    run_pass = TreeTarget.run_pass

    def reading(self: TreeTarget, tokens: torch.Tensor, mask: Any, positions: Any) -> torch.Tensor:
        assert int(tokens.max()) >= 0
        return run_pass(self, tokens, mask, positions)

    monkeypatch.setattr(TreeTarget, "run_pass", reading)
    model = new_model("llama").cuda()
    stream = torch.cuda.current_stream()
    for seed in range(2):
        expected = reference(model, on_gpu(12, 7), seed, max_new_tokens=24, do_sample=True)
        state = torch.cuda.get_rng_state()
        report = assert_identical(
            model, DRAFTERS["random-tree"], on_gpu(12, 7), seed=seed, expected=expected, max_new_tokens=24,
            do_sample=True,
        )  # fmt: skip
        assert torch.equal(torch.cuda.get_rng_state(), state)
    assert "none, because" in str(report.cuda_graphs)
    assert torch.cuda.current_stream() == stream
