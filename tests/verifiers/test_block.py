"""Block verification by exact enumeration, and against traversal verification, which on a chain is the same rule."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from specdec.tree import TokenTree
from specdec.verifiers import BlockVerifier, TraversalVerifier, block
from tests.verifiers.enumeration import TinyModel, compare, draw_tree
from tests.verifiers.test_traversal import (
    CHAIN,
    FULL,
    MODELS,
    RecordedDraws,
    assert_exact,
    below_likely,
    best,
    drawn_tree,
    kept_by_nearly_equal_models,
    likely,
    verify,
)


@pytest.mark.parametrize("models", MODELS)
@pytest.mark.parametrize("parents", [[-1, 0], CHAIN, FULL], ids=["one", "chain", "tree"])
def test_the_output_has_the_targets_distribution(parents: list[int], models: str) -> None:
    target, draft = MODELS[models]
    outcome = compare(BlockVerifier(), partial(draw_tree, parents=parents), target, draft)
    assert_exact(outcome)
    by_traversal = compare(TraversalVerifier(), partial(draw_tree, parents=parents), target, draft)
    assert outcome.accepted == pytest.approx(by_traversal.accepted, abs=1e-12)


@pytest.mark.parametrize("models", MODELS)
def test_drafting_may_stop_after_an_unlikely_token(models: str) -> None:
    assert_exact(compare(BlockVerifier(), partial(draw_tree, parents=CHAIN, keep=below_likely), *MODELS[models]))


@pytest.mark.parametrize("trap", [{"keep": likely}, {"pick": best}], ids=["dropped", "not drawn"])
def test_trap_is_noticed(trap: dict[str, Any]) -> None:
    grow = partial(draw_tree, parents=CHAIN, **trap)
    assert max(compare(BlockVerifier(), grow, *MODELS[f"random {seed}"]).distance for seed in range(3)) > 0.01


def accepted_token_by_token(target: TinyModel, draft: TinyModel) -> float:
    """What the older rule accepts of a chain of two: each token with min(1, target / draft), to the first refused."""
    first = torch.minimum(target.tables[0][0], draft.tables[0][0])
    second = torch.minimum(target.tables[1], draft.tables[1]).sum(1)
    return float(first.sum() + (first * second).sum())


def test_more_is_accepted_than_token_by_token() -> None:
    gains = []
    for name, (target, draft) in MODELS.items():
        accepted = compare(BlockVerifier(), partial(draw_tree, parents=CHAIN), target, draft).accepted
        gains.append(accepted - accepted_token_by_token(target, draft))
        assert gains[-1] > -1e-12, name
    assert max(gains) > 0.01


def test_a_small_residual_does_not_vanish_beside_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept_by_nearly_equal_models(BlockVerifier()) == 1.0
    monkeypatch.setattr(block, "kept_after_rejection", lambda residual, reached: residual / (1 + residual - reached))
    assert kept_by_nearly_equal_models(BlockVerifier()) != 1.0


def chains(seed: int, batch: int = 16, vocab: int = 50) -> tuple[TokenTree, torch.Tensor]:
    """Drawn chains of different lengths, one of them the root alone."""
    tree, scores = drawn_tree(seed, batch, vocab, nodes=6)
    lengths = torch.arange(batch) % 6
    parents = torch.arange(-1, 5).expand(batch, -1).clone()
    parents[torch.arange(6) > lengths[:, None]] = -1
    assert tree.draft_probs is not None
    tokens = tree.tokens.clone()
    tokens[:, 1:] = torch.multinomial(tree.draft_probs[:, :-1].flatten(0, 1), 1).view(batch, -1)
    return TokenTree(tokens, parents, draft_probs=tree.draft_probs), scores


def test_on_ragged_chains_it_does_what_traversal_does() -> None:
    accepted = 0
    for seed in range(20):
        tree, scores = chains(seed)
        results, probs = [], []
        for verifier in (BlockVerifier(RecordedDraws()), TraversalVerifier(RecordedDraws())):
            torch.manual_seed(seed)
            results.append(verify(verifier, tree, scores))
            probs.append(verifier.draws.probs)
        real = tree.is_real.clone()
        real[:, 0] = False
        assert torch.allclose(probs[0][real], probs[1][real], atol=1e-5)
        assert torch.equal(results[0].num_accepted, results[1].num_accepted)
        assert torch.equal(results[0].nodes, results[1].nodes)
        for row, count in enumerate(results[0].num_accepted.tolist()):
            assert torch.equal(results[0].tokens[row, : count + 1], results[1].tokens[row, : count + 1])
        accepted += int(results[0].num_accepted.sum())
    assert accepted > 0


def test_impossible_tokens_are_never_emitted() -> None:
    torch.manual_seed(0)
    for seed in range(40):
        tree, scores = chains(seed, vocab=5)
        acceptance = verify(BlockVerifier(), tree, scores)
        for row, count in enumerate(acceptance.num_accepted.tolist()):
            tokens = acceptance.tokens[row, : count + 1]
            assert bool(scores[row, torch.arange(count + 1), tokens].isfinite().all())
