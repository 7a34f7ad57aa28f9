"""What a verifier is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

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


class Verifier(ABC):
    """Decides which path of a token tree is accepted.

    A verifier is pure: tensors and a sampler in, an `Acceptance` out. It knows no model and no kv cache.
    """

    name: str = "verifier"
    guarantee: str = "token-identical"

    @abstractmethod
    def verify(self, tree: TokenTree, logits: Tensor, sampler: Sampler, rows: Sequence[int]) -> Acceptance:
        """Accepts one path per row.

        Args:
            tree: `[batch, nodes]`.
            logits: The target's logits at each node, `[batch, nodes, vocab]`.
            sampler: Applies processors and picks tokens.
            rows: Index in the whole batch of each row of the tree.
        """
