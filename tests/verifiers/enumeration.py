"""Exact enumeration: every branch of drafting and verification is replayed, and its weight summed, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.tree import TokenTree
from specdec.verifiers import Acceptance, Verifier
from specdec.verifiers.draft_sampling import RandomDraws

# --- all branches -----------------------------------------------------------------------------------------------------


class UndecidedError(Exception):
    """A random choice is reached that the script says nothing about."""

    def __init__(self, outcomes: Tensor, weights: Tensor) -> None:
        self.outcomes = outcomes  # [outcomes, ...]
        self.weights = weights  # [branches, outcomes]


class ScriptedDraws(RandomDraws):
    """Makes the random choices as the script says. Each row of a batch is one branch.

    Args:
        branches: How many there are.
        script: Outcomes of the choices so far, `[branches, ...]` each.
    """

    def __init__(self, branches: int, script: list[Tensor]) -> None:
        self.branches = branches
        self.script = script
        self.next = 0

    def flip(self, probs: Tensor) -> Tensor:
        assert probs.shape[0] == self.branches and bool(((probs >= 0) & (probs <= 1)).all())
        width = probs[0].numel()
        outcomes = torch.cartesian_prod(*[torch.tensor([False, True])] * width).view(-1, *probs.shape[1:])
        weights = torch.where(outcomes, probs[:, None], 1 - probs[:, None]).flatten(2).prod(-1)
        return self._choose(outcomes, weights)

    def categorical(self, weights: Tensor) -> Tensor:
        assert weights.shape[0] == self.branches and bool((weights >= 0).all())
        return self._choose(torch.arange(weights.shape[1]), weights / weights.sum(1, keepdim=True))

    def _choose(self, outcomes: Tensor, weights: Tensor) -> Tensor:
        if self.next == len(self.script):
            raise UndecidedError(outcomes, weights)
        self.next += 1
        return self.script[self.next - 1]


def enumerate_branches(experiment: Callable[[ScriptedDraws], Any]) -> tuple[Tensor, Any]:
    """Replays an experiment, one random choice further each time, until every branch is followed to its end.

    Returns:
        Weight of each branch, `[branches]`, and what the experiment gave for all of them.
    """
    weights, script = torch.ones(1, dtype=torch.float64), []
    while True:
        try:
            return weights, experiment(ScriptedDraws(len(weights), script))
        except UndecidedError as choice:
            possible = (weights[:, None] * choice.weights).nonzero()
            branch, outcome = possible.unbind(1)
            weights = weights[branch] * choice.weights[branch, outcome]
            script = [chosen[branch] for chosen in script] + [choice.outcomes[outcome]]


# --- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TinyModel:
    """A distribution behind every prefix of generated tokens.

    Args:
        tables: Per length of the prefix, `[vocab ** length, vocab]`, float64.
    """

    tables: list[Tensor]

    @classmethod
    def random(cls, seed: int, vocab: int = 3, depth: int = 3, zeros: float = 0.0) -> TinyModel:
        """Random distributions.

        Args:
            seed: Decides them.
            vocab: Tokens.
            depth: Longest prefix, and one more.
            zeros: Share of tokens that are impossible, where another one is left.
        """
        generator = torch.Generator().manual_seed(seed)
        tables = []
        for length in range(depth):
            table = torch.rand(vocab**length, vocab, generator=generator, dtype=torch.float64) ** 2 + 1e-3
            impossible = torch.rand(table.shape, generator=generator) < zeros
            impossible[:, seed % vocab] = False
            table[impossible] = 0.0
            tables.append(table / table.sum(1, keepdim=True))
        return cls(tables)

    @property
    def vocab(self) -> int:
        return self.tables[0].shape[1]

    def behind(self, prefixes: Tensor, depths: Tensor) -> Tensor:
        """Distributions `[..., vocab]` behind prefixes, by their number and length; depths are those of one batch."""
        out = torch.zeros(*prefixes.shape, self.vocab, dtype=torch.float64)
        for length, table in enumerate(self.tables):
            at = depths == length
            out[at] = table[prefixes[at]]
        return out

    def joint(self, length: int, weights: dict[int, Tensor]) -> Tensor:
        """Joint distribution of the first `length` tokens, `[vocab ** length]`.

        Args:
            length: Tokens.
            weights: Of the prefixes from which the model goes on by itself, by their length, `[vocab ** length]` each.
        """
        mass = torch.zeros(1, dtype=torch.float64)
        for end in range(length + 1):
            mass = mass + weights.get(end, torch.zeros_like(mass))
            if end < length:
                mass = (mass[:, None] * self.tables[end]).flatten()
        return mass


# --- drafting ---------------------------------------------------------------------------------------------------------

Grow = Callable[[ScriptedDraws, TinyModel], TokenTree]


def prefix_numbers(tree: TokenTree, vocab: int) -> Tensor:
    """The number of the prefix at each node, digits being tokens, `[batch, nodes]`."""
    numbers = torch.zeros_like(tree.tokens)
    row = torch.arange(len(numbers))
    for node in range(1, tree.num_nodes):
        numbers[:, node] = numbers[row, tree.parents[:, node].clamp(min=0)] * vocab + tree.tokens[:, node]
    return numbers.masked_fill(~tree.is_real, 0)


def draw_tree(
    draws: ScriptedDraws,
    draft: TinyModel,
    parents: list[int],
    *,
    replacement: bool = False,
    keep: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    pick: Callable[[Tensor], Tensor] | None = None,
) -> TokenTree:
    """Grows a tree of a given shape in every branch, and records what its tokens were drawn from.

    Args:
        draws: Makes the random choices.
        draft: The draft model.
        parents: The shape. Children stand in the order in which they are drawn.
        replacement: Draw a node's children independently; otherwise without those before.
        keep: Which drawn nodes stay, by their probability, their parent's and whether they equal a sibling before.
        pick: Takes a token of what is left in place of a draw.
    """
    batch, nodes = draws.branches, len(parents)
    tokens, tree_parents = torch.zeros(batch, nodes).long(), torch.full((batch, nodes), -1)
    numbers, depths = torch.zeros(batch, nodes).long(), torch.zeros(nodes).long()
    draft_probs = torch.zeros(batch, nodes, draft.vocab, dtype=torch.float64)
    own_probs = torch.ones(batch, nodes, dtype=torch.float64)
    row = torch.arange(batch)
    for node in range(nodes):
        parent = parents[node]
        if node:
            probs = draft_probs[:, parent].clone()
            siblings = [other for other in range(1, node) if parents[other] == parent]
            if not replacement:
                for sibling in siblings:
                    probs[row, tokens[:, sibling]] *= (tree_parents[:, sibling] < 0).double()
            is_real = (probs.sum(1) > 0) & ((tree_parents[:, parent] >= 0) | (parent == 0))
            # A branch without a draw here must not multiply: its choice is certain.
            certain = F.one_hot(torch.zeros_like(row), draft.vocab).double()
            probs = torch.where(is_real[:, None], probs, certain)
            token = pick(probs) if pick else draws.categorical(probs)
            own_probs[:, node] = draft_probs[row, parent, token]
            if keep is not None:
                is_copy = torch.zeros(batch, dtype=torch.bool)
                for sibling in siblings:
                    is_copy |= (tokens[:, sibling] == token) & (tree_parents[:, sibling] >= 0)
                is_real &= keep(own_probs[:, node], own_probs[:, parent], is_copy)
            tokens[:, node] = torch.where(is_real, token, 0)
            tree_parents[:, node] = torch.where(is_real, parent, -1)
            numbers[:, node] = torch.where(is_real, numbers[:, parent] * draft.vocab + token, 0)
            depths[node] = depths[parent] + 1
        draft_probs[:, node] = draft.behind(numbers[:, node], depths[node].expand(batch))
    return TokenTree(tokens, tree_parents, draft_probs=draft_probs)


# --- the comparison ---------------------------------------------------------------------------------------------------


def verify_all(verifier: Any, draws: ScriptedDraws, tree: TokenTree, target: TinyModel) -> Acceptance:
    """Verifies every branch's tree against the tiny target, which is given in float64."""
    scores = target.behind(prefix_numbers(tree, target.vocab), tree.depths).log()
    sampler = SimpleNamespace(noise="not used", processors=[], process=lambda tree, logits, rows: logits)
    verifier.draws = draws
    return verifier.verify(tree, scores, sampler, range(len(scores)))


