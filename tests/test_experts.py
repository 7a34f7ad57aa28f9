"""One-token passes of a mixture of experts are made as transformers' decoding makes them on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

from specdec import target as targets
from specdec.passes.moe import ExpertsSwitch
from tests.conformance import DRAFTERS, assert_identical
from tests.tiny_models import LLAMA_LIKE, new_model, prompts


def mixture() -> Any:
    torch.manual_seed(0)
    config = tf.MixtralConfig(**LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2)
    return tf.MixtralForCausalLM(config).eval()


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    switch = ExpertsSwitch
    monkeypatch.setattr(targets, "ExpertsSwitch", lambda model, _: switch(model, torch.device("cuda")))


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("cuda_graphs", [False, "eager"])
@pytest.mark.parametrize("drafter", ["off", "random-tree"])
def test_one_token_is_batched_and_a_tree_is_grouped(
    drafter: str, cuda_graphs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = mixture(), set()
    assert model.get_experts_implementation() == {"": "grouped_mm"}
    kind = type(model.model.layers[0].mlp)
    forward = kind.forward

    def noted(self: Any, states: torch.Tensor, *args: Any) -> Any:
        seen.add((states.shape[1] == 1, self.experts.config._experts_implementation))
        assert model.get_experts_implementation() == {"": "grouped_mm"}, "the caller's model never changes"
        return forward(self, states, *args)

    monkeypatch.setattr(kind, "forward", noted)
    assert_identical(
        model, DRAFTERS[drafter], prompts(12), max_new_tokens=16, eos_token_id=None, cuda_graphs=cuda_graphs
    )
    assert (False, "grouped_mm") in seen
    assert (True, "batched_mm") in seen or drafter != "off"
    assert (False, "batched_mm") not in seen


def test_dense_models_and_cpus_are_left_alone() -> None:
    assert ExpertsSwitch(new_model("llama"), torch.device("cuda")).names == {}
    assert ExpertsSwitch(mixture(), torch.device("cpu")).names == {}
    switch = ExpertsSwitch(object(), torch.device("cuda"))  # a transformers without the setting
    switch.use_for(None, 1)
