"""The lossless default: follow the target's own token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels import followed, host_array
from specdec.sampling import Sampler
from specdec.tree import TokenTree
from specdec.verifiers.base import Acceptance, Verifier


@dataclass
class ExactVerifier(Verifier):
    """Steps from the root to the child that holds the token the target itself picks, until there is none.

    Lossless for any tree, greedy or sampled: the output is what the target picks at each accepted node, so a draft
    decides only how many picks one pass is worth. For deterministic drafts no rule accepts more ("Accelerating Large
    Language Model Decoding with Speculative Sampling", arXiv 2302.01318, restated for trees with the target's own
    sample in place of the acceptance test).
    """

    name = "exact"
    guarantee = "token-identical"

    def verify(self, tree: TokenTree, logits: Tensor, sampler: Sampler, rows: Sequence[int]) -> Acceptance:
        picks = sampler.pick(tree, logits, rows)
        return follow_on_host(tree, picks) if picks.is_cpu else self.follow(tree, picks)

    @staticmethod
    def follow(tree: TokenTree, picks: Tensor) -> Acceptance:
        """Accepts the path along which each node's child holds the node's pick; tensors only, no value is read.

        Args:
            tree: `[batch, nodes]`.
            picks: The target's token at each node, `[batch, nodes]`.
        """
        if tree.num_nodes == 1:
            none = picks.new_empty((len(picks), 0))
            return Acceptance(none, picks, picks.new_zeros(len(picks)))

        is_match = (picks.gather(1, tree.parents.clamp(min=0)) == tree.tokens) & tree.is_real
        is_match[:, 0] = True
        is_accepted = ~(tree.ancestor_mask & ~is_match[:, None]).any(-1)
        last = (tree.depths * is_accepted).max(1).indices  # among equal siblings the first
        return Acceptance.of_paths(tree, last, picks.gather(1, last[:, None])[:, 0])


def follow_on_host(tree: TokenTree, picks: Tensor) -> Acceptance:
    """The same as `ExactVerifier.follow`, in one go."""
    nodes, tokens, counts = map(torch.from_numpy, followed(tree.host_tokens, tree.host_parents, host_array(picks)))
    return Acceptance(nodes, tokens, counts)
