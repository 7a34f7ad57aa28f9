"""What a call of SpecReason goes by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specdec.drafters.reasoning.bounds import StepMarks, TextBytes
from specdec.drafters.reasoning.judge_prompts import Question
from specdec.drafters.tokenizers.draft_vocabulary import Vocabularies


@dataclass(frozen=True)
class StepSettings:
    """The drafter's settings, and what it knows of the two models.

    Args:
        model: The draft model.
        vocabularies: How the two models' tokens go together.
        draft_ends: Tokens with which the draft model ends a text, in its own vocabulary.
        draft_longest: Tokens that the draft model can read.
        target_text: Bytes of the target's tokens.
        target_size: Token ids that the target can take are below.
        target_longest: Tokens that the target can read.
        question: What follows a step that is judged; None if nothing is to be asked.
        marks: What ends steps.
        first_steps: See `SpecReasonDrafter`, as for all that follow.
        token_budget: Generated tokens of reasoning at most; None for no limit.
        forced_end: Tokens that end the reasoning then.
        max_entropy: None for no limit.
        compiled: Compile the draft model's passes.
    """

    model: Any
    vocabularies: Vocabularies
    draft_ends: frozenset[int]
    draft_longest: float
    target_text: TextBytes
    target_size: int
    target_longest: float
    question: Question | None
    marks: StepMarks
    first_steps: int = 0
    token_budget: int | None = None
    forced_end: tuple[int, ...] = ()
    max_entropy: float | None = None
    compiled: bool = False

    @property
    def thinking_end(self) -> str | None:
        """Text that ends the reasoning."""
        return None if self.marks.thinking_end is None else self.marks.thinking_end.decode()
