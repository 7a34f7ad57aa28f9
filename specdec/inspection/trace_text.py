"""A trace in the terminal."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from specdec.inspection.trace import Sources, Trace, token_pieces

ANSI = [*(f"bright_{name}" for name in ("cyan", "yellow", "green", "magenta", "red", "blue", "white")), "white"]
"""Behind black text in a terminal, which may not have more than 16 colours."""
TINTS = ("#9BD3F5", "#FFCF70", "#8FDCC0", "#EBB4D2", "#F5A57A", "#F4EC7A", "#C9B8F0", "#C8C8C8")
"""Behind black text: Okabe and Ito's colours, lighter, which can be told apart without red and green, and two more."""
OWN = "the target's own"
MAX_BAR = 40
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
"""Control characters could steer a terminal; their pictures cannot."""


def plural(count: int, noun: str) -> str:
    """Such as "1 token" or "2 tokens"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}{'es' if noun.endswith('s') else 's'}"


def numbered(trace: Trace) -> dict[Sources, int]:
    """The number of a colour for each combination of sources; the rarest ones share the last."""
    return {sources: min(i, len(TINTS) - 1) for i, sources in enumerate(trace.sources)}


def visible(piece: str) -> str:
    """The text of a token, without characters that would not show, or do harm."""
    return piece.translate(PICTURES)


def summary(trace: Trace) -> str:
    """One line on the whole call."""
    tokens, passes = plural(trace.num_tokens, "token"), plural(len(trace.passes), "pass")
    per_pass = trace.num_tokens / max(len(trace.passes), 1)
    return f"{tokens} in {passes} of the target, {per_pass:.2f} per pass; drafter {trace.method}: {trace.guarantee}"


def trace_text(trace: Trace, tokenizer: Any) -> Group:
    """Summary, legend, the text of each row, and how many tokens the passes gave.

    Args:
        trace: Of a call.
        tokenizer: The target's.
    """
    colours = {sources: ANSI[number] for sources, number in numbered(trace).items()}
    rows = []
    for row, prompt in enumerate(trace.prompts):
        if len(trace.prompts) > 1:
            rows.append(Text(f"\nrow {row + 1} of {len(trace.prompts)}", style="bold"))
        rows.append(_row_text(trace, row, prompt, colours, tokenizer))
    return Group(Text(summary(trace)), _legend(trace, colours), Text(), *rows, Text(), _tokens_by_pass(trace))


def _row_text(trace: Trace, row: int, prompt: list[int], colours: dict[Sources, str], tokenizer: Any) -> Text:
    made = trace.of_row(row)
    pieces = token_pieces([*prompt, *(token for one in made for token in one.tokens)], tokenizer)
    text = Text(visible("".join(pieces[: len(prompt)])), style="dim")
    rest = iter(pieces[len(prompt) :])
    for one in made:
        for sources in one.sources_by_token:
            text.append(visible(next(rest)), style=f"not dim black on {colours[sources]}" if sources else "not dim")
    return text


def _legend(trace: Trace, colours: dict[Sources, str]) -> Text:
    text = Text()
    for sources, colour in colours.items():
        text.append(f" {' + '.join(sources)} ", style=f"black on {colour}").append(f" {trace.count(sources)}   ")
    own, each = trace.count(()), ", one per pass" if trace.count(()) == len(trace.passes) else ""
    return text.append(f"{OWN} {own}{each}   ").append("prompt", style="dim")


def _tokens_by_pass(trace: Trace) -> Table:
    counts = Counter(len(made.tokens) for made in trace.passes)
    table = Table("tokens", "passes", "", title="tokens per pass", title_justify="left", box=None, pad_edge=False)
    for tokens in sorted(counts):
        bar = "█" * max(1, round(MAX_BAR * counts[tokens] / max(counts.values())))
        table.add_row(str(tokens), str(counts[tokens]), bar)
    return table
