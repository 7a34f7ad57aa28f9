"""SpecReason: a draft model that writes reasoning steps, and a drafter of tokens for the target's own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args
from weakref import ref

import torch

from specdec.call import Call
from specdec.drafters.base import DraftContext, Drafter, DraftSession, Needs
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.merged import MergedDrafter
from specdec.drafters.reasoning.bounds import StepMarks, TextBytes
from specdec.drafters.reasoning.judge_prompts import make_question
from specdec.drafters.reasoning.loop import StepCall
from specdec.drafters.reasoning.settings import StepSettings
from specdec.drafters.small_model.loading import (
    SELF,
    capability_of,
    load_draft_model,
    load_vocabularies,
    longest_sequence,
    tokenizer_of,
)
from specdec.drafters.tokenizers.draft_vocabulary import Use
from specdec.drafters.tokenizers.token_text import token_text
from specdec.target import embedding_rows

DRAFT_MODEL = DraftModelDrafter.name


@dataclass(eq=False)
class SpecReasonDrafter(Drafter):
    """Proposes whole reasoning steps that a smaller model writes.

    "SpecReason: Fast and Accurate Inference-Time Compute via Speculative Reasoning" (arXiv 2504.07891, sections 4.1 and
    4.2). What becomes of a step, the verifier says:

    - `StepVerifier` keeps it if the target judges it good enough. The target sees the step and a question about it in
      one pass behind its kv cache. A step that is not kept is the target's to write, with `drafter` to draft its
      tokens. The output is approximate. Once the reasoning has ended, the target writes the answer, exactly.
    - `"exact"` takes the step for a long draft of tokens, and the output is that of the target alone.

    With `StepVerifier`, rows of a batch are written one after another, and the report's `audit` lists who wrote which
    step, and why.

    Args:
        draft_model: A causal LM, its folder or hub name, or `"self"`, a quarter of the target's own layers.
        drafter: Drafts tokens for the steps and the answer that the target writes: a name, `"draft-model"` for the same
            draft model, a Drafter, a list, or None for none.
        judge_prompt: The text behind which the target is to name a digit. None: the target's chat template ends the
            turn (and the block of reasoning, if it is open), and a user's turn asks.
        step_end: Text that ends a step.
        max_step_tokens: Tokens of a step at most.
        first_steps: So many steps are the target's at first.
        thinking_end: Text that ends the reasoning; None where nothing does.
        token_budget: Tokens of reasoning after which it is ended by force, with `StepVerifier` only; None for no limit.
        budget_text: What is written then; None for `thinking_end` between line breaks.
        max_entropy: A step of whose first token the draft model is less sure, in nats, is left to the target; 1.0 in
            "GlimpRouter". None for no limit.
        min_confidence: With the verifier `"exact"`, a draft ends where it is all right with less than this probability.
        compiled: Compile the draft model's passes; see `DraftModelDrafter`.
        tokenizer: The draft model's, its folder or hub name; None for the one that lies beside its weights.
        target_tokenizer: The same for the target.
        vocabulary: How their tokens go together; see `DraftModelDrafter`. Steps that are judged go by text where the
            vocabularies differ.
    """

    name = "spec-reason"

    draft_model: Any = None
    drafter: Any = None
    judge_prompt: str | None = None
    step_end: str = "\n\n"
    max_step_tokens: int = 512
    first_steps: int = 0
    thinking_end: str | None = "</think>"
    token_budget: int | None = None
    budget_text: str | None = None
    max_entropy: float | None = None
    min_confidence: float = 0.2
    compiled: bool = False
    tokenizer: Any = None
    target_tokenizer: Any = None
    vocabulary: Use = "auto"

    def __post_init__(self) -> None:
        self._check_settings()
        self._lock = threading.Lock()
        self._target: Callable[[], Any] = lambda: None
        self._model: Any = None
        self._settings: StepSettings | None = None
        self._shared: list[DraftModelDrafter] = []
        self._chain = self._shared_drafter(growth="chain", min_confidence=self.min_confidence)
        self._inner = self._resolved(self.drafter)
        self._exact = self._with_chain(self._inner)
        self.needs_hidden_states, self.num_top_tokens = self._exact.needs_hidden_states, self._exact.num_top_tokens
        self.needs_step_seconds = self._exact.needs_step_seconds

    def fresh(self) -> SpecReasonDrafter:
        """Not available.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "drafter='spec-reason' cannot be used with deterministic=True: whether a step is drafted depends on "
            "measured times; use deterministic=False"
        )

    def settings(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        for key in ("draft_model", "tokenizer", "target_tokenizer"):
            if not isinstance(value := values[key], str | None):
                values[key] = getattr(value, "name_or_path", "") or type(value).__name__
        inner = self._inner
        return values | {"drafter": None if inner is None else {"name": inner.name, **inner.settings()}}

    # --- the models ---

    def bind(self, model: Any) -> None:
        with self._lock:
            if self._settings is None or self._target() is not model:
                self._load(model)
        if self._inner is not None:
            self._inner.bind(model)

    def _load(self, model: Any) -> None:
        is_named = isinstance(self.draft_model, str)
        is_own = self._model is None or self.draft_model == SELF
        draft_model = load_draft_model(self.draft_model, None, model) if is_own else self._model
        if draft_model is model:
            draft_model = load_draft_model(draft_model, None, model)  # says what is wrong
        tokenizer = tokenizer_of(model, self.target_tokenizer, "target_tokenizer")
        if tokenizer is None:
            raise ValueError(
                "target_tokenizer=None, and no tokenizer lies beside the target's weights: steps end where their text "
                "does; pass target_tokenizer=..., a tokenizer, its folder or hub name"
            )
        capability_of(draft_model)  # probes it
        use: Use = "shared" if self.draft_model == SELF else self.vocabulary
        end = self.thinking_end
        forced = self.budget_text or (f"\n{end}\n\n" if end is not None else "")
        self._settings = StepSettings(
            model=draft_model,
            vocabularies=load_vocabularies(draft_model, model, use, self.tokenizer, self.target_tokenizer, is_named),
            draft_ends=_end_tokens(draft_model),
            draft_longest=longest_sequence(draft_model),
            target_text=TextBytes(token_text(tokenizer)),
            target_size=embedding_rows(model),
            target_longest=longest_sequence(model),
            question=None,
            marks=StepMarks(self.step_end.encode(), None if end is None else end.encode(), self.max_step_tokens),
            first_steps=self.first_steps,
            token_budget=self.token_budget,
            forced_end=tuple(tokenizer(forced, add_special_tokens=False)["input_ids"]) if forced else (),
            max_entropy=self.max_entropy,
            compiled=self.compiled,
        )
        self._tokenizer, self._model, self._target = tokenizer, draft_model, ref(model)
        for drafter in self._shared if self.draft_model != SELF else ():
            drafter.draft_model = draft_model

    def fit(self, verifier: Any) -> None:
        if verifier.guarantee == "distribution":
            raise ValueError(
                f"verifier={verifier.name!r} needs drafts that were drawn at random, which drafter {self.name!r} does "
                "not make; use StepVerifier(), or verifier='exact'"
            )
        if self.token_budget is not None and not verifier.judges_steps:
            raise ValueError(
                f"token_budget={self.token_budget} ends the reasoning by force, which verifier={verifier.name!r} "
                "forbids: its output is the target's own; use StepVerifier(), or leave token_budget out"
            )
        assert self._settings is not None
        if not verifier.judges_steps:
            self._exact.bind(self._target())
        elif verifier.asks_target and self._settings.question is None:
            text = self._settings.target_text.text
            question = make_question(self._tokenizer, text, self.judge_prompt, self.thinking_end)
            self._settings = replace(self._settings, question=question)

    # --- a call ---

    def generate_steps(self, speculation: Any, call: Call) -> Any:
        assert self._settings is not None
        return StepCall(speculation, self._settings, self._inner, call).run()

    def needs(self, device: torch.device, rows: int, is_sampled: bool) -> Needs:
        return self._exact.needs(device, rows, is_sampled)

    def start(self, context: DraftContext) -> DraftSession:
        if self._settings is None:
            raise ValueError("bind(model) comes before anything is drafted; specdec.accelerate does so")
        return self._exact.start(context)

    # --- settings ---

    def _resolved(self, drafter: Any) -> Drafter | None:
        """The drafter of the target's own steps, from what `specdec.accelerate` takes."""
        from specdec.drafters.by_name import resolve_drafter  # which knows the drafters by name, this one too

        if isinstance(drafter, str) and drafter == DRAFT_MODEL:
            drafter = self._shared_drafter()
        elif isinstance(drafter, Sequence) and not isinstance(drafter, str):
            drafter = [self._shared_drafter() if part == DRAFT_MODEL else part for part in drafter]
        inner = resolve_drafter(drafter)
        if isinstance(inner, SpecReasonDrafter):
            raise ValueError("drafter: a SpecReasonDrafter cannot draft for another; pass a drafter of tokens, or None")
        return inner

    def _with_chain(self, inner: Drafter | None) -> Drafter:
        """What drafts with the verifier `"exact"`."""
        if inner is None or len(self._shared) > 1:  # a draft model that drafts tokens anyway
            return inner or self._chain
        sources = inner.sources if type(inner) is MergedDrafter else [inner]
        return MergedDrafter([self._chain, *sources])

    def _shared_drafter(self, **settings: Any) -> DraftModelDrafter:
        """One that drafts tokens by the same draft model."""
        for name in ("tokenizer", "target_tokenizer", "vocabulary", "compiled"):
            settings[name] = getattr(self, name)
        self._shared.append(DraftModelDrafter(self.draft_model, **settings))
        return self._shared[-1]

    def _check_settings(self) -> None:
        """Raises a ValueError for a setting out of range."""
        if self.vocabulary not in get_args(Use):
            known = ", ".join(map(repr, get_args(Use)))
            raise ValueError(f"vocabulary={self.vocabulary!r} is not known; use one of {known}")
        for name, least in (("max_step_tokens", 1), ("first_steps", 0), ("token_budget", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        for name in ("step_end", "thinking_end", "judge_prompt", "budget_text"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} is empty; give at least one character, or leave it out")
        if self.max_entropy is not None and self.max_entropy <= 0:
            raise ValueError(f"max_entropy={self.max_entropy} must be above 0, or None for no limit")
        if not 0 <= self.min_confidence < 1:
            raise ValueError(f"min_confidence={self.min_confidence} must be at least 0 and below 1")
        if self.token_budget is not None and self.thinking_end is None:
            raise ValueError("token_budget needs thinking_end, the text that ends the reasoning; give both or neither")
        if self.budget_text is not None and (
            self.token_budget is None or str(self.thinking_end) not in self.budget_text
        ):
            raise ValueError(
                f"budget_text={self.budget_text!r} is what ends the reasoning once token_budget is used up: it goes "
                f"with token_budget and must hold thinking_end={self.thinking_end!r}"
            )


def _end_tokens(model: Any) -> frozenset[int]:
    """Tokens with which a model ends a text, by its generation settings."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)
