"""Passes of a mixture of experts are paid by the distinct experts that they take: measured, not assumed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

import specdec
from specdec.budget import Budget
from specdec.target import TargetModel
from specdec.tree import TokenTree
from tests.conformance import assert_identical
from tests.test_budget import chain, set_times
from tests.tiny_models import LLAMA_LIKE, prompts

EXPERTS = 16


def mixture() -> Any:
    config = tf.MixtralConfig(**LLAMA_LIKE, num_local_experts=EXPERTS, num_experts_per_tok=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tf.MixtralForCausalLM(config).eval()


def experts_of(model: Any) -> list[set[int]]:
    """Grows by one set per router and pass: the experts that were taken."""
    seen: list[set[int]] = []
    routers = [module for name, module in model.named_modules() if name.endswith((".gate", ".router"))]
    assert routers

    def note(module: Any, args: Any, output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) else output
        seen.append(set(logits.reshape(-1, EXPERTS).argmax(-1).tolist()))

    for router in routers:
        router.register_forward_hook(note)
    return seen


@pytest.mark.parametrize("do_sample", [False, True])
def test_same_tokens_with_a_mixture_of_experts(do_sample: bool) -> None:
    report = assert_identical(
        mixture(), "auto", prompts(9, 4), max_new_tokens=40, do_sample=do_sample, budget=Budget(8)
    )
    assert report.capability == "tree"


class AllSizes(Budget):
    """Times all sizes at once."""

    def choose(self, tree: TokenTree, spent: float = 0.0, trial: Callable[[int], None] | None = None) -> TokenTree:
        if trial is not None and not self.times.seconds.get(64):
            self.times.time_all(trial)
        return super().choose(tree, spent)


def test_what_is_timed_takes_as_many_experts_as_text_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one token over and over a wide pass would take the experts of that one alone, and seem to cost nothing."""
    model = mixture()
    seen = experts_of(model)
    timed: dict[int, int] = {}
    right = TargetModel.trial_pass

    def trial(self: TargetModel, tokens: torch.Tensor, nodes: int) -> None:
        seen.clear()
        right(self, tokens, nodes)
        timed[nodes] = max(timed.get(nodes, 0), max(map(len, seen)))

    monkeypatch.setattr(TargetModel, "trial_pass", trial)
    fast = specdec.accelerate(model, "auto", strict=True, budget=AllSizes(64))
    fast.generate(**prompts(60), max_new_tokens=8, eos_token_id=None)
    assert timed[1] == 1
    assert timed[64] > EXPERTS // 2
    assert timed[8] < timed[64]


def test_size_is_chosen_by_the_times_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that grow with the experts taken lead to smaller trees than those of a dense model of the same drafts."""

    def measured(seconds_per_expert: float) -> int:
        budget = Budget(64)
        taken = {nodes: EXPERTS * (1 - (1 - 1 / EXPERTS) ** nodes) for nodes in budget.times.buckets}
        set_times(budget.times, {nodes: 1.0 + seconds_per_expert * count for nodes, count in taken.items()})
        return budget.choose(chain(0.8)).num_nodes

    assert measured(0.0) == 64
    assert 1 < measured(0.1) < 64
    assert measured(10.0) < measured(0.1)
