"""The user's model where branching trees cannot be shown to it: chains, rolled back by the model's own cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from specdec.compat import CACHE
from specdec.rows.sequences import Sequences
from specdec.target import TargetModel
from specdec.tree import TokenTree


class ChainTarget(TargetModel):
    """Chains only: the model's own kind of cache with its own rollback.

    For models to which a branching tree cannot be shown (positions or masks of their own making, convolutions). The
    cache of transformers rolls all rows back by the same number of tokens, so rows go in lockstep.
    """

    lockstep = True

    def _start_cache(self, input_ids: Tensor) -> Cache:
        return self._cache()

    def _cache(self) -> Cache:
        assert self.past is not None
        return self.past

    def _end_prefill(self, input_ids: Tensor) -> None:
        self._cache().activate_past_recording()
        self._cache().crop(0)
        self.positions = self._positions(input_ids.shape[0])
        self.mask: Tensor | None = self.model_kwargs.get("attention_mask")

    def forward(self, tree: TokenTree) -> Tensor:
        batch, nodes = tree.tokens.shape
        self.nodes = nodes
        inputs: dict[str, Any] = {}
        if self.mask is not None:
            inputs["attention_mask"] = torch.cat([self.mask, self.mask.new_ones((batch, nodes))], dim=1)
        if self.positions is not None:
            inputs["position_ids"] = self.positions + torch.arange(nodes, device=self.positions.device)
        inputs |= {name: torch.full_like(tree.tokens, value) for name, value in self.token_types.items()}
        outputs = self.runner(
            input_ids=tree.tokens,
            use_cache=True,
            return_dict=True,
            **{CACHE: self._cache()},
            **inputs,
            **self.extra,
        )
        return outputs.logits

    def _commit(self, paths: Sequence[Sequence[int]], unfinished: Sequence[int] | None) -> None:
        kept = min(len(paths[row]) for row in unfinished or range(len(paths)))
        self._cache().crop(kept - self.nodes)
        if self.mask is not None:
            self.mask = torch.nn.functional.pad(self.mask, (0, kept), value=1)
        if self.positions is not None:
            self.positions = self.positions + kept

    def _keep_rows(self, rows: Sequence[int]) -> None:
        if not rows:
            return
        index = torch.tensor(rows)
        self._cache().reorder_cache(index)  # type: ignore[arg-type]
        if self.mask is not None:
            self.mask = self.mask[index.to(self.mask.device)]
        if self.positions is not None:
            self.positions = self.positions.index_select(-2, index.to(self.positions.device))

    def finish(self, sequences: Sequences, pad_token: int) -> Cache | None:
        for layer in self._cache().layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False
        return self.past
