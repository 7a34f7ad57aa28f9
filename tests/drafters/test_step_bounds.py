"""Where steps end, on the text of tokens."""

from __future__ import annotations

import pytest

from specdec.drafters.reasoning.bounds import StepMarks, StepSoFar, TextBytes
from specdec.drafters.tokenizers.token_text import token_text
from tests.drafters.small_tokenizers import byte_level
from tests.tiny_models import EOS, tiny_tokenizer

MARKS = StepMarks(b"\n\n", b"</think>", 6)


def bounds(*pieces: str, marks: StepMarks = MARKS) -> list[str]:
    """What each token ends, a new step beginning behind each end."""
    step, found = StepSoFar(marks), []
    for piece in pieces:
        step, bound = step.add(piece.encode())
        found.append(bound)
        step = StepSoFar(marks) if bound else step
    return found


@pytest.mark.parametrize(
    ("pieces", "ends"),
    [
        (["a", ".\n\n", "b"], ["", "step", ""]),
        (["a", "\n", "\n", "b"], ["", "", "step", ""]),
        (["a", "\n", "b", "\n\n"], ["", "", "", "step"]),
        (["a\n\nb", "c"], ["step", ""]),
        (["\n\n", "\n", "a", "\n", "\n"], ["", "", "", "", "step"]),
        (["\n\na", "b\n\n"], ["", "step"]),
        (["\n\na\n\n"], ["step"]),
        (["a", "</", "think", ">", "b"], ["", "", "", "thinking", ""]),
        (["a</think>\n\n", "b"], ["thinking", ""]),
        (["a", "b", "c", "d", "e", "f", "g"], ["", "", "", "", "", "step", ""]),
        (["a", "", "\n", "", "\n"], ["", "", "", "", "step"]),
    ],
)
def test_ends(pieces: list[str], ends: list[str]) -> None:
    assert bounds(*pieces) == ends


def test_no_end_of_reasoning_where_there_is_none() -> None:
    assert bounds("a", "</think>", marks=StepMarks(b"\n\n", None, 9)) == ["", ""]


def test_every_cut_of_a_text_ends_it_at_the_same_place() -> None:
    text = "first\n\nsecond</think>\n\nthird"
    for size in range(1, 8):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        ends = bounds(*pieces, marks=StepMarks(b"\n\n", b"</think>", 99))
        found = [(end, (at + 1) * size) for at, end in enumerate(ends) if end]
        # The end is found with the token that completes it.
        assert found[0] == ("step", -(-len("first\n\n") // size) * size)
        assert ("thinking", -(-len("first\n\nsecond</think>") // size) * size) in found


def test_special_tokens_have_text() -> None:
    assert TextBytes(token_text(tiny_tokenizer()))(EOS) == b"<eos>"
    tokenizer = byte_level()
    text = TextBytes(token_text(tokenizer))
    ids = tokenizer.encode("naïve café, 20 €\n\n<|endoftext|>")
    assert text.decode(ids) == "naïve café, 20 €\n\n<|endoftext|>"
    assert text.decode(ids[:3]).startswith("na")
