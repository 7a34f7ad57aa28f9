"""Progress of distillation and training, and tables of evaluations."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from specdec.training.evaluation import Evaluation


def progress_bar(console: Console | None) -> Progress:
    """Counts, times and a `note` per task; nothing without a console."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=False, compact=True),
        TextColumn("{task.fields[note]}"),
        console=console or Console(quiet=True),
        disable=console is None,
    )


def summary(result: Evaluation) -> str:
    """One line: loss and first-rank accuracy per head, expected tokens per pass."""
    losses = " ".join(f"{loss:.2f}" for loss in result.losses)
    accuracies = " ".join(f"{accuracy:.0%}" for accuracy in result.top(1))
    return f"loss {losses} | top-1 {accuracies} | {result.tokens_per_pass['tree of 64']:.2f} tokens/pass"


def evaluation_table(result: Evaluation, title: str) -> Table:
    """Loss and accuracies per head."""
    each = ", ".join(f"{name} {tokens:.2f}" for name, tokens in result.tokens_per_pass.items())
    table = Table(title=title, caption=f"expected tokens per pass: {each}")
    for name in ("head", "loss", "top-1", "top-5", "top-10"):
        table.add_column(name, justify="right")
    for k, loss in enumerate(result.losses):
        table.add_row(str(k + 1), f"{loss:.3f}", *(f"{result.top(n)[k]:.1%}" for n in (1, 5, 10)))
    return table
