"""Which draft model goes with which target."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from specdec.drafters.base import DraftContext
from specdec.drafters.small_model.passes import warmed_up
from specdec.drafters.small_model.self_draft import first_layers
from specdec.drafters.tokenizers.draft_vocabulary import RowTexts, Use, Vocabularies
from specdec.drafters.tokenizers.token_text import check_tokenizer
from specdec.drafters.tokenizers.vocabulary_map import same_vocabulary, vocabulary_map
from specdec.fallback import length_limit
from specdec.passes.capability import Capability, probe
from specdec.passes.compiled.passes import CompiledPasses
from specdec.passes.tensor_parallel import check_whole
from specdec.target import CausalLM, embedding_rows, input_device, unwrapped

if TYPE_CHECKING:
    from specdec.drafters.draft_model import DraftModelDrafter

SELF = "self"


@dataclass(frozen=True)
class BoundModel:
    """A draft model, ready to draft for one target.

    Args:
        model: The draft model.
        capability: How it can be run.
        compiled: Runs its passes, in its place.
        vocabularies: How the two models' tokens go together.
        target_size: Token ids that the target can take are below.
        longest: Tokens that a draft may reach, itself included.
    """

    model: CausalLM
    capability: Capability
    compiled: CompiledPasses | None
    vocabularies: Vocabularies
    target_size: int
    longest: float

    def texts_of(self, context: DraftContext) -> RowTexts | None:
        """The rows of a call in the draft model's tokens; None where it cannot read one, or draft anything."""
        vocabulary = self.vocabularies.of_call(context)
        if vocabulary is None or max(map(len, context.sequences)) >= self.longest:
            return None
        texts = RowTexts(vocabulary, context.sequences)
        return texts if texts.longest < self.longest else None


