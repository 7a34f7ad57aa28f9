"""Hyper-parameters of `DraftModelDrafter` that cannot be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from specdec.drafters.small_model.loading import SELF
from specdec.drafters.tokenizers.draft_vocabulary import Use

if TYPE_CHECKING:
    from specdec.drafters.draft_model import DraftModelDrafter

Mode = Literal["auto", "chain", "static", "dynamic", "paced"]


def check_settings(drafter: DraftModelDrafter) -> None:
    """Raises a ValueError for a hyper-parameter out of range."""
    drafter.acceptances = tuple(drafter.acceptances)
    if drafter.growth not in get_args(Mode):
        known = ", ".join(map(repr, get_args(Mode)))
        raise ValueError(f"growth={drafter.growth!r} is not known; use one of {known}")
    if drafter.vocabulary not in get_args(Use):
        known = ", ".join(map(repr, get_args(Use)))
        raise ValueError(f"vocabulary={drafter.vocabulary!r} is not known; use one of {known}")
    if drafter.pipelined and drafter.growth not in ("auto", "paced"):
        raise ValueError(f"pipelined=True goes with growth='paced' only, not {drafter.growth!r}; leave growth out")
    if drafter.layers is not None and drafter.draft_model != SELF:
        raise ValueError(f"layers={drafter.layers} has a meaning with draft_model='self' only; leave it out")
    for name, least in (("max_nodes", 1), ("top_k", 1), ("beam", 1), ("prior_weight", 0.01), ("memory", 1)):
        if getattr(drafter, name) < least:
            raise ValueError(f"{name}={getattr(drafter, name)} must be at least {least}")
    if drafter.max_depth is not None and drafter.max_depth < 1:
        raise ValueError(f"max_depth={drafter.max_depth} must be at least 1, or None for what suits the growth")
    if not 0 <= drafter.min_confidence < 1:
        raise ValueError(f"min_confidence={drafter.min_confidence} must be at least 0 and below 1")
    falls = all(a >= b for a, b in zip(drafter.acceptances, drafter.acceptances[1:], strict=False))
    if not drafter.acceptances or not falls or min(drafter.acceptances) <= 0 or sum(drafter.acceptances) > 1 + 1e-6:
        raise ValueError(
            f"acceptances={drafter.acceptances} must be probabilities by rank: falling, above 0 and 1 in all at most"
        )
