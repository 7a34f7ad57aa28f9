"""EAGLE-3: one decoder layer that continues the target's own states."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of new positions: query `[batch, heads, new, head]`, key and value `[batch, kv heads, new, head]`, rotated,
to `[batch, heads, new, head]`. Who calls keeps the cache and knows the mask."""


NUM_STATES = 3
"""States that a head fuses where its config does not name their layers."""


@dataclass(frozen=True)
class Eagle3Config:
    """Sizes and variants of an EAGLE-3 head.

    Args:
        layer: Shape of the decoder layer: heads, widths, activation, rotary embedding, and `vocab_size` of the target.
        draft_vocab_size: Tokens that the head can draft.
        target_hidden_size: Width of the target's states.
        target_layers: Which states the head reads, in the numbering of `hidden_states`: those that enter these layers.
            None: `default_target_layers` of the target, known once the head is bound.
        norm_before_residual: The layer's residual is the normed state.
        fc_norm: Each of the target's states is normed before they are fused (EAGLE-3.1).
        norm_before_fc: They are normed together (gpt-oss heads).
        norm_output: The state that is fed back is the normed one (EAGLE-3.1).
        qk_norm: Queries and keys are normed by head, as in Qwen3.
        target: Name of the model that the head was trained for.
    """

    layer: LlamaConfig
    draft_vocab_size: int
    target_hidden_size: int
    target_layers: tuple[int, ...] | None
    norm_before_residual: bool = False
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_output: bool = False
    qk_norm: bool = False
    target: str | None = None


def default_target_layers(num_layers: int) -> tuple[int, int, int]:
    """An early, a middle and a late layer, as in EAGLE's own code."""
    return min(2, num_layers - 1), num_layers // 2, max(num_layers - 3, 0)


