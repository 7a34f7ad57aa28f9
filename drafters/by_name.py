"""Drafters as users write them: by name, by draft model, or several to be merged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from specdec.drafters import DRAFTERS, AutoDrafter, DraftModelDrafter, MergedDrafter
from specdec.drafters.base import Drafter
from specdec.drafters.published import published_drafter

DrafterLike = str | Drafter | PreTrainedModel | Sequence[str | Drafter | PreTrainedModel] | None


def resolve_drafter(drafter: Any) -> Drafter | None:
    """A drafter from its name, one that asks a draft model, one that merges several, or the drafter itself.

    Raises:
        ValueError: The name is not known, or a list is empty or has None in it.
        TypeError: It is neither a name nor a drafter.
    """
    if drafter is None or isinstance(drafter, Drafter):
        return drafter
    if isinstance(drafter, PreTrainedModel):
        return DraftModelDrafter(drafter)
    if isinstance(drafter, str):
        if drafter in DRAFTERS:
            return DRAFTERS[drafter]()
        if "/" in drafter or Path(drafter).is_dir():
            return published_drafter(drafter)
        known = ", ".join(map(repr, DRAFTERS))
        raise ValueError(
            f"drafter={drafter!r} is not known; use one of {known}, the folder or hub name of a draft checkpoint, a "
            "Drafter, or None for none"
        )
    if isinstance(drafter, Sequence):
        return _merged(drafter)
    if isinstance(drafter, type) and issubclass(drafter, Drafter):
        raise TypeError(f"drafter={drafter.__name__} is a class; pass an instance: {drafter.__name__}()")
    raise TypeError(
        f"drafter must be a name ({', '.join(map(repr, DRAFTERS))}), a Drafter, a list of these or None, "
        f"not {drafter!r:.200}"
    )


def _merged(drafters: Sequence[Any]) -> Drafter | None:
    """One drafter out of several."""
    if len(drafters) == 1:
        return resolve_drafter(drafters[0])
    if not drafters:
        raise ValueError("drafter=[] is empty; give at least one drafter, or None for none")
    others = [resolve_drafter(drafter) for drafter in drafters if drafter != "auto"]
    sources = [drafter for drafter in others if drafter is not None]
    if len(sources) < len(others):
        raise ValueError(f"drafter={list(drafters)!r:.200} has None in it; leave it out")
    return MergedDrafter(sources) if len(sources) == len(drafters) else AutoDrafter(more=sources)
