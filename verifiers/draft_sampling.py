"""What the rules share that compare the target's distribution with the one that draft tokens were drawn from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.sampling import Sampler, not_row_wise
from specdec.tree import TokenTree


class RandomDraws:
    """The random choices of a rule, from the global generator of the device. Tests put an enumeration in its place."""

    def flip(self, probs: Tensor) -> Tensor:
        """True with the given probabilities, independently, in their shape: never at 0, always at 1."""
        return torch.rand_like(probs) < probs

    def categorical(self, weights: Tensor) -> Tensor:
        """One index per row of `weights` `[batch, outcomes]`, which need not sum to 1; never one whose weight is 0."""
        noise = torch.empty_like(weights).exponential_()
        return (weights / noise.clamp_(min=torch.finfo(weights.dtype).tiny)).argmax(-1)


def follows_target(tree: TokenTree, sampler: Sampler) -> bool:
    """Whether the exact rule is the one to use, which is lossless for any tree and needs no draft distribution.

    So it is without sampling, for drafts that were not drawn from a recorded distribution, and for processors that may
    keep state and so must be called along one path only.
    """
    is_drawn = tree.draft_probs is not None and tree.num_nodes > 1
    return sampler.noise is None or not is_drawn or bool(not_row_wise(sampler.processors))


def of_vocabulary(draft_probs: Tensor, vocab: int) -> Tensor:
    """`draft_probs` `[..., draft_vocab]` as `[..., vocab]`: what the target lacks cannot have been drawn."""
    return F.pad(draft_probs, (0, vocab - draft_probs.shape[-1]))


def drawn_from(draft_probs: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The distributions that draft tokens were drawn from, and what these give the tokens.

    A token that has no probability there was put there by no draw: then it is certain, given what was drawn before it.

    Args:
        draft_probs: Recorded at the parent, `[..., vocab]`; zeros where nothing is.
        tokens: `[...]`.

    Returns:
        `[..., vocab]`, a copy, and `[...]`, above zero.
    """
    index = tokens[..., None]
    recorded = draft_probs.gather(-1, index)
    token_probs = torch.where(recorded > 0, recorded, 1.0)
    return (draft_probs * (recorded > 0)).scatter_(-1, index, token_probs), token_probs[..., 0]


def without_tokens(draft_probs: Tensor, tokens: Tensor) -> Tensor:
    """What the next sibling was drawn from: the distribution without the token drawn before, renormalised.

    Args:
        draft_probs: `[..., vocab]`.
        tokens: `[...]`.
    """
    rest = draft_probs.scatter(-1, tokens[..., None], 0.0)
    return rest.div_(rest.sum(-1, keepdim=True).clamp_(min=torch.finfo(rest.dtype).tiny))


def kept_after_rejection(residual: Tensor, reached: Tensor) -> Tensor:
    """Probability that a path is still accepted where it is, after what follows it was rejected.

    Args:
        residual: Mass that the target has left beyond the draft's.
        reached: Probability that the path was accepted before, in the same shape.
    """
    # In the order 1 - reached + residual a small residual would vanish beside the 1.
    return torch.where(residual > 0, residual / (residual + (1 - reached)), 0.0)
