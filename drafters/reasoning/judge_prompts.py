"""The question that follows a drafted step, in the words of the target's chat template."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from specdec.drafters.tokenizers.token_text import TokenText

QUESTION = (
    "Evaluate the last reasoning step solely based on factual correctness and validity. Ignore style, phrasing and "
    "overall usefulness; only judge whether the step is objectively correct and follows from the steps before it. "
    "Assign a score from 0 to 9, where 9 is certainly correct."
)
ANSWER = "The score is: "
PLAIN = f"({QUESTION})\n{ANSWER}"
"""The question where there is no chat template."""

PLACEHOLDER = "STEP-GOES-HERE"


@dataclass(frozen=True)
class Question:
    """What asks for a digit behind a step.

    Args:
        thinking: Token ids where the block of reasoning is still open.
        bare: Token ids where there is none.
        digits: For each digit the tokens that mean it, `[10]`.
    """

    thinking: list[int]
    bare: list[int]
    digits: tuple[tuple[int, ...], ...]


def make_question(tokenizer: Any, text: TokenText, judge_prompt: str | None, thinking_end: str | None) -> Question:
    """The question in tokens.

    Args:
        tokenizer: The target's.
        text: What its tokens stand for.
        judge_prompt: What is to follow the step; None for the default, which closes an open block of reasoning, ends
            the turn and asks in a turn of the user's.
        thinking_end: Ends the reasoning, such as `"</think>"`.

    Raises:
        ValueError: The tokenizer has no digits, or its template does not show how a turn ends.
    """
    digits = digit_tokens(text)
    bare = judge_prompt if judge_prompt is not None else default_question(tokenizer, thinking_end)
    closing = f"{thinking_end}\n\n" if thinking_end is not None and judge_prompt is None else ""
    bare_ids, thinking_ids = (_encoded(tokenizer, prompt) for prompt in (bare, closing + bare))
    if not bare_ids:
        raise ValueError(f"judge_prompt={judge_prompt!r} has no tokens; give a text that asks for a digit, or None")
    return Question(thinking_ids, bare_ids, digits)


def default_question(tokenizer: Any, thinking_end: str | None) -> str:
    """What the chat template puts behind an assistant's turn that the question follows; plain words without one.

    The step itself does not go through the template, so that a template that drops reasoning from earlier turns, as
    most do, has nothing to drop. If the template opens a block of reasoning for the answer, the block is closed again.

    Raises:
        ValueError: The template does not show the assistant's turn.
    """
    if not getattr(tokenizer, "chat_template", None):
        return PLAIN
    turns = [("user", "Go on."), ("assistant", PLACEHOLDER), ("user", QUESTION)]
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        shown: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like
        raise ValueError(
            "judge_prompt=None asks in the words of the chat template, which cannot show a user's turn behind an "
            f"assistant's ({type(error).__name__}: {error}); pass judge_prompt=..., the text that is to follow a step"
        ) from error
    _, found, behind = shown.rpartition(PLACEHOLDER)
    if not found or QUESTION not in behind:
        raise ValueError(
            "judge_prompt=None asks in the words of the chat template, but the template drops the turns that it is "
            "shown; pass judge_prompt=..., the text that is to follow a step"
        )
    start = thinking_start(thinking_end)
    last = behind[behind.index(QUESTION) + len(QUESTION) :]
    if thinking_end is not None and start is not None and last.rfind(start) > last.rfind(thinking_end):
        behind = behind.rstrip() + f"\n\n{thinking_end}\n\n"
    return behind + ANSWER


def thinking_start(thinking_end: str | None) -> str | None:
    """What opens a block of reasoning, by what closes it: `"<think>"` for `"</think>"`; None if it cannot be told."""
    return thinking_end.replace("/", "", 1) if thinking_end is not None and "/" in thinking_end else None


def digit_tokens(text: TokenText) -> tuple[tuple[int, ...], ...]:
    """For each digit the tokens whose text it is, spaces before it aside.

    Raises:
        ValueError: Some digit has none.
    """
    found: dict[bytes, list[int]] = {str(digit).encode(): [] for digit in range(10)}
    for token, piece in enumerate(text.pieces):
        if piece is not None and (digit := piece.lstrip(b" ")) in found:
            found[digit].append(token)
    if missing := [digit.decode() for digit, tokens in found.items() if not tokens]:
        raise ValueError(
            f"the target's tokenizer has no token for {', '.join(missing)}, so it cannot be asked for a score; "
            "use StepVerifier(judge='log-prob', threshold=...) or a function as the judge"
        )
    return tuple(map(tuple, found.values()))


def is_thinking(text: str, thinking_end: str | None) -> bool:
    """Whether a block of reasoning is open at the end of a text."""
    start = thinking_start(thinking_end)
    return start is not None and thinking_end is not None and text.rfind(start) > text.rfind(thinking_end)


def has_ended_thinking(text: str, thinking_end: str | None) -> bool:
    """Whether a text ends with the end of its reasoning, as a prompt does that asks for none."""
    return thinking_end is not None and text.rstrip().endswith(thinking_end)


def _encoded(tokenizer: Any, text: str) -> list[int]:
    """Token ids, special tokens read as such."""
    ids: Iterable[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return list(ids)
