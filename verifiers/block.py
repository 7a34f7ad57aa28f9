"""Block verification: the best rule for a chain of drawn tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.sampling import Sampler
from specdec.tree import TokenTree
from specdec.verifiers.base import Acceptance, Verifier
from specdec.verifiers.draft_sampling import (
    RandomDraws,
    drawn_from,
    follows_target,
    kept_after_rejection,
    of_vocabulary,
)
from specdec.verifiers.exact import ExactVerifier
from specdec.verifiers.traversal import TraversalVerifier


@dataclass
class BlockVerifier(Verifier):
    """Decides on a chain of drawn tokens as a whole: on the longest prefix that can be kept.

    With `reached[0] = 1` and `reached[i] = min(1, reached[i-1] * target_prob / draft_prob)` of the i-th token, the
    prefix of i tokens is kept with probability `S / (S + 1 - reached[i])`, where `S` is the mass of
    `(reached[i] * target_probs - draft_probs)+` behind it; the whole chain of g tokens with probability `reached[g]`.
    The longest prefix kept is accepted, and the next token drawn from that residual, or from the target behind the
    whole chain. "Block Verification Accelerates Speculative Decoding", arXiv 2403.10444, algorithm 2.

    The output has the target's distribution; no rule for drawn chains accepts more. Trees that branch are decided by
    `TraversalVerifier`, which on a chain is the same rule; what is not drawn, and greedy decoding, by `ExactVerifier`.

    Args:
        draws: Makes the random choices.
    """

    name = "block"
    guarantee = "distribution"

    draws: RandomDraws = field(default_factory=RandomDraws, repr=False)

    def verify(self, tree: TokenTree, logits: Tensor, sampler: Sampler, rows: Sequence[int]) -> Acceptance:
        if follows_target(tree, sampler):
            return ExactVerifier().verify(tree, logits, sampler, rows)
        if not tree.is_chain:
            return TraversalVerifier(self.draws).verify(tree, logits, sampler, rows)
        probs = sampler.process(tree, logits, rows).softmax(-1)  # [B, N, V]
        reached, residual = _reached_and_residual(tree, probs)
        mass = residual.sum(-1)  # [B, N-1]
        index = torch.arange(tree.num_nodes, device=mass.device)
        end = tree.is_real.sum(1) - 1
        kept = torch.cat([kept_after_rejection(mass, reached[:, :-1]), reached[:, -1:]], 1)
        kept = torch.where(index == end[:, None], reached, kept).masked_fill(~tree.is_real, 0.0)
        last = (index * self.draws.flip(kept)).max(1).values  # the root is kept in any case

        row = torch.arange(len(last), device=last.device)
        behind = last.clamp(max=tree.num_nodes - 2)
        is_residual = (last < end) & (mass[row, behind] > 0)
        next_probs = torch.where(is_residual[:, None], residual[row, behind], probs[row, last])
        return Acceptance.of_paths(tree, last, self.draws.categorical(next_probs))


def _reached_and_residual(tree: TokenTree, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Acceptance up to each node, `[batch, nodes]`, and what is left of the target there, `[batch, nodes - 1, vocab]`.

    Args:
        tree: Chains with `draft_probs`.
        probs: The target's, `[batch, nodes, vocab]`.
    """
    assert tree.draft_probs is not None
    tokens, probs = tree.tokens[:, 1:], probs[:, :-1]
    recorded = of_vocabulary(tree.draft_probs[:, :-1].to(probs.dtype), probs.shape[-1])
    draft, draft_of_token = drawn_from(recorded, tokens)
    ratios = probs.gather(-1, tokens[..., None])[..., 0] / draft_of_token
    levels = [torch.ones_like(ratios[:, 0])]
    for depth in range(ratios.shape[1]):
        levels.append((levels[-1] * ratios[:, depth]).clamp(max=1.0))
    reached = torch.stack(levels, 1)
    return reached, (reached[:, :-1, None] * probs).sub_(draft).clamp_(min=0.0)
