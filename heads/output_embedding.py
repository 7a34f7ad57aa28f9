"""A target's output embedding, as heads use it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

COMPUTE_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
"""What activations come in; weights may be stored in fewer bits."""


class OutputEmbedding:
    """What turns the target's hidden states into logits, held without becoming a part of who holds it.

    Not a module on purpose: as a submodule of the heads it would be trained, saved, copied and moved with them.

    Args:
        model: The target, possibly wrapped by peft.

    Raises:
        ValueError: The model has no output embedding.
    """

    def __init__(self, model: Any) -> None:
        module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"{type(model).__name__} has no output embedding; heads need a causal language model whose "
                "get_output_embeddings() gives a module"
            )
        self.module: nn.Module = module
        self._model_dtype: Any = getattr(model, "dtype", None)
        self._model_device: Any = getattr(model, "device", None)
        text_config = model.config.get_text_config(decoder=True)
        self.vocab_size, self.hidden_size = self._sizes(text_config)

    def __call__(self, states: Tensor) -> Tensor:
        """Logits of hidden states, `[..., hidden]` to `[..., vocab]`, computed in the target's own precision."""
        logits: Tensor = self.module(states.to(self.dtype))
        return logits

    @property
    def dtype(self) -> torch.dtype:
        """Precision in which the target computes logits."""
        for dtype in (getattr(self._stored, "dtype", None), self._model_dtype):
            if isinstance(dtype, torch.dtype) and dtype in COMPUTE_DTYPES:
                return dtype
        return torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        """Where the target computes logits."""
        execution_device = getattr(getattr(self.module, "_hf_hook", None), "execution_device", None)
        stored = self._stored.device if self._stored is not None else None
        for device in (execution_device, stored, self._model_device):
            if device is not None and (device := torch.device(device)).type != "meta":
                return device
        return torch.device("cpu")

    def weight(self) -> Tensor:
        """The whole of the output embedding as one matrix, `[vocab, hidden]`.

        Raises:
            ValueError: It is not the product with one matrix: a bias, an adapter, quantised or sharded weights.
        """
        weight, bias = self._stored, getattr(self.module, "bias", None)
        if isinstance(bias, Tensor) and bool(bias.any()):
            raise ValueError(f"the output embedding has a bias, for which projections have no place; {_USE_VERSION_2}")
        if weight is None or weight.shape != (self.vocab_size, self.hidden_size) or weight.dtype not in COMPUTE_DTYPES:
            raise ValueError(
                f"the output embedding ({type(self.module).__name__}) is quantised or sharded: there is no matrix of "
                f"{self.vocab_size} x {self.hidden_size} to copy; {_USE_VERSION_2}"
            )
        weight = weight.detach()
        if not self._is_product_with(weight):
            raise ValueError(
                f"the output embedding ({type(self.module).__name__}) computes something else than the product with "
                f"its weight; merge its adapter first, or: {_USE_VERSION_2}"
            )
        return weight

    def rows(self, tokens: Tensor) -> Tensor | None:
        """A copy of some tokens' rows, `[tokens, hidden]`; None where logits are no product with one matrix."""
        try:
            return self.weight()[tokens.to(self.device)].to(self.dtype)
        except ValueError:
            return None

    @property
    def _stored(self) -> Tensor | None:
        weight = getattr(self.module, "weight", None)
        return weight if isinstance(weight, Tensor) else None

    def _sizes(self, text_config: Any) -> tuple[int, int]:
        stored = self._stored
        if stored is not None and stored.dim() == 2 and stored.is_floating_point():
            return int(stored.shape[0]), int(stored.shape[1])
        vocab_size = getattr(self.module, "out_features", None) or text_config.vocab_size
        hidden_size = getattr(self.module, "in_features", None) or text_config.hidden_size
        return int(vocab_size), int(hidden_size)

    @torch.no_grad()
    def _is_product_with(self, weight: Tensor) -> bool:
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(2, self.hidden_size, generator=generator).to(self.device, self.dtype)
        expected = nn.functional.linear(states, weight)
        tolerance = 8 * torch.finfo(self.dtype).eps * float(expected.abs().max()) * self.hidden_size**0.5
        return bool(torch.allclose(self(states), expected, rtol=0, atol=tolerance))


_USE_VERSION_2 = "use version 2 heads, which call the model's own output embedding"
