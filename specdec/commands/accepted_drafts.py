"""Tells which tokens of a completion had been drafted."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.benchmark.measuring import Method, Sample

Pieces = list[tuple[str, bool]]
"""Text, and whether it was drafted."""


class Traced:
    """Methods whose runs say which tokens had been drafted.

    Args:
        tokenizer: Of the target.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.runners: dict[str, Any] = {}

    def method(self, method: Method) -> Method:
        """The same method; one of specdec is traced, which takes microseconds a pass."""

        def prepare() -> Any:
            self.runners[method.name] = runner = method.prepare()
            return runner

        is_ours = method.name.startswith("specdec")
        return replace(method, prepare=prepare, kwargs={**method.kwargs, "trace": True} if is_ours else method.kwargs)

    def pieces(self, sample: Sample) -> Pieces:
        """The text of a run that has just ended, cut where drafted tokens begin and end."""
        report = getattr(self.runners[sample.method], "report", None)
        output, trace = sample.output or [], getattr(report, "trace", None)
        passes = trace.passes[1:] if trace is not None else []  # the first one is the prefill
        accepted = [len(made.tokens) - 1 for made in passes] if passes else [0] * len(output)
        return pieces_of(output, accepted, self.tokenizer)


def pieces_of(new_tokens: list[int], accepted: list[int], tokenizer: Any) -> Pieces:
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
    pieces: Pieces = []
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
