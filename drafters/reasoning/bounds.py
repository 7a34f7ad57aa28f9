"""Where a reasoning step ends, and where the reasoning does: on text, whatever the tokens are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.generation import StoppingCriteria

from specdec.drafters.tokenizers.token_text import TokenText

Bound = Literal["", "step", "thinking"]
"""What a token ends: nothing, the step, or the reasoning and the step with it."""


@dataclass(frozen=True)
class TextBytes:
    """The bytes of tokens, special ones spelled out.

    Args:
        text: What a tokenizer's tokens stand for.
    """

    text: TokenText

    def __call__(self, token: int) -> bytes:
        piece = self.text.piece(token)
        return self.text.strings.get(token, "").encode() if piece is None else piece

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of tokens; what is no character is shown as one that stands for it."""
        return b"".join(map(self, tokens)).decode("utf-8", "replace")


@dataclass(frozen=True)
class StepMarks:
    """What ends steps and the reasoning.

    Args:
        step_end: Ends a step that holds more than white space.
        thinking_end: Ends the reasoning; None for what never does.
        max_tokens: Tokens of a step at most.
    """

    step_end: bytes
    thinking_end: bytes | None
    max_tokens: int


@dataclass(frozen=True)
class StepSoFar:
    """A step while it is written, immutable, so that a draft can try out how it goes on.

    Args:
        marks: What ends it.
        text: Its bytes.
        num_tokens: Its tokens.
    """

    marks: StepMarks
    text: bytes = b""
    num_tokens: int = 0

    def add(self, piece: bytes) -> tuple[StepSoFar, Bound]:
        """The step with one more token, and what that token ends."""
        marks, text = self.marks, self.text + piece
        longer = StepSoFar(marks, text, self.num_tokens + 1)
        if marks.thinking_end is not None and _ends_within(text, marks.thinking_end, len(piece)) >= 0:
            return longer, "thinking"
        at = _ends_within(text, marks.step_end, len(piece))
        if (at >= 0 and text[:at].strip()) or longer.num_tokens >= marks.max_tokens:
            return longer, "step"
        return longer, ""


def _ends_within(text: bytes, mark: bytes, last: int) -> int:
    """Where the last mark begins that reaches into the last bytes of a text; -1 where none does."""
    return text.rfind(mark, max(0, len(text) - last - len(mark) + 1)) if last else -1


class StepEnd(StoppingCriteria):
    """Ends generation where the step ends; one row.

    Args:
        so_far: The step before the call.
        piece: Bytes of a token.
    """

    def __init__(self, so_far: StepSoFar, piece: Callable[[int], bytes]) -> None:
        self._states, self._piece = [so_far], piece
        self._start: int | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self._start is None:
            self._start = input_ids.shape[1] - 1
        before = self._states[input_ids.shape[1] - 1 - self._start]
        so_far, bound = before.add(self._piece(int(input_ids[0, -1])))
        self._states[input_ids.shape[1] - self._start :] = [so_far]
        return torch.full((len(input_ids),), bool(bound), device=input_ids.device)
