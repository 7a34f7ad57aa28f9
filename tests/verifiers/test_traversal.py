"""Rules for drawn tokens, by exact enumeration of everything random, and the known ways to get them wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.rows.draws import NoiseQueue
from specdec.rows.sequences import Sequences
from specdec.sampling import Sampler
from specdec.tree import TokenTree
from specdec.verifiers import ExactVerifier, TraversalVerifier, Verifier, draft_sampling, traversal
from specdec.verifiers.draft_sampling import RandomDraws
from tests.conformance import random_tree
from tests.verifiers.enumeration import Grow, Outcome, ScriptedDraws, TinyModel, compare, draw_tree

CHAIN = [-1, 0, 1]
FULL = [-1, 0, 0, 1, 1, 2, 2]
SHAPES = {
    "one child": [-1, 0],
    "chain": CHAIN,
    "two children": [-1, 0, 0],
    "branch below the first": [-1, 0, 0, 1, 1],
    "branch below the second": [-1, 0, 0, 2, 2],
    "depth before breadth": [-1, 0, 1, 0, 3, 1],
    "full": FULL,
}
MODELS: dict[str, tuple[TinyModel, TinyModel]] = {
    **{f"random {seed}": (TinyModel.random(seed), TinyModel.random(seed + 50)) for seed in range(3)},
    "vocabulary of two": (TinyModel.random(3, vocab=2), TinyModel.random(53, vocab=2)),
    "impossible tokens": (TinyModel.random(4, zeros=0.4), TinyModel.random(54, zeros=0.4)),
    "impossible in the draft": (TinyModel.random(5), TinyModel.random(55, zeros=0.6)),
    "impossible in the target": (TinyModel.random(6, zeros=0.6), TinyModel.random(56)),
    "the same": (TinyModel.random(7), TinyModel.random(7)),
}


def best(probs: Tensor) -> Tensor:
    return probs.argmax(1)


def no_copy(own: Tensor, parent: Tensor, is_copy: Tensor) -> Tensor:
    return ~is_copy


def likely(own: Tensor, parent: Tensor, is_copy: Tensor) -> Tensor:
    return own > 0.3


def below_likely(own: Tensor, parent: Tensor, is_copy: Tensor) -> Tensor:
    return parent > 0.3


def certain(draws: ScriptedDraws, draft: TinyModel) -> TokenTree:
    """The likeliest children everywhere, and no record."""
    tree = draw_tree(draws, draft, FULL, pick=best)
    return replace(tree, draft_probs=torch.zeros(*tree.tokens.shape, draft.vocab).double())


def certain_below_drawn(draws: ScriptedDraws, draft: TinyModel) -> TokenTree:
    """Children of the root are drawn; theirs are the same two tokens everywhere, with no record."""
    top = draw_tree(draws, draft, FULL[:3])
    batch = len(top.tokens)
    assert top.draft_probs is not None
    return TokenTree(
        torch.cat([top.tokens, torch.tensor([[0, 1, 1, 0]]).expand(batch, -1)], 1),
        torch.cat([top.parents, torch.tensor([FULL[3:]]).where(top.is_real[:, [1, 1, 2, 2]], -1)], 1),
        draft_probs=torch.cat([top.draft_probs[:, :1], torch.zeros(batch, 6, draft.vocab).double()], 1),
    )


DRAFTS: dict[str, Grow] = {
    **{f"drawn, {name}": partial(draw_tree, parents=shape) for name, shape in SHAPES.items()},
    "independent": partial(draw_tree, parents=FULL, replacement=True),
    "independent, without copies": partial(draw_tree, parents=FULL, replacement=True, keep=no_copy),
    "stopped after an unlikely token": partial(draw_tree, parents=[-1, 0, 0, 1, 2], keep=below_likely),
    "certain": certain,
    "certain below drawn": certain_below_drawn,
}


def assert_exact(outcome: Outcome) -> None:
    assert outcome.total == pytest.approx(1.0, abs=1e-12)
    assert outcome.distance < 1e-12


@pytest.mark.parametrize("models", MODELS)
@pytest.mark.parametrize("draft", DRAFTS)
def test_the_output_has_the_targets_distribution(draft: str, models: str) -> None:
    assert_exact(compare(TraversalVerifier(), DRAFTS[draft], *MODELS[models]))


def test_the_first_leaf_is_accepted_of_a_draft_model_that_is_the_target() -> None:
    for name, shape in SHAPES.items():
        node = depth = 0
        while node in shape:
            node, depth = shape.index(node), depth + 1
        outcome = compare(TraversalVerifier(), DRAFTS[f"drawn, {name}"], *MODELS["the same"])
        assert outcome.accepted == pytest.approx(depth)


def test_more_children_are_worth_more() -> None:
    for target, draft in MODELS.values():
        accepted = [
            compare(TraversalVerifier(), partial(draw_tree, parents=SHAPES[name]), target, draft).accepted
            for name in ("chain", "full")
        ]
        assert accepted[1] >= accepted[0] - 1e-12


# --- traps ------------------------------------------------------------------------------------------------------------


def with_replacement(patch: pytest.MonkeyPatch) -> None:
    """The rule for independent draws."""
    patch.setattr(traversal, "without_tokens", lambda draft_probs, tokens: draft_probs)


def as_it_is(patch: pytest.MonkeyPatch) -> None:
    """Here the drafter is wrong."""


TRAPS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Grow]] = {
    "the likeliest children pass for drawn ones": (as_it_is, partial(draw_tree, parents=FULL, pick=best)),
    "draws without replacement, rule for those with": (with_replacement, partial(draw_tree, parents=FULL)),
    "independent draws without copies, rule for those with them": (
        with_replacement,
        partial(draw_tree, parents=FULL, replacement=True, keep=no_copy),
    ),
    "an unlikely token is dropped": (as_it_is, partial(draw_tree, parents=FULL, keep=likely)),
    "an unlikely token of a chain is dropped": (as_it_is, partial(draw_tree, parents=CHAIN, keep=likely)),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_trap_is_noticed(trap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, grow = TRAPS[trap]
    plant(monkeypatch)
    distances = [compare(TraversalVerifier(), grow, *MODELS[f"random {seed}"]).distance for seed in range(3)]
    assert max(distances) > 0.01


class RecordedDraws(RandomDraws):
    """Keeps the probabilities of all flips."""

    def flip(self, probs: Tensor) -> Tensor:
        self.probs = probs
        return super().flip(probs)


def verify(verifier: Any, tree: TokenTree, scores: Tensor) -> Any:
    sampler: Any = SimpleNamespace(noise="not used", processors=[], process=lambda tree, logits, rows: logits)
    return verifier.verify(tree, scores, sampler, range(len(scores)))


def nearly_equal_models() -> tuple[TokenTree, Tensor]:
    """A chain where the path is certain up to its first token, and behind it the target's residual is about 1e-7."""
    draft_probs = torch.tensor([[0.2, 0.8], [1 - 3e-7, 3e-7], [0.5, 0.5]])
    target_probs = torch.tensor([[0.9, 0.1], [1 - 4e-7, 4e-7], [0.5, 0.5]])
    tree = TokenTree.from_rows([[0, 0, 1]], [[-1, 0, 1]])
    return TokenTree(tree.tokens, tree.parents, draft_probs=draft_probs[None]), target_probs.log()[None]


