"""Results as tables: for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from specdec.benchmark.runs import Measurement, Row

if TYPE_CHECKING:
    from specdec.benchmark.results import BenchmarkResults, PartResults

GUARANTEES = {
    "token-identical": "exact: the tokens of {}",
    "distribution": "same distribution, other draws",
    "approximate": "approximate: the output may differ",
}
SHOWN_POSITIONS = 4
NOTHING = "–"


@dataclass(frozen=True)
class TextTable:
    """A table before it is laid out.

    Args:
        title: Above it.
        columns: Their headings; the first one is text, the others are figures.
        rows: Cells.
        notes: Below it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def to_rich(self) -> Table:
        """For the terminal."""
        caption = "\n".join(self.notes) or None
        table = Table(title=self.title, title_justify="left", caption=caption, caption_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left", no_wrap=number == 0)
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_markdown(self) -> str:
        """For a document."""
        lines = [f"**{self.title}**", "", _line(self.columns), "|---" + "|---:" * (len(self.columns) - 1) + "|"]
        return "\n".join([*lines, *map(_line, self.rows), *(f"\n{note}" for note in self.notes), ""])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _times(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}×"


def _range(values: tuple[float, float], form: str) -> str:
    return f"{values[0]:{form}}–{values[1]:{form}}"


def text_tables(results: BenchmarkResults) -> list[TextTable]:
    """All tables: per part one for each guarantee, one on the drafting, and one by category where there are some."""
    found: list[TextTable] = []
    for name, part in results.parts.items():
        rows = part.measurement.rows()
        title = _title(name, part)
        given = {row.guarantee for row in rows}
        found += [speed_table(title, part.measurement, rows, g) for g in GUARANTEES if g in given]
        if drafting := [row for row in rows if row.num_draft_tokens]:
            found.append(drafting_table(title, drafting))
        if len(categories := dict.fromkeys(c for row in rows for c in row.speedup_by_category)) > 1:
            cells = [[row.method, *(_times(row.speedup_by_category.get(c)) for c in categories)] for row in rows]
            found.append(TextTable(f"{title}: speed-up by category", ["method", *categories], cells))
    return found


def _title(name: str, part: PartResults) -> str:
    tokens = part.measurement.settings.arguments["max_new_tokens"]
    setting = "greedy" if part.part.temperature == 0 else f"T={part.part.temperature:g}"
    kind = "random tokens, " if part.part.is_random else ""
    return f"{kind}{setting}, batch {part.part.batch_size}, {tokens} tokens, {part.num_prompts} prompts"


def speed_table(title: str, measurement: Measurement, rows: Sequence[Row], guarantee: str) -> TextTable:
    """The reference, and the methods of one guarantee."""
    reference = rows[0]
    shown = [row for row in rows if row.guarantee == guarantee]
    shown = shown if reference in shown else [reference, *shown]
    columns: dict[str, Callable[[Row], str]] = {
        "method": lambda row: row.method,
        "tokens/s": lambda row: f"{row.tokens_per_second:.0f} ({_range(row.tokens_per_second_spread, '.0f')})",
        "speed-up": lambda row: f"{_times(row.speedup)} ({_range(row.speedup_spread, '.2f')})",
        "prefill, ms": lambda row: f"{1e3 * row.prefill_seconds:.1f}",
        "decode tokens/s": lambda row: f"{row.decode_tokens_per_second:.0f}",
        "decode speed-up": lambda row: _times(row.decode_speedup),
        "tokens/pass": lambda row: f"{row.tokens_per_pass:.2f}",
        "peak MiB": lambda row: NOTHING if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
        "identical": lambda row: (
            "yes" if row.num_identical == row.num_runs else f"{row.num_identical} of {row.num_runs}"
        ),
    }
    notes = [f"{row.method}: {note}" for row in shown if row.guarantee == guarantee for note in row.notes]
    if guarantee == "token-identical":
        notes += [f"{name} is left out: {reason}" for name, reason in measurement.failed.items()]
        ready = measurement.setup_seconds.items()
        notes += [f"{name}: {seconds:.0f} s to compile and run once, not counted" for name, seconds in ready]
    return TextTable(
        f"{title}; {GUARANTEES[guarantee].format(measurement.reference)}",
        list(columns),
        [[cell(row) for cell in columns.values()] for row in shown],
        notes,
    )


def drafting_table(title: str, rows: Sequence[Row]) -> TextTable:
    """What was drafted and accepted, and where the time went."""
    depth = min(SHOWN_POSITIONS, max(len(row.accepted_per_position) for row in rows))
    phases = [phase for phase in rows[0].seconds_per_phase if any(row.seconds_per_phase.get(phase) for row in rows)]
    cells = []
    for row in rows:
        total = sum(row.seconds_per_phase.values()) or 1.0
        accepted = [f"{100 * share:.0f}" for share in row.accepted_per_position[:depth]]
        shares = [f"{100 * row.seconds_per_phase.get(phase, 0.0) / total:.0f}" for phase in phases]
        rate = f"{100 * (row.acceptance_rate or 0.0):.0f}"
        cells.append(
            [row.method, str(row.num_draft_tokens), rate, *accepted, *[NOTHING] * (depth - len(accepted)), *shares]
        )
    positions = [f"at {position}" for position in range(1, depth + 1)]
    columns = ["method", "draft tokens", "accepted", *positions, *phases]
    notes = ["in %: draft tokens accepted; drafts accepted up to depth 1, 2, ...; time by phase"]
    return TextTable(f"{title}: drafting", columns, cells, notes)


def conditions(results: BenchmarkResults) -> str:
    """On what it was measured, in one line."""
    found, target = results.circumstances, results.models["target"]
    machine = found["hardware"]
    where = ", ".join(machine["gpus"]) if target["device"] != "cpu" and machine["gpus"] else machine["cpu"]
    models = "; ".join(
        f"{kind} {model['name']} ({model['parameters'] / 1e6:.1f} M, {model['dtype']})"
        for kind, model in results.models.items()
        if model
    )
    return (
        f"{'Interrupted: medians' if results.is_interrupted else 'Medians'} over the prompts, quartiles in brackets; "
        f"{models}; {where}, {machine['threads']} threads; "
        f"torch {found['versions']['torch']}, transformers {found['versions']['transformers']}; "
        f"commit {short_commit(found['commit'])}"
    )


def short_commit(commit: str | None) -> str:
    """Twelve digits, and whether files differed from it."""
    name, sign, changes = (commit or "unknown").partition("+")
    return name[:12] + sign + changes


def markdown(results: BenchmarkResults, pictures: Sequence[Path] = ()) -> str:
    """A document with all tables and figures."""
    shown = [f"![{path.stem.replace('_', ' ')}]({path.name})\n" for path in pictures]
    command = f"`{results.circumstances['command']}`, {results.circumstances['created']}.\n"
    tables = [table.to_markdown() for table in text_tables(results)]
    return "\n".join(["# Benchmark\n", conditions(results) + ".\n", command, *tables, *shown])
