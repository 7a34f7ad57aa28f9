"""Mixtures of experts: their matrix products in passes over one token are made as transformers' decoding makes them."""

from __future__ import annotations

from typing import Any

import torch


class ExpertsSwitch:
    """Has one-token passes made as `generate()` makes them on a GPU, through transformers' public setting.

    There a mixture of experts is decoded with `"batched_mm"`, which copies the weights of the chosen experts and is the
    faster one for few tokens, in place of `"grouped_mm"`. Over a tree those copies would be many times larger, so wider
    passes are left as the model was loaded.

    Args:
        model: The target.
        device: Where it runs; on a CPU nothing is switched, as transformers does.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model = model
        names: dict[str, str | None] = getattr(model, "get_experts_implementation", dict)()
        self.names = names if device.type != "cpu" and "grouped_mm" in names.values() else {}
        self.is_switched = False

    def use_for(self, nodes: int) -> None:
        """Before a pass over so many nodes per row."""
        if self.names and (nodes == 1) != self.is_switched:
            self.is_switched = nodes == 1
            names = {key: "batched_mm" if name == "grouped_mm" else name for key, name in self.names.items()}
            self.model.set_experts_implementation(names if self.is_switched else self.names)

    def restore(self) -> None:
        """Leaves the model as it was."""
        if self.is_switched:
            self.use_for(0)
