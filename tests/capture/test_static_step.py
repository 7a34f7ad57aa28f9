"""The step of static shapes gives the tokens of `generate`, run as it is and replayed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import specdec
from specdec import target as targets
from specdec.budget import Budget
from specdec.compat import CACHE
from specdec.drafters import RecyclingDrafter
from specdec.passes.cuda_graphs import target as static_targets
from specdec.passes.cuda_graphs import transfers
from specdec.passes.cuda_graphs.step import CapturedStep
from specdec.passes.cuda_graphs.target import StaticTarget, width_of
from tests.capture.recorders import Replays, recorded_by
from tests.conformance import DRAFTERS, assert_identical, reference
from tests.test_identity import PROCESSORS, SAMPLE_ONLY, call, plain_decoding
from tests.tiny_models import MODELS, WINDOW, new_model, prompts, tiny_model

WHOLE = {"plain", "temperature", "top-k", "top-p", "min-p", "stop-string", "several-eos"}
"""Processors with which the whole step is static; with the others, the target pass is."""


def cases() -> list[Any]:
    drafters = {"off": list(PROCESSORS), "random-tree": list(PROCESSORS), "oracle": ["plain", "top-p", "several-eos"]}
    drafters |= {name: ["plain"] for name in ("medusa-taught", "lookahead")}
    return [
        pytest.param(drafter, batch, do_sample, processor, id=f"{drafter}-{batch}-{do_sample}-{processor}")
        for drafter, processors in drafters.items()
        for processor in processors
        for batch in ("single", "padded", "return-sequences")
        for do_sample in (False, True)
        if do_sample or (batch != "return-sequences" and processor not in SAMPLE_ONLY)
    ]


@pytest.mark.parametrize(("drafter", "batch", "do_sample", "processor"), cases())
def test_same_tokens_and_generator_state(drafter: str, batch: str, do_sample: bool, processor: str) -> None:
    inputs, kwargs = call(batch, do_sample, processor)
    expected = plain_decoding(batch, do_sample, processor, 0)
    with recorded_by(None) as found:
        report = assert_identical(
            tiny_model(), DRAFTERS[drafter], inputs, expected=expected, cuda_graphs="eager", **kwargs
        )
    assert report.fallback is None
    (store,) = found.values()
    assert store.graphs.failure is None
    assert store.is_compared


@pytest.mark.parametrize("processor", PROCESSORS)
def test_how_much_of_a_step_is_static(processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = []
    start = CapturedStep.__post_init__

    def noted(self: CapturedStep) -> None:
        start(self)
        whole.append(self.selection is not None)

    monkeypatch.setattr(CapturedStep, "__post_init__", noted)
    inputs, kwargs = call("single", True, processor)
    assert_identical(tiny_model(), None, inputs, cuda_graphs="eager", **kwargs)
    assert whole == [processor in WHOLE]


@pytest.mark.parametrize(
    ("processors", "is_whole"),
    [
        ({"typical_p": 0.9, "epsilon_cutoff": 1e-3}, True),
        ({"top_p": 0.9, "renormalize_logits": True, "remove_invalid_values": True}, True),
        ({"suppress_tokens": [5, 6]}, True),
        ({"suppress_tokens": list(range(5, 60))}, False),
        ({"eta_cutoff": 1e-3}, False),
    ],
    ids=["typical-epsilon", "renormalized", "suppressed", "many-suppressed", "eta"],
)
def test_processors_of_a_whole_step_read_nothing_on_the_host(processors: dict[str, Any], is_whole: bool) -> None:
    model, recorder = new_model("llama"), Replays()
    with recorded_by(recorder) as found:
        kwargs = {"max_new_tokens": 16, "do_sample": True, "eos_token_id": None, **processors}
        assert_identical(model, DRAFTERS["random-tree"], prompts(12), cuda_graphs="eager", **kwargs)
    assert found[model].graphs.failure is None
    assert recorder.num_replayed > 0
    tails = [key[-1] is not None for key in found[model].graphs._entries]
    assert tails and all(tail == is_whole for tail in tails)


@pytest.mark.parametrize("name", MODELS)
def test_same_tokens_on_every_kind_of_attention(name: str) -> None:
    for inputs in (prompts(3 * WINDOW + 1), prompts(2 * WINDOW, 3, WINDOW - 1)):
        for do_sample in (False, True):
            kwargs: dict[str, Any] = {"max_new_tokens": 2 * WINDOW, "do_sample": do_sample, "cuda_graphs": "eager"}
            report = assert_identical(tiny_model(name), DRAFTERS["random-tree"], inputs, seed=3, **kwargs)
            assert report.cuda_graphs == "none; the same static step runs as it is, for tests"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("drafter", ["off", "random-tree"])
def test_graphs_of_one_call_serve_the_next_ones(name: str, drafter: str) -> None:
    model, recorder = new_model(name), Replays()
    with recorded_by(recorder) as found:
        for seed, inputs in enumerate((prompts(12), prompts(9), prompts(3, 9, 7), prompts(8, 8, 12), prompts(5))):
            for do_sample in (False, True):
                assert_identical(
                    model, DRAFTERS[drafter], inputs, seed=seed, max_new_tokens=20, do_sample=do_sample,
                    cuda_graphs="eager",
                )  # fmt: skip
        store = found[model]
    assert store.graphs.failure is None
    assert store.graphs.num_recorded == recorder.num_recorded
    assert recorder.num_replayed > 3 * recorder.num_recorded > 0
    assert len(set(recorder.replayed)) == recorder.num_recorded


def test_a_cache_that_must_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_targets, "LEAST_WIDTH", 16)
    monkeypatch.setattr(targets, "MAX_NEW_SLOTS", 4)
    model, recorder = new_model("llama"), Replays()
    widths: set[int] = set()
    step = StaticTarget._step

    def noted(self: StaticTarget, nodes: int, width: int, tail: Any) -> Any:
        widths.add(width)
        return step(self, nodes, width, tail)

    monkeypatch.setattr(StaticTarget, "_step", noted)
    for inputs in (prompts(12), prompts(3, 12, 7)):
        for drafter in ("off", "random-tree"):
            with recorded_by(recorder):
                assert_identical(
                    model, DRAFTERS[drafter], inputs, max_new_tokens=400, eos_token_id=None, do_sample=True,
                    budget=Budget(16, fixed=True), cuda_graphs="eager",
                )  # fmt: skip
    assert len(widths) > 5


def test_widths_are_few_and_wide_enough() -> None:
    widths = {width_of(slots) for slots in range(1, 20_000)}
    assert len(widths) == 14
    for slots in range(1, 20_000, 7):
        assert slots <= width_of(slots) <= max(256, 1.5 * slots)


def test_one_transfer_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    downloads = []
    start = transfers.Download.__init__

    def noted(self: transfers.Download, tensor: torch.Tensor) -> None:
        downloads.append(tensor.numel())
        start(self, tensor)

    monkeypatch.setattr(transfers.Download, "__init__", noted)
    with recorded_by(Replays()):
        report = assert_identical(
            tiny_model(), DRAFTERS["random-tree"], prompts(12), max_new_tokens=24, do_sample=True, cuda_graphs="eager"
        )
    assert len(downloads) == report.num_target_passes - 1, "the prefill is none of these steps"
    assert max(downloads) <= 2 + 2 * 16


def test_without_a_drafter_the_next_step_starts_before_the_last_one_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    for name in ("__init__", "wait"):
        before = getattr(transfers.Download, name)

        def noted(self: Any, *args: Any, name: str = name, before: Any = before) -> Any:
            events.append(name)
            return before(self, *args)

        monkeypatch.setattr(transfers.Download, name, noted)
    assert_identical(
        tiny_model(), None, prompts(12), max_new_tokens=6, eos_token_id=None, do_sample=True, cuda_graphs="eager"
    )
    # One token comes of the prefill, so five steps follow; the last one is not followed by a sixth.
    assert events == ["__init__", *["__init__", "wait"] * 4, "wait"]


def test_a_row_that_ends_leaves_the_batch_when_half_of_it_has() -> None:
    model, recorder = new_model("llama"), Replays()
    inputs = prompts(3, 11, 5, 12, 7, 8, 9, 10)
    kwargs: dict[str, Any] = {"max_new_tokens": 40, "eos_token_id": list(range(2, 12)), "do_sample": True}
    with recorded_by(recorder) as found:
        for seed in range(3):
            assert_identical(model, DRAFTERS["random-tree"], inputs, seed=seed, cuda_graphs="eager", **kwargs)
        batches = {key[0] for key in found[model].graphs._entries}
    assert batches <= {8, 4, 3, 2, 1}
    assert len(batches) > 1


def test_the_cache_that_is_handed_back() -> None:
    model = tiny_model()
    for batch in (prompts(12), prompts(3, 12, 7)):
        kwargs: dict[str, Any] = {"max_new_tokens": 16, "return_dict_in_generate": True, "eos_token_id": [2, 20, 40]}
        plain = model.generate(**batch, **kwargs)
        drafter = DRAFTERS["random-tree"]([row[batch["input_ids"].shape[1] :] for row in plain.sequences.tolist()])
        fast = specdec.accelerate(
            model, drafter, strict=True, budget=Budget(16, fixed=True), cuda_graphs="eager"
        ).generate(**batch, **kwargs)
        assert fast.sequences.tolist() == plain.sequences.tolist()
        for mine, theirs in zip(fast[CACHE].layers, plain[CACHE].layers, strict=True):
            torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(mine.values, theirs.values, atol=1e-4, rtol=1e-4)


def test_scores_are_those_of_plain_decoding() -> None:
    kwargs: dict[str, Any] = {
        "max_new_tokens": 12, "return_dict_in_generate": True, "output_scores": True, "output_logits": True,
    }  # fmt: skip
    expected = reference(tiny_model(), prompts(12), max_new_tokens=12)
    plain = tiny_model().generate(**prompts(12), **kwargs)
    drafter = DRAFTERS["oracle"](expected.answers)
    with recorded_by(Replays()):
        fast = specdec.accelerate(
            tiny_model(), drafter, strict=True, budget=Budget(16, fixed=True), cuda_graphs="eager"
        ).generate(**prompts(12), **kwargs)
    for name in ("scores", "logits"):
        for mine, theirs in zip(getattr(fast, name), getattr(plain, name), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_step_times_come_from_whole_static_steps() -> None:
    model, recorder = new_model("llama"), Replays()
    with recorded_by(recorder) as found:
        assert_identical(
            model, DRAFTERS["random-tree"], prompts(12), budget=Budget(8), max_new_tokens=32, cuda_graphs="eager"
        )
        keys = list(found[model].graphs._entries)
    assert {key[1] for key in keys} <= {1, 2, 4, 8} and len({key[1] for key in keys}) > 1
    assert all(key[-1] is not None for key in keys), "each pass is followed by what verifies it"


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(
    ("drafter", "is_ahead"),
    [(lambda _: RecyclingDrafter(), True), (DRAFTERS["random-tree"], True), (DRAFTERS["medusa-taught"], False)],
    ids=["recycling", "random-tree", "medusa-taught"],
)
def test_while_drafting_rests_the_next_step_is_started_ahead(
    drafter: Any, is_ahead: bool, do_sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, started = [0], []

    def nodes_to_draft(self: Budget) -> int:
        step[0] += 1
        return self.max_nodes if step[0] % 5 == 0 else 1

    monkeypatch.setattr(Budget, "nodes_to_draft", nodes_to_draft)
    monkeypatch.setattr(Budget, "rests_next", property(lambda self: (step[0] + 1) % 5 != 0))
    start = CapturedStep._start

    def noted(self: CapturedStep, tree: Any, rows: Any, after: Any = None) -> Any:
        started.append(after is not None)
        return start(self, tree, rows, after)

    monkeypatch.setattr(CapturedStep, "_start", noted)
    model, recorder = new_model("llama"), Replays()
    with recorded_by(recorder) as found:
        for inputs in (prompts(12), prompts(3, 12, 7)):
            kwargs = {
                "max_new_tokens": 40,
                "do_sample": do_sample,
                "budget": Budget(8, fixed=True),
                "eos_token_id": None,
            }
            report = assert_identical(model, drafter, inputs, cuda_graphs="eager", **kwargs)
            assert report.num_draft_tokens > 0
    assert found[model].graphs.failure is None
    assert any(started) == is_ahead
