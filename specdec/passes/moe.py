"""Mixtures of experts: passes over one token compute their matrix products as transformers' decoding does."""

from __future__ import annotations

from typing import Any

import torch


class ExpertsSwitch:
    """Makes one-token passes on a GPU use the kernels that `generate()` uses, through transformers' public setting.

    `generate()` decodes a mixture of experts with `"batched_mm"`, which copies the weights of the chosen experts and is
    faster for few tokens than `"grouped_mm"`. Over a tree the copies would be many times larger, so wider passes keep
    what the model was loaded with.

    Args:
        model: The target.
        device: Where it runs; nothing is switched on a CPU, as in transformers.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        names: dict[str, str | None] = getattr(model, "get_experts_implementation", dict)()
        self.names = names if device.type != "cpu" and "grouped_mm" in names.values() else {}
        self._is_batched = False

    def use_for(self, replica: Any, nodes: int) -> None:
        """Sets up a replica of the target (see `replica_of`) for a pass over `nodes` tokens per row."""
        if self.names and (nodes == 1) != self._is_batched:
            self._is_batched = nodes == 1
            batched = {key: "batched_mm" if name == "grouped_mm" else name for key, name in self.names.items()}
            replica.set_experts_implementation(batched if self._is_batched else self.names)
