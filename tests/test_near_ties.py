"""Near-ties: how they are found and counted."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import pytest
import torch
from transformers.generation.logits_process import LogitsProcessorList, TopPLogitsWarper

import specdec
from specdec.budget import Budget
from specdec.passes.near_ties import NearTies
from specdec.rows.draws import NoiseQueue
from specdec.rows.sequences import Sequences
from specdec.sampling import Sampler, margins
from specdec.tree import TokenTree
from specdec.verifiers import ExactVerifier
from tests.conformance import RandomTreeDrafter
from tests.tiny_models import new_model, prompts, tiny_model


@pytest.mark.parametrize("best", [0, 4, 8])
@pytest.mark.parametrize("second", [1, 7, 0.0, -torch.inf])
def test_margins_wherever_the_two_best_are(best: int, second: float) -> None:
    values = torch.full((2, 3, 9), -torch.inf) if second == -torch.inf else -torch.rand(2, 3, 9) - 1.0
    values[..., best] = 2.0
    if second == 0.0:  # as high as the best
        values[..., (best + 3) % 9] = 2.0
    elif second > 0:
        values[..., int(second)] = 0.5
    two = values.topk(2).values
    assert torch.equal(margins(values), two[..., 0] - two[..., 1])
    draws = values.exp()
    two = draws.topk(2).values.log()
    assert torch.equal(margins(draws, is_sampled=True), two[..., 0] - two[..., 1])


class _CountingLogits(torch.Tensor):
    """Logits that note how many of their values were converted."""

    converted: ClassVar[list[int]] = []

    def float(self) -> torch.Tensor:  # type: ignore[override]
        self.converted.append(self.numel())
        return self.as_subclass(torch.Tensor).float()


def test_only_nodes_on_the_path_are_converted_to_float32() -> None:
    sequences = Sequences(torch.zeros(1, 3, dtype=torch.int64), None, 100)
    tree = TokenTree.from_rows([[0, 1, 2, 3]], [[-1, 0, 0, 1]])
    logits = torch.zeros(1, 4, 11, dtype=torch.bfloat16)
    logits[0, 0, 2] = 1.0
    logits[0, 2, 5] = 1.0
    _CountingLogits.converted.clear()
    picks = Sampler(LogitsProcessorList(), False, sequences).pick(tree, logits.as_subclass(_CountingLogits), [0])
    assert picks.tolist() == [[2, -1, 5, -1]]
    assert _CountingLogits.converted == [11, 11]


@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize("top_p", [None, 0.9])
@pytest.mark.parametrize("do_sample", [False, True])
def test_margins_are_those_between_the_two_best(do_sample: bool, top_p: float | None, is_flat: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 11, generator=generator)
    sequences = Sequences(torch.zeros(2, 3, dtype=torch.int64), None, 100)
    processors = LogitsProcessorList([TopPLogitsWarper(top_p)] if top_p else [])
    torch.manual_seed(1)
    sampler = Sampler(processors, do_sample, sequences, NoiseQueue(2, torch.device("cpu")) if do_sample else None)
    sampler.keeps_margins, sampler.is_flat = True, is_flat
    scores = TopPLogitsWarper(top_p)(torch.zeros(0), logits.view(8, 11).clone()).view(2, 4, 11) if top_p else logits
    values = scores
    if do_sample:
        torch.manual_seed(1)
        noise = torch.stack([torch.empty(2, 11).exponential_() for _ in range(2)])  # [depth, B, V]
        values = scores.log_softmax(-1) - noise[[0, 1, 1, 1]].transpose(0, 1).log()
    best = values.topk(2)
    margin = best.values[..., 0] - best.values[..., 1]
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    tokens[:, 2] = best.indices[:, 0, 0]  # node 2 is right
    tokens[:, [1, 3]] = (tokens[:, [2]] + torch.tensor([[1, 2]])) % 11
    tree = TokenTree(tokens, torch.tensor([[-1, 0, 0, 0]] * 2))

    torch.manual_seed(1)
    acceptance = ExactVerifier().verify(tree, logits, sampler, [0, 1])
    assert acceptance.num_accepted.tolist() == [1, 1]
    expected = margin[:, [0, 2]]
    torch.testing.assert_close(sampler.margins_at(torch.tensor([[0, 2]] * 2)), expected)
    for gap in expected.flatten().tolist():
        found = NearTies(gap * 1.001).find(sampler, acceptance)
        assert found[:, :2].tolist() == (expected < gap * 1.001).long().tolist()
        assert not found[:, 2:].any()


def test_half_precision_counts_without_being_asked() -> None:
    model = new_model("llama").to(torch.bfloat16)
    fast = specdec.accelerate(model, "lookahead")
    fast.generate(**prompts(12), max_new_tokens=20)
    assert fast.report.num_near_ties is not None
    assert fast.report.near_tie_gap == 4 * fast.capability.rounding > 0
    fast.generate(**prompts(12), max_new_tokens=20, do_sample=True, temperature=0.5)
    assert fast.report.near_tie_gap == 8 * fast.capability.rounding
    assert "num_near_ties" in str(fast.report)
    demanded = specdec.accelerate(model, "lookahead", capability="tree")
    demanded.generate(**prompts(12), max_new_tokens=20)
    assert demanded.report.near_tie_gap == 4 * fast.capability.rounding
    fast = specdec.accelerate(model, "lookahead", verifier="typical")
    fast.generate(**prompts(12), max_new_tokens=20, do_sample=True)
    assert fast.report.num_near_ties is None


def test_float32_counts_none_and_the_guard_is_gone() -> None:
    fast = specdec.accelerate(tiny_model(), "lookahead")
    fast.generate(**prompts(12), max_new_tokens=20)
    assert (fast.report.num_near_ties, fast.report.near_tie_gap) == (None, None)
    for make in (partial(specdec.accelerate, tiny_model()), specdec.speculate):
        with pytest.raises(TypeError, match="near_tie_guard"):
            make(near_tie_guard=True)


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_static_step_counts_too(do_sample: bool) -> None:
    model = new_model("llama").to(torch.bfloat16)
    counts = []
    for graphs in (False, "eager"):
        torch.manual_seed(0)
        drafter = RandomTreeDrafter([[5] * 60])
        fast = specdec.accelerate(model, drafter, cuda_graphs=graphs, budget=Budget(16, fixed=True))
        fast.generate(**prompts(12), max_new_tokens=60, do_sample=do_sample)
        counts.append(fast.report.num_near_ties)
    assert counts[0] is not None and counts[1] is not None
    assert 0 < counts[0] < 2 * counts[1] < 4 * counts[0] < 4 * 60  # its attention is wider, and rounds otherwise
