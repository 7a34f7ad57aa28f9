"""Models whose numerics depend on what else is in a pass."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from torch import Tensor, nn

import specdec
from specdec.generation import FallbackWarning
from tests.conformance import RandomTreeDrafter, assert_identical
from tests.generate.common import PADDED, SINGLE
from tests.tiny_models import new_model


class Quantised(nn.Module):
    """Activations in eight bits.

    Args:
        linear: In full precision.
        per_token: One scale per token, as for most integer kernels; else one per pass.
    """

    def __init__(self, linear: nn.Linear, per_token: bool) -> None:
        super().__init__()
        self.linear, self.per_token = linear, per_token

    def forward(self, x: Tensor) -> Tensor:
        scale = (x.abs().amax(-1, keepdim=True) if self.per_token else x.abs().max()).clamp(min=1e-8) / 127
        return self.linear((x / scale).round() * scale)


def quantised(per_token: bool) -> Any:
    model = new_model("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj = Quantised(layer.mlp.up_proj, per_token)
        layer.self_attn.q_proj = Quantised(layer.self_attn.q_proj, per_token)
    return model


@pytest.mark.parametrize("inputs", [SINGLE, PADDED], ids=["single", "padded"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_one_scale_per_pass_is_noticed(inputs: Any, do_sample: bool) -> None:
    model = quantised(per_token=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        report = assert_identical(model, RandomTreeDrafter, inputs, max_new_tokens=24, do_sample=do_sample)
    assert "approximate up to quantisation" in str(report.fallback)
    assert "approximate up to quantisation" in str(specdec.accelerate(model).capability)


def test_one_scale_per_token_is_no_obstacle() -> None:
    assert specdec.accelerate(quantised(per_token=True)).capability.mode == "tree"
