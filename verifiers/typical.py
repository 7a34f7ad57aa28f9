"""Medusa's typical acceptance: approximate, to be asked for by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.sampling import Sampler, not_row_wise
from specdec.tree import TokenTree
from specdec.verifiers.base import Acceptance, Verifier
from specdec.verifiers.exact import ExactVerifier


@dataclass
class TypicalVerifier(Verifier):
    """Accepts draft tokens that the target finds likely enough, whether or not it would have picked them.

    A node x is accepted when its parent is and `p(x) > min(epsilon, delta * exp(-H(p)))`, with p the target's
    distribution behind the parent, processors applied, and H its entropy: the less sure the target is, the less is
    asked for. The longest path is taken, the likelier one among equals, and the sampler's own pick follows it.
    "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads", arXiv 2401.10774, section 2.3.1.

    The output is **not** distributed as the target's: unlikely tokens grow rarer. Without sampling, and with
    processors that may keep state, only the target's own picks are accepted.

    Args:
        epsilon: Probability that is always enough.
        delta: Share of `exp(-entropy)` that is enough.
    """

    name = "typical"
    guarantee = "approximate"

    epsilon: float = 0.09
    delta: float = 0.3

    def __post_init__(self) -> None:
        for name in ("epsilon", "delta"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ValueError(
                    f"{name}={value} must be above 0 and at most 1; the paper's are epsilon=0.09, delta=0.3"
                )

    def verify(self, tree: TokenTree, logits: Tensor, sampler: Sampler, rows: Sequence[int]) -> Acceptance:
        if sampler.noise is None or tree.num_nodes == 1 or not_row_wise(sampler.processors):
            return ExactVerifier().verify(tree, logits, sampler, rows)
        scores = sampler.process(tree, logits, rows)  # [B, N, V]
        last = self._last_accepted(tree, scores.softmax(-1))  # [B]
        picks = sampler.select(scores, tree, rows)
        return Acceptance.of_paths(tree, last, picks.gather(1, last[:, None])[:, 0])

    def _last_accepted(self, tree: TokenTree, probs: Tensor) -> Tensor:
        """End of the path to accept, 0 for none, `[batch]`. `probs`: `[batch, nodes, vocab]`."""
        parents = tree.parents.clamp(min=0)
        least = (self.delta * torch.exp(-torch.special.entr(probs).sum(-1))).clamp(max=self.epsilon)  # [B, N]
        batch = torch.arange(len(parents), device=parents.device)[:, None]
        prob = probs[batch, parents, tree.tokens]  # [B, N]
        is_typical = (prob > least.gather(1, parents)) & tree.is_real
        is_typical[:, 0] = True
        is_accepted = ~(tree.ancestor_mask & ~is_typical[:, None]).any(-1)
        accepted_depths = tree.depths * is_accepted
        is_longest = is_accepted & (accepted_depths == accepted_depths.max(1, keepdim=True).values)
        log_prob = prob.log()
        log_prob[:, 0] = 0.0
        likelihood = torch.where(tree.ancestor_mask, log_prob[:, None], 0.0).sum(-1)
        return likelihood.masked_fill(~is_longest, -torch.inf).argmax(1)
