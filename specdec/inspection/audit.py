"""Who wrote which reasoning step, and what became of it."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

Author = Literal["draft", "target", "forced"]
Kind = Literal["step", "answer", "forced end"]


@dataclass
class StepRecord:
    """One step of one row.

    Args:
        row: Index in the batch.
        index: Number of the step in its row, from 0.
        kind: A reasoning step, the answer behind the reasoning, or an end of the reasoning by force.
        author: Whose words they are; those of a forced end are the settings'.
        start: Generated tokens of the row before the step.
        end: The same with the step.
        text: The step.
        reason: Why the target wrote it, or what became of the draft.
        drafted: Tokens that the draft model wrote for it.
        salvaged: Tokens of a draft that the target would have picked itself.
        question_tokens: Tokens by which the target was asked about drafts.
        score: What the judge gave.
        digit_mass: Probability of all digits together, where one was asked for.
        log_prob: Mean log-probability of the drafted tokens under the target.
        accepted: The draft was kept; None if none was judged.
        seconds: Wall time.
    """

    row: int
    index: int
    kind: Kind = "step"
    author: Author = "target"
    start: int = 0
    end: int = 0
    text: str = ""
    reason: str = ""
    drafted: int = 0
    salvaged: int = 0
    question_tokens: int = 0
    score: float | None = None
    digit_mass: float | None = None
    log_prob: float | None = None
    accepted: bool | None = None
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of the step."""
        return self.end - self.start


@dataclass
class StepAudit:
    """The steps of a call.

    Args:
        records: In the order in which they ended; those of one row are in its own order.
    """

    records: list[StepRecord] = field(default_factory=list)

    @classmethod
    def of_dicts(cls, records: Iterable[Mapping[str, Any]]) -> StepAudit:
        """From what `to_dict` lists."""
        return cls([StepRecord(**{k: v for k, v in record.items() if k != "tokens"}) for record in records])

    @property
    def num_judged(self) -> int:
        """Steps that were judged."""
        return sum(record.accepted is not None for record in self.records)

    @property
    def num_kept(self) -> int:
        """Steps that were judged and kept."""
        return sum(record.accepted is True for record in self.records)

    @property
    def kept_share(self) -> float:
        """Share of the judged steps that were kept."""
        return self.num_kept / max(self.num_judged, 1)

    @property
    def draft_share(self) -> float:
        """Share of all steps, answers aside, that the draft model wrote."""
        steps = [record for record in self.records if record.kind == "step"]
        return sum(record.author == "draft" for record in steps) / max(len(steps), 1)

    def of_row(self, row: int) -> list[StepRecord]:
        """The steps of one row."""
        return [record for record in self.records if record.row == row]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; a drafter's figures in a report."""
        return {
            "judged": self.num_judged,
            "kept": self.num_kept,
            "kept_share": self.kept_share,
            "draft_share": self.draft_share,
            "drafted_tokens": sum(record.drafted for record in self.records),
            "salvaged_tokens": sum(record.salvaged for record in self.records),
            "question_tokens": sum(record.question_tokens for record in self.records),
            "steps": [asdict(record) | {"tokens": record.tokens} for record in self.records],
        }

    def __rich__(self) -> Table:
        title = f"{len(self.records)} steps; {self.num_kept} of {self.num_judged} judged drafts kept"
        table = Table(title=title, title_justify="left")
        for name in ("row", "step", "author", "score", "mass", "kept", "tokens", "salvaged", "ms", "why", "text"):
            table.add_column(name, justify="left" if name in ("author", "kept", "why", "text") else "right")
        for record in self.records:
            table.add_row(
                str(record.row),
                str(record.index) if record.kind == "step" else record.kind,
                record.author,
                _shown(record.score),
                _shown(record.digit_mass),
                {None: "", True: "yes", False: "no"}[record.accepted],
                str(record.tokens),
                str(record.salvaged),
                f"{record.seconds * 1e3:.0f}",
                record.reason,
                _shortened(record.text),
            )
        return table

    def __str__(self) -> str:
        console = Console(width=140, file=io.StringIO(), force_jupyter=False)
        with console.capture() as text:
            console.print(self)
        return text.get().rstrip()


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _shortened(text: str, size: int = 40) -> str:
    """One line without markup."""
    line = " ".join(text.split()).replace("[", r"\[")
    return line if len(line) <= size else line[: size - 1] + "…"
