"""Which pass gave each token of a call, and which source had drafted it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Sources = tuple[str, ...]


@dataclass(frozen=True)
class TracedPass:
    """What one target pass gave one row.

    Args:
        number: Of the pass; the prefill is 0.
        row: Index in the batch.
        tokens: Token ids: the accepted draft tokens, from the tree's first level down, and then the target's own, which
            a reasoning step that was kept has not.
        sources: Who had drafted each accepted token; several names where several drafters agreed.
        num_drafted: Draft tokens of the row that were checked.
        seconds: Wall time since the pass before, drafting included.
    """

    number: int
    row: int
    tokens: list[int]
    sources: list[Sources]
    num_drafted: int
    seconds: float

    @property
    def sources_by_token(self) -> list[Sources]:
        """Who had drafted each token; `()` for the target's own."""
        return [*self.sources, *[()] * (len(self.tokens) - len(self.sources))]


@dataclass
class Trace:
    """All passes of a call of `generate`; see `show` and `save`.

    Args:
        prompts: Token ids of each row's prompt, without padding.
        method: Drafter and verifier, in words.
        guarantee: What the verifier promises.
        passes: In order; the rows of one pass stand together.
    """

    prompts: list[list[int]]
    method: str = ""
    guarantee: str = "token-identical"
    passes: list[TracedPass] = field(default_factory=list)
    _last: float = field(default_factory=time.perf_counter, repr=False)

    def add_pass(
        self,
        rows: Sequence[int],
        tokens: Sequence[Sequence[int]],
        sources: Sequence[Sequence[Sources]],
        num_drafted: Sequence[int],
    ) -> None:
        """Notes a pass; the arguments have one entry per row that took part, see `TracedPass`."""
        number = self.passes[-1].number + 1 if self.passes else 0
        now = time.perf_counter()
        for i, row in enumerate(rows):
            made = TracedPass(number, row, list(tokens[i]), list(sources[i]), num_drafted[i], now - self._last)
            self.passes.append(made)
        self._last = now

    def of_row(self, row: int) -> list[TracedPass]:
        """The passes in which a row took part."""
        return [made for made in self.passes if made.row == row]

    @property
    def sources(self) -> list[Sources]:
        """Every combination of sources that a token came from: single ones first, the most frequent ones first."""
        counts: dict[Sources, int] = {}
        for made in self.passes:
            for names in made.sources:
                counts[names] = counts.get(names, 0) + 1
        return sorted(counts, key=lambda names: (len(names) > 1, -counts[names], names))

    def count(self, sources: Sources) -> int:
        """Tokens that exactly these sources had drafted; for `()`, the target's own."""
        return sum(made.sources_by_token.count(sources) for made in self.passes)

    @property
    def num_tokens(self) -> int:
        """Generated tokens of all rows."""
        return sum(len(made.tokens) for made in self.passes)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "method": self.method,
            "guarantee": self.guarantee,
            "prompts": self.prompts,
            "passes": [asdict(made) for made in self.passes],
        }

    def show(self, tokenizer: Any, console: Any = None) -> None:
        """Prints the text, coloured by sources, and how many tokens the passes gave.

        Args:
            tokenizer: The target's.
            console: Of rich; None for the standard output.
        """
        from rich.console import Console

        from specdec.inspection.trace_view import trace_text

        (console or Console()).print(trace_text(self, tokenizer))

    def to_html(self, tokenizer: Any) -> str:
        """A page of its own, without anything from elsewhere: for a browser, light or dark, or for paper."""
        from specdec.inspection.trace_view import trace_html

        return trace_html(self, tokenizer)

    def save(self, file: str | Path, tokenizer: Any) -> Path:
        """Writes `to_html` to a file; returns its path."""
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(self.to_html(tokenizer), encoding="utf-8")
        return file


def token_pieces(tokens: Sequence[int], tokenizer: Any) -> list[str]:
    """The text that each token adds: joined, they are the text of all.

    A character that several tokens make up belongs to the last of them; the others have no text.

    Args:
        tokens: Token ids of one text.
        tokenizer: Decodes them; special tokens are kept.
    """

    def decoded(part: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(part), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    pieces = []
    # Decoding begins with a token before the piece: tokenizers treat the first token of a text in their own way.
    begin, done = 0, 0
    for end in range(1, len(tokens) + 1):
        before, after = decoded(tokens[begin:done]), decoded(tokens[begin:end])
        if len(after) <= len(before) or (after.endswith("�") and end < len(tokens)):
            pieces.append("")  # not a whole character yet
            continue
        pieces.append(after[len(before) :])
        begin, done = done, end
    return pieces
