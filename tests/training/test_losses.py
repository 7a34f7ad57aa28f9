"""Targets and the blockwise loss, against the definition spelled out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.heads import MedusaHeads
from specdec.training.losses import IGNORED, NUM_RANKS, chunked_loss, medusa_targets
from specdec.training.recipes import head_losses
from tests.tiny_models import VOCAB, new_model

HEADS, POSITIONS, HIDDEN = 3, 37, 16
Targets = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def packed(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Two windows with segments of several lengths, padding, and prompts that are not supervised."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (2, 16), generator=generator)
    segments = torch.tensor([[1] * 5 + [2] * 7 + [3] * 2 + [0] * 2, [1] * 16])
    supervised = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 0, 1, 0, 0], [0] * 4 + [1] * 12])
    return ids, supervised, segments


def check_targets(function: Targets) -> None:
    """Head k at t says token t+1+k; only supervised tokens of the same segment count."""
    ids, supervised, segments = packed()
    found = function(ids, supervised, segments, HEADS)
    assert found.shape == (HEADS + 1, *ids.shape)
    for k in range(HEADS + 1):
        for row in range(ids.shape[0]):
            for t in range(ids.shape[1]):
                there = t + 1 + k
                counts = there < ids.shape[1] and segments[row, t] == segments[row, there] != 0
                counts = bool(counts and supervised[row, there])
                assert found[k, row, t] == (ids[row, there] if counts else IGNORED), (k, row, t)


def test_targets_are_those_of_the_definition() -> None:
    check_targets(medusa_targets)


def labels_off_by_one(ids: Tensor, supervised: Tensor, segments: Tensor, num_heads: int) -> Tensor:
    return medusa_targets(ids, supervised, segments, num_heads + 1)[1:]


def prompts_supervised(ids: Tensor, supervised: Tensor, segments: Tensor, num_heads: int) -> Tensor:
    return medusa_targets(ids, torch.ones_like(supervised), segments, num_heads)


def segments_joined(ids: Tensor, supervised: Tensor, segments: Tensor, num_heads: int) -> Tensor:
    return medusa_targets(ids, supervised, (segments != 0).long(), num_heads)


@pytest.mark.parametrize("mutant", [labels_off_by_one, prompts_supervised, segments_joined])
def test_planted_faults_in_the_targets_are_caught(mutant: Targets) -> None:
    with pytest.raises(AssertionError):
        check_targets(mutant)


def test_a_window_shorter_than_the_heads_reach_has_no_targets_for_them() -> None:
    ids = torch.tensor([[5, 6, 7]])
    found = medusa_targets(ids, torch.ones_like(ids), torch.ones_like(ids), 5)
    assert (found[2:] == IGNORED).all()
    assert found[:2].tolist() == [[[6, 7, IGNORED]], [[7, IGNORED, IGNORED]]]


def case(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(VOCAB, (HEADS, POSITIONS), generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.3] = IGNORED
    return {
        "features": torch.randn(HEADS, POSITIONS, HIDDEN, generator=generator, requires_grad=True),
        "weight": torch.randn(HEADS, VOCAB, HIDDEN, generator=generator, requires_grad=True),
        "targets": targets,
        "coefficients": torch.tensor([0.5, 0.01, 2e-4]),
    }


def plain_loss(features: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> Tensor:
    logits = features @ weight.mT
    sums = [F.cross_entropy(logits[k], targets[k], ignore_index=IGNORED, reduction="sum") for k in range(HEADS)]
    return (torch.stack(sums) * coefficients).sum()


def blockwise(features: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor, positions: int) -> Any:
    """With blocks of so many positions."""
    mib = positions * VOCAB * HEADS / 2**18
    sizes = []

    def project(part: Tensor) -> Tensor:
        sizes.append(part.shape[1])
        return part @ weight.mT

    sums = chunked_loss(features, targets, coefficients, project, VOCAB, [weight], logits_mib=mib)
    assert max(sizes) <= positions
    assert sum(sizes) == features.shape[1]
    return sums


@pytest.mark.parametrize("positions", [1, 5, 100])
def test_loss_and_gradients_are_those_of_plain_cross_entropy(positions: int) -> None:
    mine, plain = case(), case()
    sums = blockwise(**mine, positions=positions)
    expected = plain_loss(**plain)
    torch.testing.assert_close(sums.loss, expected, rtol=1e-5, atol=1e-6)
    (sums.loss * 3).backward()
    (expected * 3).backward()
    for name in ("features", "weight"):
        torch.testing.assert_close(mine[name].grad, plain[name].grad, rtol=1e-4, atol=1e-6)


def test_ranks_are_counted_in_the_same_pass() -> None:
    values = case()
    sums = blockwise(**values, positions=7)
    logits = values["features"] @ values["weight"].mT
    order = logits.argsort(-1, descending=True)
    for k in range(HEADS):
        valid = values["targets"][k] != IGNORED
        places = (order[k][valid] == values["targets"][k][valid][:, None]).float().argmax(-1)
        assert sums.ranks[k].tolist() == [int((places == rank).sum()) for rank in range(NUM_RANKS)]


def test_without_gradients_nothing_is_differentiated() -> None:
    values = case()
    with torch.no_grad():
        sums = blockwise(**values, positions=7)
    assert not sums.loss.requires_grad
    torch.testing.assert_close(sums.loss, plain_loss(**values).detach(), rtol=1e-5, atol=1e-6)


def test_no_supervised_position_gives_zero_and_zero_gradients() -> None:
    values = case()
    features = values["features"][:, :0].detach().requires_grad_()
    sums = chunked_loss(
        features, values["targets"][:, :0], values["coefficients"], lambda f: f @ values["weight"].mT, VOCAB
    )
    sums.loss.backward()
    assert sums.loss == 0


def test_divergence_from_a_teacher() -> None:
    mine, plain = case(), case()
    teacher = torch.randn(1, POSITIONS, VOCAB, generator=torch.Generator().manual_seed(5))
    for values in (mine, plain):
        values |= {n: values[n][:1].detach().requires_grad_(values[n].requires_grad) for n in values}
    sums = chunked_loss(
        mine["features"], mine["targets"], mine["coefficients"], lambda f: f @ mine["weight"].mT, VOCAB,
        [mine["weight"]], teacher=lambda block: teacher[:, block], logits_mib=0.003,
    )  # fmt: skip
    logits = plain["features"] @ plain["weight"].mT
    each = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    expected = (each * (plain["targets"] != IGNORED)).sum()
    torch.testing.assert_close(sums.divergence, expected.detach(), rtol=1e-5, atol=1e-5)
    sums.loss.backward()
    (expected * plain["coefficients"][0]).backward()
    for name in ("features", "weight"):
        torch.testing.assert_close(mine[name].grad, plain[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("version", ["1", "2"])
def test_heads_project_supervised_positions_only(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = MedusaHeads.for_model(new_model("llama"), HEADS, version=version)
    ids, supervised, segments = packed()
    targets = medusa_targets(ids, supervised, segments, HEADS)[1:]
    projected = []
    project = heads.project
    monkeypatch.setattr(heads, "project", lambda features: projected.append(features.shape[1]) or project(features))
    hidden = torch.randn(*ids.shape, heads.config.hidden_size)
    sums = head_losses(heads, hidden, targets, torch.ones(HEADS), 64)
    sums.loss.backward()
    assert sum(projected) == int((targets != IGNORED).any(0).sum())
    for k in range(HEADS):
        expected = F.cross_entropy(
            heads(hidden)[k].flatten(0, 1), targets[k].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        torch.testing.assert_close(sums.cross_entropy[k], expected.detach(), rtol=1e-4, atol=1e-4)
    assert all(p.grad is not None for p in heads.parameters())
