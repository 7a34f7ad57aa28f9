"""The target's own hidden states, for drafters that build on them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from specdec.passes.cuda_graphs.fingerprint import quiet


class HiddenStates:
    """What the target's output embedding is given, kept for the node from which each row goes on.

    Taken by a forward pre-hook that is there only during a call of `generate`: final norm, scaling and soft-capping
    stay in the model's own code.

    Args:
        model: The target.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.of_rows: Tensor | None = None
        """State from which each row's last token was picked, `[rows, hidden]`; None before the prefill."""
        self.last_pass: Tensor | None = None
        """States of all nodes of the last pass, `[rows, nodes, hidden]`."""

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Takes the states of the passes inside."""
        embedding: nn.Module = self.model.get_output_embeddings()
        self._thread = threading.get_ident()
        hook = embedding.register_forward_pre_hook(self._take, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
            self.last_pass = self.of_rows = None

    @quiet
    def _take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == self._thread:  # hooks of calls in other threads see this pass too
            self.last_pass = next(iter((*args, *kwargs.values())))

    def keep_last(self) -> None:
        """Keeps the states of the last position: after the prefill."""
        if self.last_pass is not None:
            self.of_rows = self.last_pass[:, -1].clone()

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """Keeps the states at the end of the committed paths; nothing changes when no node was committed."""
        if self.last_pass is None or not any(paths):
            return
        if len(paths) == 1:
            self.of_rows = self.last_pass[:, paths[0][-1]]
        else:
            last = torch.tensor([path[-1] if path else 0 for path in paths], device=self.last_pass.device)
            self.of_rows = self.last_pass[torch.arange(len(last), device=last.device), last]

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Ends all rows that are not listed (indices among the rows so far)."""
        if self.of_rows is not None:
            self.of_rows = self.of_rows[list(rows)]
