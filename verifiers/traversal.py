"""Traversal verification: trees of drawn tokens, from the leaves to the root."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from specdec.kernels import Ints, kernel
from specdec.sampling import Sampler
from specdec.tree import TokenTree
from specdec.verifiers.base import Acceptance, Verifier
from specdec.verifiers.draft_sampling import (
    RandomDraws,
    drawn_from,
    follows_target,
    kept_after_rejection,
    of_vocabulary,
    without_tokens,
)
from specdec.verifiers.exact import ExactVerifier


@dataclass
class TraversalVerifier(Verifier):
    """Tries the leaves of a tree of drawn tokens one after another, and what is above them when it is a leaf itself.

    `reached` of the root is 1, of a node `min(1, reached[parent] * target_prob / draft_prob)`. The first leaf's whole
    path is accepted with probability `reached[leaf]`. Otherwise the leaf is taken away, and at its parent the residual
    `(reached * target_probs - draft_probs)+` of mass S becomes the target's distribution, the leaf's token leaves the
    draft's, and `reached` becomes `S / (S + 1 - reached)`. "Traversal Verification for Speculative Tree Decoding",
    arXiv 2505.12398, algorithm 1; children drawn without replacement as in Sequoia, arXiv 2402.12374.

    The output has the target's distribution if each node's children stand in the order in which they were drawn, from
    `draft_probs` at that node without the ones before, and none was left out for what it is. Children at a node without
    recorded distribution (zeros) count as certain. Trees without any, and greedy decoding, are decided by
    `ExactVerifier`.

    Args:
        draws: Makes the random choices.
    """

    name = "traversal"
    guarantee = "distribution"

    draws: RandomDraws = field(default_factory=RandomDraws, repr=False)

    def verify(self, tree: TokenTree, logits: Tensor, sampler: Sampler, rows: Sequence[int]) -> Acceptance:
        if follows_target(tree, sampler):
            return ExactVerifier().verify(tree, logits, sampler, rows)
        scores = sampler.process(tree, logits, rows)  # [B, N, V]
        batch, nodes = tree.tokens.shape
        rounds, order = traversal_order(tree.host_parents)
        reached, slots, residual = _walk(tree, scores, rounds)

        # What is tried, and with which probability, depends on no earlier outcome but that it failed: all is known now.
        is_kept = self.draws.flip(reached.masked_fill(~tree.is_real, 0.0))
        is_kept[:, 0] = True
        place = torch.from_numpy(order).to(is_kept.device, non_blocking=True)
        last = torch.where(is_kept, place, nodes).argmin(1)

        row = torch.arange(batch, device=last.device)
        slot = slots[row, last]
        of_target = scores[row, last].softmax(-1)
        next_probs = torch.where((slot >= 0)[:, None], residual[slot.clamp(min=0)], of_target)
        return Acceptance.of_paths(tree, last, self.draws.categorical(next_probs))


@kernel
def traversal_order(parents: Ints) -> tuple[Ints, Ints]:
    """When nodes are reached, and when they are tried.

    Args:
        parents: `[batch, nodes]`, every parent before its child; -1 at roots and padding.

    Returns:
        The round of each node: one after that of the sibling before it, of its parent if it has none; 0 at roots and
        padding. And its place in the order of trying, children before their parent; `nodes` at padding. Both are
        `[batch, nodes]`.
    """
    batch, nodes = parents.shape
    rounds = np.zeros((batch, nodes), np.int64)
    places = np.full((batch, nodes), nodes)
    for row in range(batch):
        latest = np.zeros(nodes, np.int64)  # round of each node's last child so far
        sizes = np.ones(nodes, np.int64)  # nodes at and below it
        free = np.zeros(nodes, np.int64)  # first place not yet given away below it
        for node in range(1, nodes):
            parent = parents[row, node]
            if parent >= 0:
                latest[parent] += 1
                rounds[row, node] = latest[node] = latest[parent]
        for node in range(nodes - 1, 0, -1):
            if parents[row, node] >= 0:
                sizes[parents[row, node]] += sizes[node]
        places[row, 0] = sizes[0] - 1
        for node in range(1, nodes):
            parent = parents[row, node]
            if parent >= 0:
                free[node] = free[parent]
                free[parent] += sizes[node]
                places[row, node] = free[parent] - 1
    return rounds, places


def _walk(tree: TokenTree, scores: Tensor, rounds: Ints) -> tuple[Tensor, Tensor, Tensor]:
    """Rejects every node in turn; round by round, since siblings wait for each other and for their parent only.

    Args:
        tree: With `draft_probs`.
        scores: Processed, `[batch, nodes, vocab]`.
        rounds: Of each node, `[batch, nodes]`.

    Returns:
        Each node's `reached` when it is tried, `[batch, nodes]`; the slot of each node that has children, -1 for
        leaves, `[batch, nodes]`; and the residual in each slot when its node is tried, `[slots, vocab]`.
    """
    assert tree.draft_probs is not None
    parents, device = tree.host_parents, scores.device
    batch, nodes = parents.shape
    slot_of = np.full((batch, nodes), -1)
    row, node = np.nonzero(rounds)
    slot_of[row, parents[row, node]] = 0
    slot_of[slot_of == 0] = np.arange((slot_of == 0).sum())
    by_round = np.argsort(rounds[row, node], kind="stable")
    row, node = row[by_round], node[by_round]
    parent = parents[row, node]
    ends = np.searchsorted(rounds[row, node], np.arange(1, rounds.max() + 1), side="right").tolist()
    last_round = np.zeros_like(rounds)  # by parent
    np.maximum.at(last_round, (row, parent), rounds[row, node])
    has_siblings = rounds[row, node] < last_round[row, parent]
    # One transfer: flat indices of the nodes in the order of their rounds, of their parents, and the parents' slots.
    packed = np.stack([row * nodes + node, row * nodes + parent, slot_of[row, parent]])
    steps = torch.from_numpy(packed).to(device, non_blocking=True)
    slots = torch.from_numpy(slot_of).to(device, non_blocking=True)

    inner = torch.from_numpy(np.flatnonzero(slot_of.ravel() >= 0)).to(device, non_blocking=True)
    target = scores.flatten(0, 1)[inner].softmax(-1)  # [S, V]
    recorded = tree.draft_probs.flatten(0, 1)[inner].to(target.dtype)
    draft = of_vocabulary(recorded, target.shape[-1])  # [S, V]
    tokens = tree.tokens.flatten()
    reached = torch.ones(batch * nodes, dtype=target.dtype, device=device)
    for start, end in zip([0, *ends], ends, strict=False):
        child, above, slot = steps[:, start:end]
        _reject(tokens[child], child, above, slot, bool(has_siblings[start:end].any()), reached, target, draft)
    return reached.view(batch, nodes), slots, target


def _reject(
    tokens: Tensor,
    child: Tensor,
    above: Tensor,
    slot: Tensor,
    has_siblings: bool,
    reached: Tensor,
    target: Tensor,
    draft: Tensor,
) -> None:
    """Reaches some nodes and takes them away again; no two of them have one parent.

    Args:
        tokens: Of the nodes, `[M]`.
        child: Their flat indices, `[M]`.
        above: Those of their parents, `[M]`.
        slot: The parents' slots, `[M]`.
        has_siblings: Whether any of their parents has another child behind.
        reached: Changed at the nodes and at their parents, `[batch * nodes]`.
        target: Changed at the parents: their residual, `[slots, vocab]`.
        draft: Changed at the parents: what the next child was drawn from, `[slots, vocab]`.
    """
    probs, recorded = target[slot], draft[slot]  # [M, V]
    before = reached[above]
    drawn, drawn_of_token = drawn_from(recorded, tokens)
    of_token = probs.gather(1, tokens[:, None])[:, 0]
    reached[child] = (before * of_token / drawn_of_token).clamp(max=1.0)
    residual = (before[:, None] * probs).sub_(drawn).clamp_(min=0.0)
    mass = residual.sum(-1)
    reached[above] = kept_after_rejection(mass, before)
    # An empty residual stands for an event that cannot happen, or happens by rounding alone.
    is_left = (mass > 0)[:, None]
    target[slot] = torch.where(is_left, residual, probs).div_(torch.where(is_left, mass[:, None], 1.0))
    if has_siblings:
        draft[slot] = without_tokens(recorded, tokens)
