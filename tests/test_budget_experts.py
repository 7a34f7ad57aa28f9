"""Passes of a mixture of experts are paid by the distinct experts that they take: measured, not assumed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

from specdec.budget import Budget
from tests.conformance import assert_identical
from tests.test_budget import chain, set_times
from tests.tiny_models import LLAMA_LIKE, prompts

EXPERTS = 16


def mixture() -> Any:
    config = tf.MixtralConfig(**LLAMA_LIKE, num_local_experts=EXPERTS, num_experts_per_tok=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tf.MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("do_sample", [False, True])
def test_same_tokens_with_a_mixture_of_experts(do_sample: bool) -> None:
    report = assert_identical(
        mixture(), "auto", prompts(9, 4), max_new_tokens=40, do_sample=do_sample, budget=Budget(8)
    )
    assert report.capability == "tree"


def test_size_is_chosen_by_the_times_that_were_measured() -> None:
    """Times that grow with the experts taken lead to smaller trees than those of a dense model of the same drafts."""

    def measured(seconds_per_expert: float) -> int:
        budget = Budget(64)
        taken = {nodes: EXPERTS * (1 - (1 - 1 / EXPERTS) ** nodes) for nodes in budget.times.buckets}
        set_times(budget.times, {nodes: 1.0 + seconds_per_expert * count for nodes, count in taken.items()})
        return budget.choose(chain(0.8)).num_nodes

    assert measured(0.0) == 64
    assert 1 < measured(0.1) < 64
    assert measured(10.0) < measured(0.1)
