"""A real chat model of 30 layers: trees in every precision, faults found out, float32 identical."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import specdec
from specdec.passes import capability
from specdec.passes.capability import probe
from tests.real_model import TURNS, chat_inputs, loaded, smollm2_folder
from tests.test_probe import FAULTS

__all__ = ["smollm2_folder"]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_takes_trees(smollm2_folder: str, dtype: torch.dtype, attention: str) -> None:
    found = probe(loaded(smollm2_folder, dtype, attention))
    assert found.mode == "tree", found.reason


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_faults_are_caught_in_half_precision(
    fault: Any, smollm2_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(smollm2_folder, torch.bfloat16)
    fault(monkeypatch)
    monkeypatch.setattr(capability, "_KNOWN", type(capability._KNOWN)())
    found = probe(model)
    assert found.mode != "tree"
    assert "differ" in found.reason or "depend" in found.reason


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("drafter", ["lookahead", "auto"])
def test_float32_is_identical(smollm2_folder: str, drafter: str, do_sample: bool) -> None:
    model = loaded(smollm2_folder, torch.float32)
    fast = specdec.accelerate(model, drafter, strict=True)
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.95} if do_sample else {"do_sample": False}
    accepted = 0
    for number in range(len(TURNS)):
        outputs = []
        for generate in (model.generate, fast.generate):
            torch.manual_seed(number)
            outputs.append(generate(**chat_inputs(smollm2_folder, number), max_new_tokens=40, **sampling).tolist())
        assert outputs[0] == outputs[1]
        assert fast.report.capability == "tree"
        accepted += fast.report.num_accepted_tokens
    assert accepted > 0


def test_half_precision_counts_near_ties(smollm2_folder: str) -> None:
    fast = specdec.accelerate(loaded(smollm2_folder, torch.bfloat16), "lookahead", capability="tree")
    fast.generate(**chat_inputs(smollm2_folder, 3), max_new_tokens=40, do_sample=False)
    assert fast.report.near_tie_gap is not None and 0.1 < fast.report.near_tie_gap < 1.0
    assert fast.report.num_near_ties


@pytest.mark.parametrize("mode", ["auto", "tree"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_static_layout_is_right_in_half_precision(smollm2_folder: str, dtype: torch.dtype, mode: str) -> None:
    fast = specdec.accelerate(
        loaded(smollm2_folder, dtype), "lookahead", "typical", capability=mode, cuda_graphs="eager", strict=True
    )
    fast.generate(**chat_inputs(smollm2_folder, 2), max_new_tokens=16, do_sample=True)
    assert "the same static step runs as it is" in fast.report.cuda_graphs


@pytest.mark.timeout(600)
def test_compiled_passes_are_right_in_half_precision(smollm2_folder: str) -> None:
    fast = specdec.accelerate(loaded(smollm2_folder, torch.bfloat16), "lookahead", compiled=True, strict=True)
    fast.generate(**chat_inputs(smollm2_folder, 2), max_new_tokens=32, do_sample=False)
    assert fast.report.compiled.startswith("yes"), fast.report.compiled