def bind_draft_model(drafter: DraftModelDrafter, loaded: CausalLM | None, target: CausalLM) -> BoundModel:
    """Loads a drafter's model, unless it is given, and prepares it for a target.

    Raises:
        ValueError: They do not go together.
        TypeError: It is no model.
    """
    named, tokenizers = drafter.draft_model, (drafter.tokenizer, drafter.target_tokenizer)
    model = loaded if loaded is not None else load_draft_model(named, drafter.layers, target)
    if model is target:
        model = load_draft_model(model, None, target)  # says what is wrong
    use: Use = "shared" if named == SELF else drafter.vocabulary
    vocabularies = load_vocabularies(model, target, use, *tokenizers, isinstance(named, str))
    capability = capability_of(model)
    compiled = warmed_up(model, capability) if drafter.compiled else None
    return BoundModel(model, capability, compiled, vocabularies, embedding_rows(target), longest_sequence(model))


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
            "no draft model is given; pass draft_model=...: a causal LM, its folder or hub name, or "
            "'self' with layers=... for the target's own first layers"
        )
    if draft_model == SELF:
        check_whole(target, "a target whose own layers draft")
        total = target.config.get_text_config(decoder=True).num_hidden_layers
        return first_layers(target, layers if layers is not None else max(1, total // 4))
    if isinstance(draft_model, str):
        _check_config(AutoConfig.from_pretrained(draft_model), draft_model)
        loaded = AutoModelForCausalLM.from_pretrained(draft_model, dtype=target.dtype).eval()
        return loaded.to(input_device(target))
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
    check_whole(draft_model, "a draft model")
    if not draft_model.can_generate():
        raise ValueError(f"draft_model is a {type(draft_model).__name__}, which cannot generate text; pass a causal LM")
    return draft_model


def _check_config(config: Any, name: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"draft_model {name} is an encoder-decoder; pass a causal LM")
    architectures = getattr(config, "architectures", None) or []
    encoders = [a for a in [name, *architectures] if a.endswith(("ForMaskedLM", "ForSequenceClassification"))]
    if encoders:
        raise ValueError(f"draft_model {name} is an encoder ({encoders[0]}); pass a causal LM")


def load_vocabularies(
    draft_model: CausalLM,
    target: CausalLM,
    use: Use,
    tokenizer: Any = None,
    target_tokenizer: Any = None,
    is_named: bool = False,
) -> Vocabularies:
    """How the tokens of a draft model and of a target go together, by what their tokenizers hold.

    Args:
        draft_model: The draft model.
        target: The target.
        use: `"auto"`, or how they are to go together.
        tokenizer: The draft model's: a tokenizer, its folder or hub name; None for the one that was saved with it.
        target_tokenizer: The same for the target.
        is_named: The draft model was given by its name: its tokenizer may be fetched, as its weights were.

    Raises:
        ValueError: A tokenizer is missing, or none is known and the vocabularies cannot be one by their sizes.
        TypeError: What is given is no tokenizer.
    """
    sizes = [_vocabulary_size(model) for model in (target, draft_model)]
    if use == "shared":
        return Vocabularies(sizes[1])
    of_target = tokenizer_of(target, target_tokenizer, "target_tokenizer")
    of_draft = tokenizer_of(draft_model, tokenizer, "tokenizer", is_named)
    if of_target is None or of_draft is None:
        missing = "target_tokenizer" if of_target is None else "tokenizer"
        if use != "auto" or tokenizer is not None or target_tokenizer is not None:
            reason = f"vocabulary={use!r}" if use != "auto" else "comparing tokenizers"
            without = _described(target if of_target is None else draft_model)
            raise ValueError(
                f"{reason} needs both tokenizers, but none was found for the {without}; pass {missing}=...: a "
                "tokenizer, its folder or hub name"
            )
        check_sizes(draft_model, target)
        return Vocabularies(sizes[1])
    if use == "auto" and same_vocabulary(of_target, of_draft):
        return Vocabularies(sizes[1])
    pairs = vocabulary_map(of_target, of_draft, *sizes)
    if use == "intersection" and not len(pairs):
        raise ValueError(
            "vocabulary='intersection' cannot be used: the two tokenizers have no token in common; use 'text'"
        )
    return Vocabularies(sizes[1], pairs, use)


def _vocabulary_size(model: CausalLM) -> int:
    """Token ids that the model can take, and say, are below."""
    return min(embedding_rows(model), getattr(model.get_output_embeddings(), "out_features", embedding_rows(model)))


def tokenizer_of(model: CausalLM, given: Any, setting: str, may_fetch: bool = False) -> Any:
    """The tokenizer that is given, or the one beside the model's weights; None where there is none.

    A lookup on the hub takes a minute where there is no network: nothing is fetched that nobody has named.
    """
    if given is not None and not isinstance(given, str):
        check_tokenizer(given)
        return given
    name = given or getattr(model, "name_or_path", "")
    if not name:
        return None
    error: Exception | None = None
    for local_only in (True, False) if given or may_fetch else (True,):
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local_only)
        except Exception as problem:  # of many kinds: no file, no network, a name that cannot be
            error = problem
            continue
        # Where files are missing, transformers may make an empty tokenizer of the model's kind.
        if given or 2 * len(tokenizer) > embedding_rows(model):
            return tokenizer
    if given:
        raise ValueError(f"{setting}={given!r} holds no tokenizer that can be loaded; pass another one") from error
    return None


def _described(model: CausalLM) -> str:
    return f"{type(model).__name__} ({getattr(model, 'name_or_path', '') or 'unnamed'})"


def check_sizes(draft_model: CausalLM, target: CausalLM) -> None:
    """Tells vocabularies apart that are not one with more or less padding.

    Raises:
        ValueError: The sizes are too far apart.
    """
    sizes = [embedding_rows(model) for model in (draft_model, target)]
    if abs(sizes[0] - sizes[1]) > max(128, max(sizes) // 100):
        raise ValueError(
            f"the draft model {_described(draft_model)} has a vocabulary of {sizes[0]} tokens and the target "
            f"{_described(target)} one of {sizes[1]}, so they cannot share a tokenizer; pass a draft model with the "
            "target's tokenizer, or tokenizer=... (the draft model's) and target_tokenizer=..., by which their tokens "
            "are told apart"
        )


def longest_sequence(draft_model: CausalLM) -> float:
    """Tokens that a draft may reach, itself included."""
    positions = getattr(draft_model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    limit = length_limit(draft_model)
    return min(positions or math.inf, limit[0] if limit is not None else math.inf)


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
