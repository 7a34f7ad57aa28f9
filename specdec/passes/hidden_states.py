"""The target's own hidden states, for drafters that build on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from specdec.passes.replica import keep_hooks_apart

FINAL = -1
"""Names the state that the output embedding is given: final norm, scaling and soft-capping stay in the model's code."""


class HiddenStates:
    """States of the positions that the last pass committed, taken by forward pre-hooks on a replica of the model.

    Args:
        model: The replica that the call runs; see `replica_of`.
        layers: Which states: those that enter these decoder layers (`hidden_states[i]` of transformers), or `FINAL`.

    Raises:
        ValueError: The model has no such layer.
    """

    def __init__(self, model: Any, layers: Sequence[int] = (FINAL,)) -> None:
        self.layers = tuple(layers)
        self._modules: list[Any] = [state_reader(model, layer) for layer in layers]
        self._passes: list[list[Tensor]] = [[] for _ in layers]
        """By layer, the states of each pass since the last commit, `[rows, nodes, hidden]`."""
        self._committed: list[Tensor] = []
        """By layer, the states of the last pass that committed anything."""
        self._paths: list[Sequence[int]] | None = None
        """Per row the nodes that it committed; None: all, after the prefill."""

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Takes the states of the passes inside."""
        with ExitStack() as hooks:
            for place, module in enumerate(self._modules):
                keep_hooks_apart(module)
                hook = module.register_forward_pre_hook(partial(self._take, place), with_kwargs=True)
                hooks.callback(hook.remove)
            try:
                yield
            finally:
                self._clear()
                self._committed = []

    def _take(self, place: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._passes[place].append(next(iter((*args, *kwargs.values()))))

    def _clear(self) -> None:
        self._passes = [[] for _ in self.layers]

    @property
    def last_pass(self) -> Tensor | None:
        """States of all nodes of the last pass, layer after layer, `[rows, nodes, layers * hidden]`."""
        return joined([passes[-1] for passes in self._passes]) if all(self._passes) else None

    @last_pass.setter
    def last_pass(self, states: Tensor | None) -> None:
        """Puts in place of it what a pass without hooks returned."""
        self._clear()
        if states is not None:
            self._passes = [[part] for part in states.chunk(len(self.layers), -1)]

    def keep_prompt(self) -> None:
        """Keeps the states of the prompt: after the prefill, which may be several passes."""
        if all(self._passes):
            self._committed, self._paths = [torch.cat(passes, 1) for passes in self._passes], None
        self._clear()

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """Keeps the states of the committed paths; nothing changes when no node was committed."""
        if all(self._passes) and any(paths):
            self._committed, self._paths = [passes[-1] for passes in self._passes], list(paths)
        self._clear()

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Ends all rows that are not listed (indices among the rows so far)."""
        self._committed = [states[list(rows)] for states in self._committed]
        self._paths = self._paths and [self._paths[row] for row in rows]

    def last(self) -> Tensor | None:
        """The final state from which each row's last token was picked, `[rows, hidden]`; None if it is not taken."""
        if FINAL not in self.layers or not self._committed:
            return None
        states, paths = self._committed[self.layers.index(FINAL)], self._paths
        if paths is None:
            return states[:, -1]
        if len(paths) == 1:
            return states[:, paths[0][-1]]
        last = torch.tensor([path[-1] if path else 0 for path in paths], device=states.device)
        return states[torch.arange(len(last), device=last.device), last]

    def of_rows(self, layers: Sequence[int]) -> list[Tensor]:
        """States of the positions that were committed last.

        Args:
            layers: Some of those that are taken.

        Returns:
            Per row, `[positions, layers * hidden]`; after the prefill with the prompt's padding.
        """
        states = joined([self._committed[self.layers.index(layer)] for layer in layers])
        return list(states) if self._paths is None else [states[i, list(path)] for i, path in enumerate(self._paths)]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """States of several layers side by side, `[..., layers * hidden]`, where the last layer is."""
    return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[-1].device) for part in parts], -1)


def state_reader(model: Any, layer: int) -> nn.Module | None:
    """The module whose input a state is; None for the final state of a model without an output embedding.

    Raises:
        ValueError: The model has no such layer.
    """
    if layer == FINAL:
        embedding: nn.Module | None = model.get_output_embeddings()
        return embedding
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not stacks or not 0 <= layer < count:
        raise ValueError(
            f"the states that enter decoder layer {layer} of {type(model).__name__} cannot be taken: it has "
            f"{count if stacks else 'no list of'} layers; use a drafter that reads the final state, or none"
        )
    return stacks[0][layer]
