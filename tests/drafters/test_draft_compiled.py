"""A compiled draft model proposes the same, and one that cannot be compiled runs as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import specdec
from specdec.budget import Budget
from specdec.drafters import DraftModelDrafter
from specdec.drafters.small_model import loading as draft_loading
from specdec.drafters.small_model.loading import capability_of
from specdec.drafters.small_model.passes import TreePasses, warmed_up
from specdec.passes.capability import Capability
from specdec.passes.compiled import package
from specdec.passes.compiled.passes import begin_compiled, compiled_passes
from tests.compiled.builders import built_by, exported
from tests.conformance import assert_identical, draft_of
from tests.tiny_models import VOCAB, prompts, tiny_model

ATTENTION = ("llama", "gpt2", "mistral-window", "gemma3-mixed-windows", "llama4-chunks")


@pytest.fixture
def as_it_is() -> Iterator[list[Any]]:
    """Everything but the compiler: what would be compiled runs as it is; the list holds its calls' numbers of nodes."""
    calls: list[Any] = []

    def noted(module: nn.Module, *args: Any) -> package.Function:
        function = exported(module, *args)

        def call(*inputs: Tensor) -> Sequence[Tensor]:
            calls.append(inputs[0].shape[1])
            return function(*inputs)

        return call

    with built_by(noted):
        yield calls


@pytest.mark.parametrize("growth", ["chain", "dynamic", "paced"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_same_tokens_in_every_growth(growth: Any, do_sample: bool, as_it_is: list[Any]) -> None:
    drafter = DraftModelDrafter(draft_of("llama"), growth=growth, compiled=True)
    for inputs in (prompts(12), prompts(3, 11, 5, 12, 7)):
        report = assert_identical(tiny_model(), drafter, inputs, max_new_tokens=24, do_sample=do_sample)
        assert report.num_accepted_tokens > 0
    assert len(as_it_is) > 10


@pytest.mark.parametrize("name", ATTENTION)
def test_logits_are_those_of_the_model(name: str, as_it_is: list[Any]) -> None:
    model = draft_of(name)
    capability = capability_of(model)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, VOCAB, size) for size in (40, 29, 33)]
    both = [TreePasses(model, capability), TreePasses(model, capability, begin_compiled(model, capability))]
    logits: list[list[torch.Tensor]] = [[], []]
    with torch.no_grad():
        for passes, seen in zip(both, logits, strict=True):
            passes.prefill(rows, 2)
            for step in range(3):
                pending = [np.array([step + 1] * (1 + (row + step) % 2)) for row in range(3)]
                seen.append(passes.feed_pending(pending))
                seen.append(passes.feed_level(np.full((3, 2), 5), np.array([[0, 0], [0, 0], [0, -1]])))
                seen.append(passes.feed_level(np.full((3, 1), 7), np.array([[1], [2], [1]])))
                passes.commit([[0, 1, 3], [0, 2, 3], [0]])
            passes.keep_rows([0, 2])
            seen.append(passes.feed_pending([np.array([3]), np.array([4])]))
    for plain, compiled in zip(*logits, strict=True):
        real = plain.isfinite()
        torch.testing.assert_close(compiled[real], plain[real], atol=1e-5, rtol=1e-5)
    assert len(as_it_is) == len(logits[1])


def test_a_model_that_cannot_be_compiled_runs_as_it_is() -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler here")

    with built_by(broken):
        _check_runs_as_it_is()


def _check_runs_as_it_is() -> None:
    drafter = DraftModelDrafter(draft_of("llama"), compiled=True)
    with pytest.warns(RuntimeWarning, match=r"are not compiled, and run as they are.*no compiler here"):
        fast = specdec.accelerate(tiny_model(), drafter, strict=True, budget=Budget(fixed=True))
    inputs = prompts(12)
    expected = tiny_model().generate(**inputs, max_new_tokens=24)
    assert fast.generate(**inputs, max_new_tokens=24).tolist() == expected.tolist()
    assert fast.report.num_accepted_tokens > 0


def test_a_model_for_chains_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_loading, "probe", lambda model: Capability("chain", "for a test"))
    drafter = DraftModelDrafter(draft_of("llama"), compiled=True)
    with pytest.raises(ValueError, match=r"compiled=True cannot .* LlamaForCausalLM: .*for a test.*leave it out"):
        drafter.bind(tiny_model())


def test_drafters_of_one_model_share_what_is_compiled(as_it_is: list[Any]) -> None:
    model = draft_of("llama")
    for _ in range(2):
        DraftModelDrafter(model, compiled=True).bind(tiny_model())
    assert as_it_is == [1, 2, 1, 2]
    assert warmed_up(model, capability_of(model)) is compiled_passes(model)


@pytest.mark.slow
def test_compiled_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    drafter = DraftModelDrafter(draft_of("llama"), growth="dynamic", compiled=True)
    for inputs in (prompts(12), prompts(3, 11, 5)):
        for do_sample in (False, True):
            report = assert_identical(tiny_model(), drafter, inputs, max_new_tokens=24, do_sample=do_sample)
            assert report.num_accepted_tokens > 0
    assert compiled_passes(draft_of("llama")).is_ready
