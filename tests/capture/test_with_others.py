"""The static step beside what else changes how a model runs: attention backends and torch.compile."""

from __future__ import annotations

import pytest
import torch

from tests.capture.recorders import Replays, recorded_by
from tests.conformance import DRAFTERS, assert_identical
from tests.tiny_models import WINDOW, new_model, prompts


@pytest.mark.parametrize("name", ["llama", "gemma3-mixed-windows"])
def test_backends_of_tree_attention(name: str) -> None:
    model, recorder = new_model(name), Replays()
    with recorded_by(recorder) as found:
        for inputs in (prompts(2 * WINDOW), prompts(2 * WINDOW, 3, 7)):
            assert_identical(
                model, DRAFTERS["random-tree"], inputs, max_new_tokens=24, do_sample=True, attention="sdpa",
                cuda_graphs="eager",
            )  # fmt: skip
        assert found[model].graphs.failure is None
    assert recorder.num_replayed > 0


def test_a_compiled_model() -> None:
    model = new_model("llama")
    expected = [model.generate(**prompts(9), max_new_tokens=16, do_sample=False) for _ in range(1)]
    model.compile(backend="eager")
    try:
        report = assert_identical(model, DRAFTERS["random-tree"], prompts(9), max_new_tokens=16, cuda_graphs="eager")
        assert report.fallback is None
        assert torch.equal(model.generate(**prompts(9), max_new_tokens=16, do_sample=False), expected[0])
    finally:
        torch.compiler.reset()
