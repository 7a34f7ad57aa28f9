"""Notes which tokens of a completion had been drafted."""

from __future__ import annotations

from typing import Any

from specdec.drafters.base import DraftContext, Drafter, Step
from specdec.tree import TokenTree


class RecordedDrafter(Drafter):
    """Another drafter, and how many of its tokens were accepted per step; for one row.

    Args:
        drafter: What guesses.
    """

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.name = drafter.name
        self.accepted: list[int] = []

    def start(self, context: DraftContext) -> None:
        self.accepted.clear()
        self.drafter.start(context)

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        """See `Drafter.propose`."""
        return self.drafter.propose(context, max_nodes)

    def observe(self, context: DraftContext, step: Step) -> None:
        self.accepted.append(step.accepted[0])
        self.drafter.observe(context, step)

    def finish(self, context: DraftContext) -> None:
        self.drafter.finish(context)

    def settings(self) -> dict[str, Any]:
        return self.drafter.settings()


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
