"""Medusa heads: several tokens ahead from one hidden state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from specdec.heads.calibration import HeadCalibration
from specdec.heads.config import MedusaConfig, check_token_map
from specdec.heads.output_embedding import OutputEmbedding

__all__ = ["MedusaConfig", "MedusaHeads"]


class MedusaHeads(nn.Module):
    """Heads that each predict one token further ahead than the last.

    Head k (from 1), at the hidden state from which the target picks the next token, predicts the token k places after
    that one: residual layers `x + SiLU(Wx + b)`, then logits. "Medusa: Simple LLM Inference Acceleration Framework with
    Multiple Decoding Heads", arXiv 2401.10774, section 2.1. All heads are computed together: their layers are stacked.

    Args:
        config: Sizes. The heads start as the identity.
    """

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__()
        self.config = config
        self.calibration: HeadCalibration | None = None
        """How good the heads are, and the tree that was tuned for them; saved and loaded with them."""
        heads, hidden = config.num_heads, config.hidden_size
        self.weights = nn.ParameterList(torch.zeros(heads, hidden, hidden) for _ in range(config.num_layers))
        self.biases = nn.ParameterList(torch.zeros(heads, hidden) for _ in range(config.num_layers))
        self.projections: nn.Parameter | None = None
        if config.version == "1":
            self.projections = nn.Parameter(torch.zeros(heads, config.num_logits, hidden))
        self.token_map: Tensor | None
        """The tokens that the heads can name, ascending, `[draft_vocab]`, int64; None: all."""
        known = None if config.draft_vocab_size is None else torch.arange(config.draft_vocab_size)
        self.register_buffer("token_map", known)
        self._output_embedding: OutputEmbedding | None = None
        self._known_rows: Tensor | None = None

    @classmethod
    def for_model(
        cls,
        model: Any,
        num_heads: int = 4,
        num_layers: int = 1,
        version: str = "2",
        dtype: torch.dtype = torch.float32,
        draft_tokens: Iterable[int] | None = None,
    ) -> MedusaHeads:
        """New heads for a model, bound to it, on its device; each starts with the model's own logits.

        Args:
            model: The target.
            num_heads: How many tokens ahead, beyond the one that the target picks itself.
            num_layers: Residual layers in each head.
            version: `"2"`: the model's output embedding is shared. `"1"`: each head has a projection of its own, at the
                start a copy of it.
            dtype: Of the parameters.
            draft_tokens: The only tokens that the heads shall name, the frequent ones: with a large vocabulary, most of
                a draft's time goes into the logits. None: all tokens.

        Raises:
            ValueError: The model has no output embedding, or with version 1 none that can be copied; or draft tokens
                are out of range.
        """
        embedding = OutputEmbedding(model)
        name = getattr(model.config, "_name_or_path", None) or None
        token_map = None if draft_tokens is None else torch.tensor(sorted(set(draft_tokens)), dtype=torch.int64)
        size = None if token_map is None else len(token_map)
        config = MedusaConfig(embedding.hidden_size, embedding.vocab_size, num_heads, num_layers, version, name, size)
        heads = cls(config).to(embedding.device, dtype)
        if token_map is not None:
            check_token_map(token_map, config.vocab_size)
            heads.token_map = token_map.to(embedding.device)
        if heads.projections is not None:
            weight = embedding.weight()
            heads.projections.data.copy_(weight if heads.token_map is None else weight[heads.token_map])
        return heads.bind(model)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_name: str | Path,
        revision: str | None = None,
        token: str | bool | None = None,
        dtype: torch.dtype | None = None,
    ) -> MedusaHeads:
        """Loads heads, and their calibration where there is one: Medusa's layouts or vLLM's.

        Args:
            path_or_hub_name: A folder, or a repository of the Hugging Face hub.
            revision: Branch, tag or commit on the hub.
            token: For private repositories.
            dtype: Of the parameters; None: as stored.

        Raises:
            FileNotFoundError: There are no heads there.
            ValueError: Tensors are missing, of the wrong shape, or of no use; or the file is not one of tensors only.
        """
        from specdec.heads.checkpoints import read_checkpoint

        stored = read_checkpoint(path_or_hub_name, revision, token)
        with torch.device("meta"):
            heads = cls(stored.config)
        heads.load_state_dict(stored.tensors, assign=True)
        heads.requires_grad_(True)
        heads.calibration = stored.calibration
        return heads if dtype is None else heads.to(dtype)

    def save_pretrained(self, folder: str | Path, layout: Literal["1", "2", "vllm"] | None = None) -> None:
        """Saves heads and calibration.

        Args:
            folder: Created if need be.
            layout: `"1"` or `"2"`: Medusa's own (`config.json`, `medusa_lm_head.safetensors`) with and without
                projections; `"vllm"`: what vLLM serves; None: Medusa's, of the heads' own version. A layout with
                projections needs version 2 heads to be bound; `"2"` needs version 1 heads to be bound, and their
                projections to be the model's output embedding still.

        Raises:
            ValueError: The layout cannot express the heads, or the folder holds something else.
        """
        from specdec.heads.checkpoints import write_checkpoint

        write_checkpoint(self, Path(folder), layout)

    def bind(self, model: Any) -> MedusaHeads:
        """Checks that the heads fit a model and takes its output embedding to use, not to own; moves to its device.

        Args:
            model: The target, possibly wrapped by peft.

        Returns:
            The heads themselves.

        Raises:
            ValueError: The model is of another size, or has no output embedding.
        """
        embedding = OutputEmbedding(model)
        wanted = {"hidden size": self.config.hidden_size, "vocabulary": self.config.vocab_size}
        found = {"hidden size": embedding.hidden_size, "vocabulary": embedding.vocab_size}
        wrong = [
            f"{name} {wanted[name]} against the model's {found[name]}"
            for name in wanted
            if wanted[name] not in (None, found[name])
        ]
        if wrong:
            made_for = self.config.base_model_name_or_path
            raise ValueError(
                f"the heads{f' (made for {made_for})' if made_for else ''} do not fit {type(model).__name__}: "
                f"{', '.join(wrong)}; load the model they were trained for, or train heads for this one with "
                "MedusaHeads.for_model"
            )
        self.config = replace(self.config, vocab_size=embedding.vocab_size)
        if self.device != embedding.device:
            self.to(embedding.device)
        self._output_embedding = embedding
        self._known_rows = None
        if self.token_map is not None:
            check_token_map(self.token_map, self.config.vocab_size)
            if self.projections is None:
                self._known_rows = embedding.rows(self.token_map)
        return self

    def tokens(self, places: Tensor) -> Tensor:
        """Token ids of places in the logits, of any shape."""
        return places if self.token_map is None else self.token_map[places]

    def places(self, tokens: Tensor, other: int) -> Tensor:
        """Places in the logits of token ids, of any shape; `other` for tokens that the heads do not name."""
        if self.token_map is None:
            return tokens
        places = torch.searchsorted(self.token_map, tokens).clamp(max=len(self.token_map) - 1)
        return torch.where(self.token_map[places] == tokens, places, other)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.weights[0].device

    @property
    def dtype(self) -> torch.dtype:
        """What the parameters are stored and the residual layers computed in."""
        return self.weights[0].dtype

    @property
    def output_embedding(self) -> OutputEmbedding:
        """The bound model's.

        Raises:
            ValueError: The heads are not bound.
        """
        if self._output_embedding is None:
            raise ValueError("the heads are not bound to a model; call heads.bind(model) first")
        return self._output_embedding

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits of all heads, `[..., hidden]` to `[heads, ..., vocab]`, or of the tokens of `token_map` alone.

        Args:
            hidden: What the target's output embedding is given.
        """
        return self.project(self.features(hidden))

    def features(self, hidden: Tensor) -> Tensor:
        """What the heads make of hidden states, before the vocabulary: `[..., hidden]` to `[heads, ..., hidden]`."""
        states = hidden.to(self.dtype).reshape(1, -1, self.config.hidden_size).expand(self.config.num_heads, -1, -1)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            states = states + nn.functional.silu(torch.baddbmm(bias[:, None], states, weight.mT))
        return states.reshape(self.config.num_heads, *hidden.shape)

    def project(self, features: Tensor) -> Tensor:
        """The second half: `[heads, ..., hidden]` to `[heads, ..., vocab]`."""
        if self.projections is None and self.token_map is None:
            return self.output_embedding(features)
        if self.projections is None:
            if self._known_rows is None:
                return self.output_embedding(features)[..., self.token_map]
            return nn.functional.linear(features.to(self._known_rows.dtype), self._known_rows)
        flat = features.to(self.dtype).flatten(1, -2) if features.dim() > 2 else features.to(self.dtype)[:, None]
        logits = torch.bmm(flat, self.projections.mT)
        return logits.reshape(*features.shape[:-1], logits.shape[-1])

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in vars(self.config).items())

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are not bound: they would hold the target's embedding."""
        return {**self.__dict__, "_output_embedding": None, "_known_rows": None}