class Eagle3Head(nn.Module):
    """Drafts from the target's states at several layers, one token per level, each level fed with the last one's state.

    "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test" (arXiv 2503.01840,
    section 3.1). Position i holds the fused states of token i and the embedding of token i + 1; its output predicts
    token i + 2. Where a state has not been computed by the target, the head's own output of the level before stands in.

    Args:
        config: Sizes.
    """

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.config = config
        layer = config.layer
        hidden, eps = int(layer.hidden_size), layer.rms_norm_eps
        count = NUM_STATES if config.target_layers is None else len(config.target_layers)
        self.heads = int(layer.num_attention_heads)
        self.kv_heads = int(layer.num_key_value_heads or self.heads)
        self.head_dim = int(getattr(layer, "head_dim", None) or hidden // self.heads)
        self.fc = nn.Linear(count * config.target_hidden_size, hidden, bias=False)
        sizes = [config.target_hidden_size] * count if config.fc_norm else []
        sizes = [count * config.target_hidden_size] if config.norm_before_fc else sizes
        self.input_norms = nn.ModuleList(LlamaRMSNorm(size, eps) for size in sizes)
        self.input_layernorm = LlamaRMSNorm(hidden, eps)
        self.hidden_norm = LlamaRMSNorm(hidden, eps)
        bias = bool(getattr(layer, "attention_bias", False))
        self.q_proj = nn.Linear(2 * hidden, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(2 * hidden, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(2 * hidden, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden, bias=False)
        self.q_norm = LlamaRMSNorm(self.head_dim, eps) if config.qk_norm else None
        self.k_norm = LlamaRMSNorm(self.head_dim, eps) if config.qk_norm else None
        self.post_attention_layernorm = LlamaRMSNorm(hidden, eps)
        self.mlp = LlamaMLP(layer)
        self.norm = LlamaRMSNorm(hidden, eps)
        self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)
        self.embed_tokens: nn.Embedding | None = None
        """Only in checkpoints with an embedding of their own; else the target's is used."""
        self.draft_tokens: Tensor
        """The target's id of each token that the head can draft, `[draft_vocab]`, int64."""
        self.register_buffer("draft_tokens", torch.arange(config.draft_vocab_size))
        self.rotary = LlamaRotaryEmbedding(layer)
        self._target_embedding: tuple[nn.Module, ...] = ()  # in a tuple, so that it is no submodule

    @classmethod
    def for_model(
        cls, model: Any, draft_tokens: Iterable[int] | None = None, target_layers: Iterable[int] | None = None
    ) -> Eagle3Head:
        """A new head for a model, in float32 on its device: random, but for the norms and the output's rows.

        Args:
            model: The target.
            draft_tokens: The only tokens that the head shall draft, the frequent ones. None: all.
            target_layers: See `Eagle3Config`. None: the usual three.
        """
        text = model.config.get_text_config(decoder=True)
        known = torch.tensor(sorted(set(draft_tokens))) if draft_tokens is not None else torch.arange(text.vocab_size)
        layer = LlamaConfig(
            hidden_size=text.hidden_size,
            intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            num_hidden_layers=1,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            vocab_size=text.vocab_size,
            rms_norm_eps=getattr(text, "rms_norm_eps", 1e-5),
            max_position_embeddings=text.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": _rope_theta(text)},
        )
        layers = tuple(target_layers) if target_layers is not None else default_target_layers(text.num_hidden_layers)
        name = getattr(model.config, "_name_or_path", None) or None
        head = cls(Eagle3Config(layer, len(known), text.hidden_size, layers, target=name))
        for module in head.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        head.draft_tokens.copy_(known)
        output = model.get_output_embeddings()
        if output is not None and getattr(output, "weight", None) is not None:
            head.lm_head.weight.data.copy_(output.weight.detach()[known.to(output.weight.device)])
        return head.to(output.weight.device if output is not None else model.device).bind(model)

    @classmethod
    def from_pretrained(
        cls, path_or_hub_name: str | Path, revision: str | None = None, token: str | bool | None = None
    ) -> Eagle3Head:
        """Loads a head: EAGLE's own layout (SafeAILab, SpecForge, NVIDIA) or speculators'.

        Raises:
            FileNotFoundError: There is no head there.
            ValueError: Tensors are missing, of the wrong shape, or unknown; or it is another kind of head.
        """
        from specdec.heads.eagle3_files import read_head

        return read_head(path_or_hub_name, revision, token)

    def save_pretrained(self, folder: str | Path, layout: str = "speculators") -> None:
        """Saves the head as `config.json` and `model.safetensors`.

        Args:
            folder: Created if need be.
            layout: `"speculators"`, which vLLM serves, or `"eagle"`, EAGLE's own.
        """
        from specdec.heads.eagle3_files import write_head

        write_head(self, Path(folder), layout)

    def bind(self, model: Any) -> Eagle3Head:
        """Checks that the head fits a model, and takes its input embedding to use, not to own; moves to its device.

        Raises:
            ValueError: The head is for another model.
        """
        text, config = model.config.get_text_config(decoder=True), self.config
        checks = {
            "hidden_size": (config.target_hidden_size, text.hidden_size),
            "vocab_size": (config.layer.vocab_size, text.vocab_size),
        }
        for name, (of_head, of_model) in checks.items():
            if of_head != of_model:
                raise ValueError(
                    f"the EAGLE-3 head is for a target with {name}={of_head}, and {type(model).__name__} has "
                    f"{of_model}; it was trained for {config.target or 'another model'}"
                )
        if config.target_layers is None:
            config = replace(config, target_layers=default_target_layers(text.num_hidden_layers))
            self.config = config
        if max(config.target_layers or ()) >= text.num_hidden_layers:
            raise ValueError(
                f"the EAGLE-3 head reads layer {max(config.target_layers or ())}, and {type(model).__name__} has "
                f"{text.num_hidden_layers}; it was trained for {config.target or 'another model'}"
            )
        if int(self.draft_tokens.max()) >= text.vocab_size:
            raise ValueError("the EAGLE-3 head drafts token ids that the target does not have")
        embedding = model.get_input_embeddings()
        if self.embed_tokens is None:
            if embedding.weight.shape[1] != config.layer.hidden_size:
                raise ValueError(
                    f"the EAGLE-3 head has no embedding of its own and is {config.layer.hidden_size} wide, the "
                    f"target's embedding {embedding.weight.shape[1]}"
                )
            self._target_embedding = (embedding,)
        return self

    @property
    def device(self) -> torch.device:
        """Where the head is."""
        return self.fc.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of its weights."""
        return self.fc.weight.dtype

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings of the target's token ids, `[..., hidden]`."""
        module = self.embed_tokens if self.embed_tokens is not None else self._target_embedding[0]
        # By the weight alone: a model may scale its embeddings, which no head is trained with.
        weight: Any = module.weight
        return nn.functional.embedding(tokens.to(weight.device), weight).to(self.device, self.dtype)

    def fuse(self, states: Tensor) -> Tensor:
        """The target's states at the layers, `[..., layers * target hidden]`, as one, `[..., hidden]`."""
        states = states.to(self.device, self.dtype)
        if self.input_norms:
            parts = states.chunk(len(self.input_norms), dim=-1)
            states = torch.cat([norm(part) for norm, part in zip(self.input_norms, parts, strict=True)], dim=-1)
        fused: Tensor = self.fc(states)
        return fused

    def forward(self, embeds: Tensor, states: Tensor, positions: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """One level.

        Args:
            embeds: Of the tokens, `[batch, new, hidden]`.
            states: Fused ones of the target, or the head's own of the level before, `[batch, new, hidden]`.
            positions: `[batch, new]`.
            attend: See `Attend`.

        Returns:
            The state to feed back, `[batch, new, hidden]`, and the normed one, of which `lm_head` makes logits.
        """
        normed = self.hidden_norm(states)
        residual = normed if self.config.norm_before_residual else states
        both = torch.cat([self.input_layernorm(embeds), normed], dim=-1)
        shape = (*both.shape[:2], -1, self.head_dim)
        query, key = self.q_proj(both).view(shape), self.k_proj(both).view(shape)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        value = self.v_proj(both).view(shape).transpose(1, 2)
        cos, sin = self.rotary(both, positions)
        query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
        attended = attend(query, key, value).transpose(1, 2).reshape(*both.shape[:2], -1)
        states = residual + self.o_proj(attended)
        states = states + self.mlp(self.post_attention_layernorm(states))
        normed = self.norm(states)
        return (normed if self.config.norm_output else states), normed


def _rope_theta(text: Any) -> float:
    parameters = getattr(text, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta") or getattr(text, "rope_theta", None) or 10000.0)
