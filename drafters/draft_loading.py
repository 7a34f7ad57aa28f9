"""Which draft model goes with which target."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from specdec.capability import Capability, probe
from specdec.drafters.self_draft import first_layers
from specdec.target import CausalLM, embedding_rows, unwrapped

SELF = "self"


def load_draft_model(draft_model: Any, layers: int | None, target: CausalLM) -> CausalLM:
    """The draft model for a target.

    Args:
        draft_model: A model, a folder or hub name, or `"self"`.
        layers: How many of the target's layers `"self"` stands for.
        target: The target.

    Raises:
        ValueError: There is none, it is the target itself, or it cannot generate text.
        TypeError: It is no model.
    """
    if draft_model is None:
        raise ValueError(
            "no draft model is given; pass DraftModelDrafter(draft_model=...): a causal LM with the target's "
            "tokenizer, its folder or hub name, or 'self' with layers=... for the target's own first layers"
        )
    if draft_model == SELF:
        total = target.config.get_text_config(decoder=True).num_hidden_layers
        return first_layers(target, layers if layers is not None else max(1, total // 4))
    if isinstance(draft_model, str):
        _check_config(AutoConfig.from_pretrained(draft_model), draft_model)
        loaded = AutoModelForCausalLM.from_pretrained(draft_model, dtype=target.dtype).eval()
        return loaded.to(target.get_input_embeddings().weight.device)
    draft_model = unwrapped(draft_model)
    if hasattr(draft_model, "config"):
        _check_config(draft_model.config, type(draft_model).__name__)
    if not hasattr(draft_model, "generate") or not hasattr(draft_model, "config"):
        raise TypeError(f"draft_model must be a transformers causal LM or a name, not {type(draft_model).__name__}")
    if draft_model is target:
        raise ValueError(
            "draft_model is the target itself, so that a draft would take as long as the answer; pass a smaller model, "
            "or 'self' with layers=... for the target's own first layers"
        )
    if not draft_model.can_generate():
        raise ValueError(f"draft_model is a {type(draft_model).__name__}, which cannot generate text; pass a causal LM")
    return draft_model


def _check_config(config: Any, name: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"draft_model {name} is an encoder-decoder; pass a causal LM with the target's tokenizer")
    architectures = getattr(config, "architectures", None) or []
    encoders = [a for a in [name, *architectures] if a.endswith(("ForMaskedLM", "ForSequenceClassification"))]
    if encoders:
        raise ValueError(f"draft_model {name} is an encoder ({encoders[0]}); pass a causal LM")


def check_sizes(draft_model: CausalLM, target: CausalLM) -> None:
    """Tells vocabularies apart that are not one with more or less padding.

    Raises:
        ValueError: The sizes are too far apart.
    """
    sizes = [embedding_rows(model) for model in (draft_model, target)]
    if abs(sizes[0] - sizes[1]) > max(128, max(sizes) // 100):
        names = [f"{type(m).__name__} ({getattr(m, 'name_or_path', '') or 'unnamed'})" for m in (draft_model, target)]
        raise ValueError(
            f"the draft model {names[0]} has a vocabulary of {sizes[0]} tokens and the target {names[1]} one of "
            f"{sizes[1]}, so they cannot share a tokenizer; pass a draft model with the target's tokenizer"
        )


def capability_of(draft_model: CausalLM) -> Capability:
    """How a draft model can be run.

    Raises:
        ValueError: Not ahead of what is committed: it could not be rolled back.
    """
    capability = probe(draft_model)
    if capability.mode == "plain":
        raise ValueError(
            f"draft_model {type(draft_model).__name__} cannot draft, because what it has read cannot be taken back "
            f"({capability.reason}); pass another draft model"
        )
    return capability