def kept_by_nearly_equal_models(verifier: Any) -> float:
    verifier.draws = RecordedDraws()
    verify(verifier, *nearly_equal_models())
    return float(verifier.draws.probs[0, 1])


def test_a_small_residual_does_not_vanish_beside_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept_by_nearly_equal_models(TraversalVerifier()) == 1.0
    # The trap: the same denominator in the order in which it is often printed.
    monkeypatch.setattr(
        traversal, "kept_after_rejection", lambda residual, reached: residual / (1 + residual - reached)
    )
    assert kept_by_nearly_equal_models(TraversalVerifier()) != 1.0


# --- numbers ----------------------------------------------------------------------------------------------------------


def drawn_tree(seed: int, batch: int, vocab: int, nodes: int = 12) -> tuple[TokenTree, Tensor]:
    """Trees drawn from random distributions, and a target's scores, with impossible tokens in both. float32."""
    generator = torch.Generator().manual_seed(seed)
    tree = random_tree(seed, batch, nodes)
    scores = 2 * torch.randn(batch, nodes, vocab, generator=generator)
    logits = scores + torch.randn(scores.shape, generator=generator)
    for values, share in ((scores, 0.5), (logits, 0.3)):
        impossible = torch.rand(values.shape, generator=generator) < share
        impossible[..., 0] = False
        values[impossible] = -torch.inf
    draft_probs = logits.softmax(-1)
    left, tokens, row = draft_probs.clone(), tree.tokens.clone(), torch.arange(batch)
    for node in range(1, nodes):
        parent = tree.parents[:, node].clamp(min=0)
        tokens[:, node] = torch.multinomial(left[row, parent] + 1e-30, 1, generator=generator)[:, 0]
        left[row, parent, tokens[:, node]] = 0.0
    return TokenTree(tokens, tree.parents, draft_probs=draft_probs), scores


