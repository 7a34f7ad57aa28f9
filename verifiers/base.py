"""What a verifier is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from specdec.sampling import Sampler
from specdec.tree import TokenTree


@dataclass(frozen=True)
class Acceptance:
    """The outcome of one verification.

    Args:
        nodes: Per row the accepted draft nodes from the root's child down, `[batch, depth]`, int64, -1 behind the end.
        tokens: Per row the accepted tokens and then the next token (bonus or replacement), `[batch, depth + 1]`, int64;
            entries behind the next token are undefined.
        num_accepted: Accepted draft tokens per row, `[batch]`, int64.
    """

    nodes: Tensor
    tokens: Tensor
    num_accepted: Tensor

    @classmethod
    def of_paths(cls, tree: TokenTree, last: Tensor, next_token: Tensor) -> Acceptance:
        """The outcome that accepts the path down to one node of each row.

        Args:
            tree: `[batch, nodes]`.
            last: The last accepted node, 0 for none, `[batch]`.
            next_token: What follows it, `[batch]`.
        """
        row = torch.arange(len(last), device=last.device)
        num_accepted = tree.depths[row, last]
        # The last node's ancestors, sorted by index, are its path: parents stand before their children.
        on_path = tree.ancestor_mask[row, last]
        on_path[:, 0] = False
        behind = tree.num_nodes
        nodes = torch.where(on_path, torch.arange(behind, device=last.device), behind).sort(1).values
        accepted = tree.tokens.gather(1, nodes.clamp(max=behind - 1))
        tokens = torch.cat([accepted, next_token[:, None]], 1).scatter(1, num_accepted[:, None], next_token[:, None])
        return cls(nodes.masked_fill(nodes == behind, -1), tokens, num_accepted)


class Verifier(ABC):
    """Decides which path of a token tree is accepted.

    A verifier is pure: tensors and a sampler in, an `Acceptance` out. It knows no model and no kv cache.
    """

    name: str = "verifier"
    guarantee: str = "token-identical"
    judges_steps: bool = False
    """Whether it judges whole reasoning steps, which a drafter that can `generate_steps` then writes."""

    follow: ClassVar[Any] = None
    """A static method of a tree and the target's picks, `[batch, nodes]`, to an `Acceptance`: set by a class whose
    `verify` is that and nothing else, so that it can be captured in a CUDA graph."""

    @abstractmethod
    def verify(self, tree: TokenTree, logits: Tensor, sampler: Sampler, rows: Sequence[int]) -> Acceptance:
        """Accepts one path per row.

        Args:
            tree: `[batch, nodes]`.
            logits: The target's logits at each node, `[batch, nodes, vocab]`.
            sampler: Applies processors and picks tokens.
            rows: Index in the whole batch of each row of the tree.
        """
