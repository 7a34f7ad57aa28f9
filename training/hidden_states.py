"""Final hidden states of packed windows: what the target's output embedding would read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from specdec.passes.tolerance import differ, noise_of
from specdec.target import accepts, unwrapped

_CHECKED_TOKENS = 12


class _ReachedError(Exception):
    """The output embedding was reached; carries its input."""


class FinalHiddenStates:
    """Runs a causal LM up to the input of its output embedding.

    On a dozen tokens it is found out what the model allows: whether its decoder alone gives that input (if not, the
    whole model runs and is stopped at the output embedding), and whether several examples can share a window (if not,
    each becomes a row of its own).

    Args:
        model: A causal LM, with or without adapters; it may be quantised.

    Raises:
        ValueError: The model has no output embedding.
    """

    def __init__(self, model: Any) -> None:
        self.model = unwrapped(model)
        if self.model.get_output_embeddings() is None:
            raise ValueError(f"{type(self.model).__name__} has no output embedding; use a causal language model")
        self._run: Callable[..., Tensor] = self._stopped
        self.packed = True
        was_training = model.training
        model.eval()
        with torch.no_grad():
            self._check()
        model.train(was_training)

    @property
    def uses_decoder(self) -> bool:
        """Whether the decoder alone is run."""
        return self._run == self._decoded

    def __call__(self, input_ids: Tensor, segments: Tensor, position_ids: Tensor) -> Tensor:
        """Hidden states `[batch, window, hidden]`; arguments as in the columns of a packed window."""
        if self.packed:
            return self._run(input_ids, position_ids)
        return self._in_rows(input_ids, segments, position_ids)

    def _kwargs(self, module: Any, position_ids: Tensor | None) -> dict[str, Any]:
        kwargs: dict[str, Any] = {"use_cache": False} if accepts(module, "use_cache") else {}
        if position_ids is not None and accepts(module, "position_ids"):
            kwargs["position_ids"] = position_ids
        return kwargs

    def _decoded(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        decoder = self.model.get_decoder()
        return decoder(input_ids=input_ids, **self._kwargs(decoder, position_ids)).last_hidden_state

    def _stopped(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
            raise _ReachedError(args[0])

        handle = self.model.get_output_embeddings().register_forward_pre_hook(stop)
        try:
            self.model(input_ids=input_ids, **self._kwargs(self.model, position_ids))
        except _ReachedError as reached:
            return reached.args[0]
        finally:
            handle.remove()
        raise RuntimeError(f"the forward of {type(self.model).__name__} does not use its output embedding")

    def _in_rows(self, input_ids: Tensor, segments: Tensor, position_ids: Tensor) -> Tensor:
        """Each segment as a row; padding on the right is behind all that it could disturb."""
        starts = torch.ones_like(segments, dtype=torch.bool)
        starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
        row = starts.flatten().cumsum(0) - 1  # [batch * window]
        first = starts.flatten().nonzero().squeeze(1)
        place = torch.arange(row.numel(), device=row.device) - first[row]
        shape = (len(first), int(place.max()) + 1)
        ids = input_ids.new_zeros(shape)
        ids[row, place] = input_ids.flatten()
        positions = torch.arange(shape[1], device=ids.device).expand(shape).contiguous()
        positions = positions + position_ids.flatten()[first][:, None]
        return self._run(ids, positions)[row, place].view(*input_ids.shape, -1)

    def _check(self) -> None:
        embedding = self.model.get_input_embeddings().weight
        vocab = self.model.config.get_text_config(decoder=True).vocab_size
        ids = (torch.arange(_CHECKED_TOKENS, device=embedding.device)[None] * 7 + 11) % vocab
        expected = self._stopped(ids, None)
        try:
            if self._same(self._decoded(ids, None), expected):
                self._run = self._decoded
        except Exception:  # whatever a decoder of remote code does not take, the whole model does
            self._run = self._stopped
        half = _CHECKED_TOKENS // 2
        lengths = (half, _CHECKED_TOKENS - half)
        positions = torch.cat([torch.arange(n, device=ids.device) for n in lengths])[None]
        alone = torch.cat([self._run(part, None) for part in ids.split(lengths, dim=1)], dim=1)
        try:
            self.packed = self._same(self._run(ids, positions), alone)
        except Exception:  # as above: rows of their own need nothing but token ids
            self.packed = False

    def _same(self, mine: Tensor, expected: Tensor) -> bool:
        noise = noise_of(self.model, expected.dtype)
        return mine.shape == expected.shape and not differ(mine, expected, noise=noise)
