"""The methods that the demonstration and the benchmark compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from specdec.api import SpeculativeModel, accelerate
from specdec.benchmark.measuring import EncodedPrompt, Method
from specdec.budget import Budget
from specdec.common.embedded import Prompt
from specdec.drafters.base import Drafter
from specdec.passes.compiled.passes import CompileMode
from specdec.verifiers.base import Verifier
from specdec.verifiers.by_name import resolve_verifier

HF_GENERATE = "HF generate"
HF_LOOKUP = "HF prompt lookup"
HF_ASSISTED = "HF assisted"
OFF = "specdec off"


def hf_methods(model: Any, draft_model: Any = None, draft_kwargs: dict[str, Any] | None = None) -> list[Method]:
    """What transformers itself offers; plain `generate` first.

    Args:
        model: The target.
        draft_model: Without one, assisted generation is left out.
        draft_kwargs: What assisted generation needs besides, such as tokenizers that differ.
    """
    methods = [
        Method(HF_GENERATE, lambda: model),
        Method(HF_LOOKUP, lambda: model, {"prompt_lookup_num_tokens": 10}, optional=True),
    ]
    if draft_model is not None:
        kwargs = {"assistant_model": draft_model, **(draft_kwargs or {})}
        methods.append(Method(HF_ASSISTED, lambda: model, kwargs, optional=True))
    return methods


def specdec_method(
    name: str,
    model: Any,
    make_drafter: Callable[[], Drafter | None],
    remembers: bool = False,
    max_nodes: int = 64,
    optional: bool = False,
    whole: bool = False,
    verifier: str | Verifier = "exact",
    compiled: CompileMode = False,
) -> Method:
    """Ours with a drafter, made anew for each run unless it `remembers`: repeats must not help it.

    With `whole`, each draft is verified whole, whether that pays or not; with `compiled`, by compiled passes.
    """

    def prepare() -> SpeculativeModel:
        budget = Budget(max_nodes, whole, owner=name)
        return accelerate(model, make_drafter(), rule, budget=budget, compiled=compiled)

    rule = resolve_verifier(verifier)
    return Method(name, prepare, remembers=remembers, optional=optional, guarantee=rule.guarantee)


def assisted_kwargs(tokenizer: Any, draft_tokenizer: Any) -> dict[str, Any]:
    """What `generate` needs for a draft model with another tokenizer; nothing if it is the same by content."""
    if tokenizer.get_vocab() == draft_tokenizer.get_vocab():
        return {}
    return {"tokenizer": tokenizer, "assistant_tokenizer": draft_tokenizer}


def encode_prompts(prompts: Sequence[Prompt], tokenizer: Any, device: Any) -> list[EncodedPrompt]:
    """Prompts as the target takes them."""
    return [EncodedPrompt(p.id, tokenizer(p.text, return_tensors="pt").input_ids.to(device)) for p in prompts]