@pytest.mark.parametrize("vocab", [4, 50])
def test_impossible_tokens_are_never_emitted(vocab: int) -> None:
    torch.manual_seed(0)
    row, emitted = torch.arange(64), 0
    for seed in range(20):
        tree, scores = drawn_tree(seed, batch=64, vocab=vocab)
        acceptance = verify(TraversalVerifier(), tree, scores)
        node = torch.zeros(64).long()
        for depth in range(int(acceptance.num_accepted.max()) + 1):
            is_there = depth <= acceptance.num_accepted
            emitted_scores = scores[row, node, acceptance.tokens[:, depth].clamp(0, vocab - 1)]
            assert bool(emitted_scores[is_there].isfinite().all())
            emitted += int(is_there.sum())
            node = acceptance.nodes[:, depth].clamp(min=0)
    assert emitted > 64 * 20


def test_float32_is_enough() -> None:
    """Probabilities of acceptance in float32 are those in float64, with a vocabulary of real size."""
    tree, scores = drawn_tree(3, batch=2, vocab=20_000, nodes=16)
    single, double = TraversalVerifier(RecordedDraws()), TraversalVerifier(RecordedDraws())
    verify(single, tree, scores)
    verify(double, replace(tree, draft_probs=tree.draft_probs.double()), scores.double())  # type: ignore[union-attr]
    assert single.draws.probs.dtype == torch.float32
    assert torch.allclose(single.draws.probs.double(), double.draws.probs, atol=1e-5)


def test_choices_never_have_no_probability() -> None:
    draws = RandomDraws()
    assert not bool(draws.flip(torch.zeros(100_000)).any())
    assert bool(draws.flip(torch.ones(100_000)).all())
    weights = torch.zeros(100_000, 4)
    weights[:, 2] = 1e-38
    assert bool((draws.categorical(weights) == 2).all())


@pytest.mark.parametrize("draft_vocab", [40, 64])
def test_draft_models_may_have_a_smaller_or_a_padded_vocabulary(draft_vocab: int) -> None:
    tree, scores = drawn_tree(1, batch=8, vocab=50)
    assert tree.draft_probs is not None
    keep = min(draft_vocab, 50)
    draft_probs = tree.draft_probs[..., :keep] / tree.draft_probs[..., :keep].sum(-1, keepdim=True)
    tree = TokenTree(tree.tokens.clamp(max=keep - 1), tree.parents, draft_probs=draft_probs)
    results = []
    for width in (50, draft_vocab):
        torch.manual_seed(0)
        sized = replace(tree, draft_probs=draft_sampling.of_vocabulary(draft_probs, width))
        results.append(verify(TraversalVerifier(), sized, scores))
    assert torch.equal(results[0].num_accepted, results[1].num_accepted)
    assert torch.equal(results[0].nodes, results[1].nodes)


