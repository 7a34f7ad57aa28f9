"""Sizes of Medusa heads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

VERSIONS = ("1", "2")
"""Version 1 heads have a projection to the vocabulary each, version 2 heads share the target's output embedding."""


@dataclass
class MedusaConfig:
    """Sizes and kind of a set of Medusa heads.

    Args:
        hidden_size: Width of what the target's output embedding is given.
        vocab_size: Rows of the target's output embedding, padding included. None: the checkpoint does not say; known
            once the heads are bound to a model.
        num_heads: Head k, counted from 1, predicts the token k places after the one that the target picks.
        num_layers: Residual layers in each head.
        version: `"1"` or `"2"`.
        base_model_name_or_path: The target they were trained for, for information.
        draft_vocab_size: Tokens that the heads can name; None: all.
    """

    hidden_size: int
    vocab_size: int | None
    num_heads: int = 4
    num_layers: int = 1
    version: str = "2"
    base_model_name_or_path: str | None = None
    draft_vocab_size: int | None = None

    def __post_init__(self) -> None:
        self.version = str(self.version)
        if self.version not in VERSIONS:
            raise ValueError(f"version={self.version!r} is not a kind of Medusa head; use one of '1', '2'")
        if self.version == "1" and self.vocab_size is None and self.draft_vocab_size is None:
            raise ValueError("vocab_size=None with version='1': heads with projections of their own need a size")
        for name in ("hidden_size", "vocab_size", "num_heads", "num_layers", "draft_vocab_size"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be a positive integer")
        if self.vocab_size is not None and (self.draft_vocab_size or 0) > self.vocab_size:
            raise ValueError(f"draft_vocab_size={self.draft_vocab_size} is above the vocabulary of {self.vocab_size}")

    @property
    def num_logits(self) -> int:
        """Width of the heads' logits; the vocabulary's size must be known."""
        size = self.draft_vocab_size or self.vocab_size
        assert size is not None
        return size


def check_token_map(tokens: Tensor, vocab_size: int | None) -> None:
    """Checks the tokens that heads can name, ascending, `[draft_vocab]`.

    Args:
        tokens: Token ids.
        vocab_size: Of the target; None while it is not known.

    Raises:
        ValueError: They are no list of the target's token ids, each once.
    """
    is_list = tokens.dim() == 1 and len(tokens) > 0 and not tokens.is_floating_point()
    is_within = is_list and int(tokens[0]) >= 0 and (vocab_size is None or int(tokens[-1]) < vocab_size)
    if not is_within or not bool((tokens[1:] > tokens[:-1]).all()):
        bound = "" if vocab_size is None else f", below {vocab_size}"
        shown = tokens.flatten()
        raise ValueError(
            f"token_map must hold token ids of the target, each once and ascending{bound}; it begins with "
            f"{shown[:4].tolist()} and ends with {shown[-4:].tolist()}"
        )
