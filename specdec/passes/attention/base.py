"""What a backend of tree attention is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from specdec.passes.attention.plan import TreePlan


class UnsupportedAttentionError(NotImplementedError):
    """A backend cannot compute what a layer asks for."""


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention over a tree, as the model asks for it.

    Args:
        query: `[batch, query heads, nodes, head_dim]`.
        key: `[batch, key heads, slots, head_dim]`.
        value: `[batch, key heads, slots, value_dim]`.
        plan: What each node may look at.
        layer_type: The kind of layer, in the words of the model's config.
        scaling: Factor of the scores.
        softcap: Scores are `softcap * tanh(score / softcap)`; None for scores as they are.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    plan: TreePlan
    layer_type: str
    scaling: float
    softcap: float | None = None

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.query.shape[1] // self.key.shape[1]


class TreeAttention(ABC):
    """A way to compute attention over a tree behind committed tokens.

    Args of all backends are keyword arguments with defaults; `name` is what a user says to choose one.
    """

    name: str

    def missing(self) -> str | None:
        """What must be installed for this backend, or None when nothing is missing."""
        return None

    @abstractmethod
    def attend(self, call: AttentionCall) -> Tensor:
        """Computes attention.

        Returns:
            `[batch, nodes, query heads, value_dim]`, of the query's type.

        Raises:
            UnsupportedAttentionError: This backend cannot do what the layer asks for.
        """
