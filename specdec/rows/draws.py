"""The random draws that `model.generate` would make, so that sampling gives the same tokens under the same seed."""

from __future__ import annotations

from collections import deque
from itertools import islice

import torch
from torch import Tensor


class NoiseQueue:
    """Exponential draws e_0, e_1, ..., one `[batch, vocab]` tensor per generated position of the batch.

    `torch.multinomial(probs, 1)` picks `argmax(probs / e)` with `e` exponential from the global generator. So the token
    that sampling picks at position t is a function of the target's distribution and e_t alone, whatever was
    speculated. Draws are made lazily and in order; `restore` puts the generator where plain decoding leaves it.

    Args:
        batch: Rows of the batch, finished ones included (plain decoding draws for them too).
        device: Where sampling takes place.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self.batch = batch
        self.vocab = 0
        self.dtype = torch.float32
        self.device = device
        self.first = 0
        self._draws: deque[Tensor] = deque()
        self._states: deque[Tensor] = deque([self._get_state()])  # state before draw `first + i`

    def _get_state(self) -> Tensor:
        if self.device.type == "cpu":
            return torch.get_rng_state()
        return torch.get_device_module(self.device).get_rng_state(self.device)

    def _set_state(self, state: Tensor) -> None:
        if self.device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(self.device).set_rng_state(state, self.device)

    def draw(self, end: int) -> None:
        """Makes the draws of all positions before `end`."""
        while self.first + len(self._draws) < end:
            self._draws.append(
                torch.empty((self.batch, self.vocab), device=self.device, dtype=self.dtype).exponential_()
            )
            self._states.append(self._get_state())

    def begin(self, vocab: int) -> None:
        """Tells the size of the target's distribution, before the first draw."""
        self.vocab = vocab

    def at(self, position: int, row: int, dtype: torch.dtype | None = None) -> Tensor:
        """The draw of one row at one position, `[vocab]`.

        Args:
            position: Counted from the first generated one.
            row: Of the batch.
            dtype: Of the probabilities that it divides: plain decoding draws in their type. None: whatever was drawn.
        """
        place = position - self.first
        if dtype is not None and dtype != self.dtype:
            self.dtype = dtype
        if dtype is not None and place < len(self._draws) and self._draws[place].dtype != dtype:
            self._set_state(self._states[place])
            self._draws = deque(islice(self._draws, place))
            self._states = deque(islice(self._states, place + 1))
        self.draw(position + 1)
        return self._draws[place][row]

    def forget(self, before: int) -> None:
        """Frees the draws of positions before `before`; their generator states are freed with them.

        Those that were never made are left out: the tokens at these positions were picked without them.
        """
        while self.first < before and self._draws:
            self._draws.popleft()
            self._states.popleft()
            self.first += 1
        if self.first < before:
            self.first = before
            self._states = deque([self._get_state()])

    def restore(self, count: int) -> None:
        """Sets the global generator to its state after the first `count` draws."""
        self.draw(count)
        self._set_state(self._states[count - self.first])
