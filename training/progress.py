"""What a training run shows while it goes on."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from specdec.training.evaluation import Evaluation


class TrainingProgress:
    """A bar with losses, accuracies and expected tokens per pass; without a terminal, a line now and then.

    Args:
        console: Where to.
        title: Before the bar.
        steps: Of the whole run.
        done: Steps that are done already.
        enabled: Only the main process shows anything.
    """

    def __init__(self, console: Console, title: str, steps: int, done: int, enabled: bool) -> None:
        self.console = console
        self.enabled = enabled
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                   TextColumn("{task.fields[note]}"))  # fmt: skip
        self.bar = Progress(*columns, console=console, disable=not (enabled and console.is_terminal))
        self.task = self.bar.add_task(title, total=steps, completed=done, note="")

    def __enter__(self) -> TrainingProgress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def advance(self, step: int) -> None:
        """So many steps are done."""
        self.bar.update(self.task, completed=step)

    def show(self, step: int, recent: Evaluation, seconds_per_step: float) -> None:
        """Figures of the last steps."""
        note = summary(recent)
        self.bar.update(self.task, note=note)
        if self.enabled and not self.console.is_terminal:
            total = self.bar.tasks[0].total
            self.say(f"step {step}/{total:.0f}  {note}  {seconds_per_step:.2f} s/step")

    def say(self, text: str) -> None:
        """A line of its own."""
        if self.enabled:
            self.console.print(text, highlight=False, soft_wrap=True)


def summary(result: Evaluation) -> str:
    """One line: loss and first-rank accuracy per head, expected tokens per pass."""
    losses = " ".join(f"{loss:.2f}" for loss in result.losses)
    accuracies = " ".join(f"{accuracy:.0%}" for accuracy in result.top(1))
    return f"loss {losses} | top-1 {accuracies} | {result.tokens_per_pass['tree of 64']:.2f} tokens/pass"


def evaluation_table(result: Evaluation, title: str) -> Table:
    """Loss and accuracies per head."""
    table = Table(title=title, caption=_expectations(result))
    for name in ("head", "loss", "top-1", "top-5", "top-10"):
        table.add_column(name, justify="right")
    rows: list[list[Any]] = [
        [k + 1, f"{loss:.3f}", *(f"{result.top(n)[k]:.1%}" for n in (1, 5, 10))] for k, loss in enumerate(result.losses)
    ]
    for row in rows:
        table.add_row(*map(str, row))
    return table


def _expectations(result: Evaluation) -> str:
    each = ", ".join(f"{name} {tokens:.2f}" for name, tokens in result.tokens_per_pass.items())
    return f"expected tokens per pass: {each}"
