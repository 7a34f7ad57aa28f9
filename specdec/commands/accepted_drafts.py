"""Tells which tokens of a completion had been drafted."""

from __future__ import annotations

from typing import Any


def pieces_of(new_tokens: list[int], accepted: list[int], tokenizer: Any) -> list[tuple[str, bool]]:
    """Text of a completion cut where drafted tokens begin and end.

    Args:
        new_tokens: The completion; its first token is the prefill's.
        accepted: Accepted draft tokens of each further step, which adds one token more.
        tokenizer: Of the target.

    Returns:
        Text, and whether it was drafted.
    """
    drafted = [False]
    for count in accepted:
        drafted += [True] * count + [False]
    pieces: list[tuple[str, bool]] = []
    shown = ""
    for end in range(1, len(new_tokens) + 1):
        is_last_of_piece = end == len(new_tokens) or drafted[end] != drafted[end - 1]
        if is_last_of_piece:
            text = tokenizer.decode(new_tokens[:end], skip_special_tokens=True)
            # A character of several tokens appears with the last of them.
            if text.startswith(shown) and not (text.endswith("\ufffd") and end < len(new_tokens)):
                pieces.append((text[len(shown) :], drafted[end - 1]))
                shown = text
    return pieces
