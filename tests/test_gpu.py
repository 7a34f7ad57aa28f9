"""The promise on a GPU: the same identity in fp32; in bf16 a difference at a near-tie only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import specdec
from specdec.budget import Budget
from specdec.drafters import DraftModelDrafter
from specdec.drafters.draft_model import Mode
from specdec.passes.attention.base import TreeAttention
from specdec.passes.attention.choice import BACKENDS
from specdec.passes.cache_commit import move_slots
from specdec.passes.cuda_graphs.graphs import MAX_GRAPHS, CudaRecorder
from specdec.passes.cuda_graphs.store import store_of
from specdec.target import TreeTarget
from specdec.tree import NODE_BUCKETS
from tests.attention.reference import SHAPES, Shape, call_of
from tests.attention.reference import reference as attention_by_definition
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


@pytest.mark.parametrize("growth", ["chain", "dynamic"])
def test_passes_of_a_draft_model_are_replayed(growth: Mode) -> None:
    model, draft_model = new_model("llama").cuda(), new_model("llama", seed=1).cuda()
    accepted = []
    for captured in (False, True):
        for lengths in ((12,), (12, 3, 9)):
            drafter = DraftModelDrafter(draft_model, growth=growth, max_nodes=16, cuda_graphs=captured)
            drafter.needs_step_seconds = False  # no clock is asked
            report = assert_identical(
                model, lambda _, of=drafter: of, on_gpu(*lengths), max_new_tokens=32, do_sample=True, eos_token_id=None
            )
            accepted.append(report.num_accepted_tokens)
    assert "captured so far" in report.drafter_figures["draft_cuda_graphs"]
    assert accepted[:2] == accepted[2:]


def test_a_capture_that_fails_leaves_stream_and_generator_alone() -> None:
    """The host reads a value: capturing fails; the next one works."""
    value, stream = torch.ones(4, device="cuda"), torch.cuda.current_stream()
    state, recorder = torch.cuda.get_rng_state(), CudaRecorder(value.device)
    with pytest.raises(RuntimeError):
        recorder.record(lambda: print(float(value.sum())))
    assert torch.cuda.current_stream() == stream
    assert torch.equal(torch.cuda.get_rng_state(), state)
    torch.rand(3, device="cuda")

    def double() -> None:
        value.mul_(2.0)

    recorder.record(double)()
    assert value.tolist() == [2.0] * 4


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


def installed(name: str) -> TreeAttention:
    backend = BACKENDS[name]()
    if missing := backend.missing():
        pytest.skip(missing)
    return backend


def lacks(name: str, shape: Shape, dtype: torch.dtype) -> bool:
    """Whether a backend refuses a shape by its documentation."""
    return (
        (name == "sdpa" and shape.softcap is not None)
        or (name == "flash" and (shape.chunk is not None or dtype == torch.float32))
        or (name == "flash" and (shape.sizes[0] % 8 != 0 or shape.sizes[0] < shape.sizes[1]))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BACKENDS)
def test_attention_is_that_of_the_definition(name: str, shape: str, dtype: torch.dtype) -> None:
    if lacks(name, SHAPES[shape], dtype):
        pytest.skip("refused by its documentation")
    call = call_of(SHAPES[shape], dtype, device="cuda")
    out = installed(name).attend(call).double().cpu()
    tolerance = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    assert (out - attention_by_definition(call, SHAPES[shape])).abs().max() < tolerance


@pytest.mark.parametrize("name", ["sdpa", "triton"])
def test_attention_can_be_captured_and_follows_the_lengths(name: str) -> None:
    backend, shape = installed(name), Shape(nodes=16, lengths=(60, 40), spare=20)
    call = call_of(shape, device="cuda")
    backend.attend(call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.plan._made.clear()  # made again inside, from the static lengths
        out = backend.attend(call)
    shorter = Shape(nodes=16, lengths=(31, 52), spare=28)
    call.plan.lengths.copy_(torch.tensor(shorter.lengths))
    graph.replay()
    assert (out.double().cpu() - attention_by_definition(call, shorter)).abs().max() < 1e-5


def test_triton_is_what_auto_takes() -> None:
    installed("triton")
    found = specdec.accelerate(new_model("llama").cuda()).capability
    assert (found.attention, dict(found.rejected)) == ("triton", {})


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3-mixed-windows", "gemma2-softcap"])
@pytest.mark.parametrize("attention", ["sdpa", "triton"])
def test_tokens_through_each_attention_are_those_of_generate(attention: str, name: str) -> None:
    installed(attention)
    if attention == "sdpa" and name == "gemma2-softcap":
        pytest.skip("refused by its documentation")
    model = new_model(name).cuda()
    assert_identical(model, DRAFTERS["random-tree"], on_gpu(12, 3, 9), attention=attention, max_new_tokens=32)


def test_paths_move_by_the_kernel_as_by_torch() -> None:
    installed("triton")
    keys, values = (torch.randn(3, 4, 2, 64, size, device="cuda") for size in (128, 80))
    rows = torch.tensor([[2], [0]], device="cuda")
    source = torch.tensor([[10, 12, 13, 20], [30, 33, 34, 35]], device="cuda")
    target = source[:, :1] + torch.arange(4, device="cuda")
    expected = keys.clone(), values.clone()
    move_slots(*expected, rows, source, target, kernel=False)
    move_slots(keys, values, rows, source, target, kernel=True)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])


def test_bf16_counts_near_ties() -> None:
    fast = specdec.accelerate(new_model("llama").to("cuda", torch.bfloat16), "lookahead")
    fast.generate(**on_gpu(12, 5), max_new_tokens=64)
    assert fast.report.num_near_ties is not None
    assert fast.report.near_tie_gap
