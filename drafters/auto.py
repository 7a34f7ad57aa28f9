"""All the drafters that a model needs nothing more for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.drafters.base import Drafter, DrafterSwitchedOffWarning
from specdec.drafters.eagle3 import Eagle3Drafter, own_head
from specdec.drafters.lookahead import LookaheadDrafter
from specdec.drafters.medusa import MedusaDrafter, own_heads
from specdec.drafters.merged import MergedDrafter
from specdec.drafters.recycling import RecyclingDrafter


@dataclass(eq=False)
class AutoDrafter(MergedDrafter):
    """Merges what can be had for nothing: Lookahead, Token Recycling, and the heads that come with the model.

    Of an EAGLE-3 head and Medusa heads in the model's folder the first is taken.

    Args:
        more: Drafters that join them, or take the place of one of the same kind.
    """

    name = "auto"

    sources: Sequence[Drafter] = field(init=False, default=())
    more: Sequence[Drafter] = ()

    def __post_init__(self) -> None:
        given = {type(drafter) for drafter in self.more}
        kinds: tuple[type[Drafter], ...] = (LookaheadDrafter, RecyclingDrafter)
        self._always = [*(kind() for kind in kinds if kind not in given), *self.more]
        self.sources = self._always
        self._heads: Drafter | None = None
        super().__post_init__()

    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in super().settings().items() if name != "more"}

    def bind(self, model: Any) -> None:
        if self._target() is not model:
            heads = self._heads_of(model)
            if heads is not self._heads:
                self._heads = heads
                self._use(self._always if heads is None else [*self._always, heads])
        super().bind(model)

    def _heads_of(self, model: Any) -> Drafter | None:
        """A drafter with the heads in the model's own folder, if they can be used and nothing else brings heads."""
        if any(isinstance(drafter, MedusaDrafter | Eagle3Drafter) for drafter in self.more):
            return None
        found = Eagle3Drafter() if own_head(model) else MedusaDrafter() if own_heads(model) else None
        if found is None:
            return None
        try:
            found.bind(model)
        except (ValueError, OSError) as error:
            warnings.warn(
                f"the heads in the model's folder are left out: {error}. Pass drafter={found.name!r} to insist on "
                "them.",
                DrafterSwitchedOffWarning,
                stacklevel=2,
            )
            return None
        return found