def test_rows_are_verified_apart_and_inputs_are_left_alone() -> None:
    tree, scores = drawn_tree(2, batch=5, vocab=50)
    assert tree.draft_probs is not None
    copies = tree.draft_probs.clone(), scores.clone()
    together = TraversalVerifier(RecordedDraws())
    acceptance = verify(together, tree, scores)
    assert torch.equal(tree.draft_probs, copies[0]) and torch.equal(scores, copies[1])
    for row in range(5):
        one = slice(row, row + 1)
        alone = TraversalVerifier(RecordedDraws())
        verify(alone, TokenTree(tree.tokens[one], tree.parents[one], draft_probs=tree.draft_probs[one]), scores[one])
        assert torch.allclose(alone.draws.probs[0], together.draws.probs[row], atol=1e-6)
    assert acceptance.nodes.shape == (5, 12) and acceptance.tokens.shape == (5, 13)
    assert {t.dtype for t in (acceptance.nodes, acceptance.tokens, acceptance.num_accepted)} == {torch.int64}
    for row, count in enumerate(acceptance.num_accepted.tolist()):
        nodes = acceptance.nodes[row, :count].tolist()
        assert tree.parents[row, nodes].tolist() == [0, *nodes][:count]
        assert acceptance.tokens[row, :count].tolist() == tree.tokens[row, nodes].tolist()


def post_order(parents: list[int], node: int = 0) -> list[int]:
    children = [child for child in range(1, len(parents)) if parents[child] == node]
    return [below for child in children for below in post_order(parents, child)] + [node]


def test_nodes_are_tried_children_first_and_siblings_in_order() -> None:
    for seed in range(10):
        tree = random_tree(seed)
        rounds, places = traversal.traversal_order(tree.host_parents)
        for row, parents in enumerate(tree.parents.tolist()):
            expected = post_order(parents)
            assert places[row].argsort(kind="stable")[: len(expected)].tolist() == expected
            assert (places[row] == tree.num_nodes).sum() == tree.num_nodes - len(expected)
            for node in range(1, tree.num_nodes):
                parent = parents[node]
                before = [other for other in range(1, node) if parents[other] == parent]
                waits_for = before[-1] if before else parent
                assert rounds[row, node] == (rounds[row, waits_for] + 1 if parent >= 0 else 0)


# --- the exact rule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["greedy", "no record", "root only"])
def test_without_draws_the_targets_own_token_is_followed(case: str) -> None:
    for seed in range(10):
        tree, scores = drawn_tree(seed, batch=3, vocab=50)
        tree = TokenTree(tree.tokens, tree.parents) if case == "no record" else tree
        tree, scores = (tree.first(1), scores[:, :1]) if case == "root only" else (tree, scores)

        def run(verifier: Verifier, tree: TokenTree = tree, scores: Tensor = scores) -> Any:
            torch.manual_seed(0)
            noise = None if case == "greedy" else NoiseQueue(3, torch.device("cpu"))
            sequences = Sequences(torch.zeros(3, 1).long(), None, 50)
            sampler = Sampler([], noise is not None, sequences, noise)  # type: ignore[arg-type]
            return verifier.verify(tree, scores, sampler, [0, 1, 2])

        expected, got = run(ExactVerifier()), run(TraversalVerifier())
        assert torch.equal(expected.num_accepted, got.num_accepted)
        assert torch.equal(expected.nodes, got.nodes)
        for row, count in enumerate(expected.num_accepted.tolist()):
            assert torch.equal(expected.tokens[row, : count + 1], got.tokens[row, : count + 1])