@dataclass(frozen=True)
class Outcome:
    """What a rule does, exactly.

    Args:
        distance: Total variation between the output's joint distribution and the target's.
        accepted: Expected number of accepted tokens.
        total: Sum of all weights: 1.
    """

    distance: float
    accepted: float
    total: float


def compare(verifier: Verifier, grow: Grow, target: TinyModel, draft: TinyModel) -> Outcome:
    """Enumerates drafting and verification, and compares the next tokens' joint distribution with the target's."""

    def experiment(draws: ScriptedDraws) -> Acceptance:
        return verify_all(verifier, draws, grow(draws, draft), target)

    weights, acceptance = enumerate_branches(experiment)
    by_length: dict[int, Tensor] = {}
    for count in acceptance.num_accepted.unique().tolist():
        at = acceptance.num_accepted == count
        digits = target.vocab ** torch.arange(count, -1, -1)
        numbers = (acceptance.tokens[at, : count + 1] * digits).sum(1)
        mass = torch.zeros(target.vocab ** (count + 1), dtype=torch.float64)
        by_length[count + 1] = mass.index_add(0, numbers, weights[at])
    length = len(target.tables)
    one = {0: torch.ones(1, dtype=torch.float64)}
    difference = target.joint(length, by_length) - target.joint(length, one)
    assert math.isfinite(float(difference.sum()))
    return Outcome(
        float(difference.abs().sum() / 2),
        float((weights * acceptance.num_accepted).sum()),
        float(weights.sum()),
    )
