"""A draft model's passes replayed: the same tokens and drafts, and the passes as they are where that cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import specdec
from specdec.drafters import DraftModelDrafter
from specdec.drafters.draft_model import Mode
from specdec.drafters.small_model import captured as draft_captured
from specdec.drafters.small_model.captured import MOST_NODES, CapturedPass, captured_pass
from specdec.drafters.small_model.passes import TreePasses
from specdec.passes.capability import probe
from specdec.passes.compiled.forward import SlotForward
from specdec.passes.cuda_graphs import store as stores
from specdec.passes.cuda_graphs.store import StaticStore
from tests.capture.recorders import Replays, recorded_by
from tests.conformance import assert_identical
from tests.tiny_models import WINDOW, new_model, prompts


@contextmanager
def captured_by(recorder: Replays | None) -> Iterator[dict[Any, StaticStore]]:
    """Inside, the passes of draft models are replayed by a stand-in; gives the stores by draft model."""
    acquire = stores.acquire
    with recorded_by(recorder) as found, pytest.MonkeyPatch.context() as patch:
        patch.setattr(draft_captured, "acquire", lambda model, mode, device: acquire(model, "eager", device))
        yield found


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("growth", ["chain", "dynamic"])
def test_same_tokens_and_as_many_of_them_accepted(growth: Mode, do_sample: bool) -> None:
    model, draft_model, recorder = new_model("llama"), new_model("llama", seed=1), Replays()
    accepted = []
    for captured in (False, True):
        with captured_by(recorder if captured else None) as found:
            for inputs in (prompts(12), prompts(3, 9), prompts(9)):
                drafter = DraftModelDrafter(draft_model, growth=growth, max_nodes=8, cuda_graphs=captured)
                drafter.needs_step_seconds = False  # no clock is asked
                report = assert_identical(
                    model, lambda _, of=drafter: of, inputs, max_new_tokens=24, do_sample=do_sample, eos_token_id=None
                )
                accepted.append(report.num_accepted_tokens)
            assert not captured or found[draft_model].graphs.failure is None
    assert accepted[:3] == accepted[3:]
    assert recorder.num_replayed > recorder.num_recorded > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3-mixed-windows", "llama-eager"])
def test_logits_are_those_of_the_passes_as_they_are(name: str) -> None:
    """Ragged rows, trees level by level, commits, rollbacks, rows that end, widths that are no bucket."""
    model = new_model(name.removesuffix("-eager"))
    if name.endswith("eager"):
        model.set_attn_implementation("eager")
    capability, recorder = probe(model), Replays()
    generator = np.random.default_rng(0)
    with captured_by(recorder) as found, torch.no_grad():
        for _ in range(2):
            captured = captured_pass(model, capability)
            assert isinstance(captured, CapturedPass)
            both = [TreePasses(model, capability), TreePasses(model, capability, captured=captured)]
            prompts_of = [generator.integers(3, 60, n) for n in (2 * WINDOW, 5, 1)]
            for passes in both:
                passes.prefill(prompts_of, 24)
            for counts in ((1, 3, 2), (2, 2, 2), (1, 1, 1), (4, 1, 3)):
                pending = [generator.integers(3, 60, count) for count in counts[: len(both[0].lengths)]]
                agree([passes.feed_pending(pending) for passes in both])
                for width in (3, 1, 4):
                    tokens = generator.integers(3, 60, (len(pending), width))
                    parents = generator.integers(0, both[0].num_fed, tokens.shape)
                    agree([passes.feed_level(tokens, parents) for passes in both])
                for passes in both:
                    passes.commit([[0]] * len(pending))
            for passes in both:
                passes.keep_rows([0, 2])
                passes.rollback([length - 1 for length in passes.lengths])
            pending = [generator.integers(3, 60, 2) for _ in range(2)]
            agree([passes.feed_pending(pending) for passes in both])
            both[1].close()
        assert found[model].graphs.failure is None
    assert recorder.num_replayed > recorder.num_recorded > 0


def agree(both: list[Tensor]) -> None:
    assert both[0].shape == both[1].shape
    assert torch.allclose(both[0], both[1], atol=1e-5)


@pytest.mark.parametrize(
    ("recorder", "reason"),
    [
        (Replays(error_at=0), "not permitted when stream is capturing"),
        (Replays(error_at=2), "not permitted when stream is capturing"),
        (Replays(wrong_at=0), "another result than the step itself"),
    ],
    ids=["error-at-once", "error-later", "wrong"],
)
def test_a_graph_that_fails_costs_nothing(recorder: Replays, reason: str) -> None:
    model, draft_model = new_model("llama"), new_model("llama", seed=1)
    with captured_by(recorder) as found:
        for inputs in (prompts(12), prompts(3, 9)):
            drafter = DraftModelDrafter(draft_model, growth="dynamic", max_nodes=8)
            report = assert_identical(model, lambda _, of=drafter: of, inputs, max_new_tokens=16, eos_token_id=None)
        assert reason in str(found[draft_model].graphs.failure)
    assert report.num_draft_tokens > 0
    assert recorder.num_recorded <= 3


def test_nothing_is_told_where_nobody_asks() -> None:
    fast = specdec.accelerate(new_model("llama"), DraftModelDrafter(new_model("llama", seed=1)))
    fast.generate(**prompts(9), max_new_tokens=8)
    assert "draft_cuda_graphs" not in fast.report.drafter_figures


def test_static_passes_that_are_wrong_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = SlotForward.forward
    monkeypatch.setattr(SlotForward, "forward", lambda *args: tuple(2 * part for part in right(*args)))
    draft_model = new_model("llama", seed=1)
    with captured_by(Replays()) as found:
        drafter = DraftModelDrafter(draft_model, growth="dynamic", max_nodes=8)
        assert_identical(new_model("llama"), lambda _: drafter, prompts(12), max_new_tokens=12, eos_token_id=None)
        assert "gives other logits" in str(found[draft_model].graphs.failure)


def test_wide_passes_and_caches_that_must_grow() -> None:
    model = new_model("llama")
    capability = probe(model)
    generator = np.random.default_rng(0)
    with captured_by(Replays()) as found, torch.no_grad():
        captured = captured_pass(model, capability)
        assert isinstance(captured, CapturedPass)
        both = [TreePasses(model, capability), TreePasses(model, capability, captured=captured)]
        prompt = generator.integers(3, 60, 5)
        for passes in both:
            passes.prefill([prompt], 4)
        for count in (2, MOST_NODES + 1, 200, 31, 17, 2):
            pending = [generator.integers(3, 60, count)]
            agree([passes.feed_pending(pending) for passes in both])
            for passes in both:
                passes.commit([[0]])
        assert both[1].lengths[0] > 256, "more than the first width"
        assert found[model].graphs.failure is None
        both[1].close()


def test_the_store_is_given_back_after_each_call_and_after_a_drafter_that_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, draft_model = new_model("llama"), new_model("llama", seed=1)
    with captured_by(Replays()) as found:
        fast = specdec.accelerate(model, DraftModelDrafter(draft_model, growth="dynamic", max_nodes=8))
        expected = model.generate(**prompts(9), max_new_tokens=12)
        assert torch.equal(fast.generate(**prompts(9), max_new_tokens=12), expected)
        store = found[draft_model]
        assert not store.lock.locked()
        with monkeypatch.context() as patch:
            patch.setattr(TreePasses, "feed_pending", lambda *_: 1 / 0)
            with pytest.warns(RuntimeWarning, match="is switched off"):
                assert torch.equal(fast.generate(**prompts(9), max_new_tokens=12), expected)
        before = store.graphs.num_recorded
        assert torch.equal(fast.generate(**prompts(9), max_new_tokens=12), expected)
        assert not store.lock.locked()
        assert "captured so far, of at most" in fast.report.drafter_figures["draft_cuda_graphs"]
        assert store.graphs.failure is None
        assert store.graphs.num_recorded - before <= 2, "graphs of the first call served this one"
