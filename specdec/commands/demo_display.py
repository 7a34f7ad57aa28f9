"""What the demonstration shows while it runs, and at its end.

Nothing is drawn while a method runs: the screen changes between runs only, so that no method is timed together with it.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from specdec.benchmark.measuring import Measurement, Sample
from specdec.commands.accepted_drafts import Pieces

MAX_PANEL_LINES = 16
OURS = "green"
DRAFTED = "bold black on green"


class PlainDisplay:
    """A line per prompt, for files and pipes.

    Args:
        console: Where to print.
        methods: Names, in the order of the table.
        num_prompts: Prompts in all.
    """

    def __init__(self, console: Console, methods: Sequence[str], num_prompts: int) -> None:
        self.console = console
        self.methods = list(methods)
        self.num_prompts = num_prompts
        self.speeds: dict[str, dict[str, float]] = {}

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def warmed_up(self, method: str, failure: str | None) -> None:
        """A warm-up run has ended; with a failure, the method is left out."""
        if failure:
            self.methods.remove(method)
        self.console.print(f"{'left out' if failure else 'warmed up'}: {method}", highlight=False)

    def ran(self, sample: Sample, pieces: Pieces) -> None:
        """A measured run has ended."""
        speeds = self.speeds.setdefault(sample.prompt, {})
        speeds[sample.method] = sample.tokens_per_second
        if len(speeds) == len(self.methods):
            line = ", ".join(f"{name} {speeds[name]:.0f}" for name in self.methods if name in speeds)
            self.console.print(
                f"prompt {len(self.speeds)}/{self.num_prompts}, tokens/s: {line}", highlight=False, soft_wrap=True
            )

    def round_ended(self, prompt: str, text: str, is_code: bool, sample: Sample, pieces: Pieces) -> None:
        """All methods have run on a prompt; shows one method's completion."""
        print_completion(self.console, prompt, text, is_code, sample, pieces)


class LiveDisplay:
    """All completions side by side, and a bar with the time left.

    Args:
        console: A terminal.
        methods: Names, in the order of the table.
        num_prompts: Prompts in all.
    """

    def __init__(self, console: Console, methods: Sequence[str], num_prompts: int) -> None:
        self.console = console
        self.methods = list(methods)
        self.num_prompts = num_prompts
        self.panels: dict[str, Panel] = {}
        self.prompt = ""
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console, auto_refresh=False,
        )  # fmt: skip
        self.task = self.progress.add_task("warming up", total=len(methods) * (num_prompts + 1))
        self.columns = 3 if console.width >= 96 else 2
        rows = -(-len(methods) // self.columns)
        self.height = min(max(4, (console.height - 2) // rows), MAX_PANEL_LINES)
        self.live = Live(self._screen(), console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> LiveDisplay:
        self.live.__enter__()
        self._show()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def warmed_up(self, method: str, failure: str | None) -> None:
        """A warm-up run has ended; with a failure, the method is left out."""
        if failure:
            self.methods.remove(method)
            self.progress.update(self.task, total=(self.progress.tasks[0].total or 0) - self.num_prompts)
        self._advance(f"warmed up: {method}")

    def round_ended(self, prompt: str, text: str, is_code: bool, sample: Sample, pieces: Pieces) -> None:
        """All methods have run on a prompt; shows one method's completion above the panels."""
        print_completion(self.console, prompt, text, is_code, sample, pieces)

    def ran(self, sample: Sample, pieces: Pieces) -> None:
        """A measured run has ended."""
        if sample.prompt != self.prompt:
            self.prompt = sample.prompt
            self.panels.clear()
        passes = sample.num_tokens / max(sample.num_target_passes, 1)
        width = self.console.width // self.columns - 4
        text = _tail(self.console, marked(pieces), width, self.height - 2)
        self.panels[sample.method] = Panel(
            text,
            title=sample.method,
            subtitle=f"{sample.tokens_per_second:.0f} tokens/s, {passes:.2f} per pass",
            border_style=_colour(sample.method),
            height=self.height,
        )
        self._advance(sample.prompt)

    def _advance(self, description: str) -> None:
        self.progress.update(self.task, advance=1, description=description[-40:])
        self._show()

    def _show(self) -> None:
        self.live.update(self._screen(), refresh=True)

    def _screen(self) -> Group:
        grid = Table.grid(expand=True)
        for _ in range(self.columns):
            grid.add_column(ratio=1)
        panels = [self.panels.get(name, self._empty(name)) for name in self.methods]
        for start in range(0, len(panels), self.columns):
            grid.add_row(*panels[start : start + self.columns])
        return Group(grid, self.progress)

    def _empty(self, name: str) -> Panel:
        return Panel("", title=name, border_style="dim", height=self.height)


def display_for(console: Console, methods: Sequence[str], num_prompts: int) -> LiveDisplay | PlainDisplay:
    """Live panels on a terminal, plain lines elsewhere."""
    kind = LiveDisplay if console.is_terminal and not console.is_dumb_terminal else PlainDisplay
    return kind(console, methods, num_prompts)


def marked(pieces: Pieces) -> Text:
    """A completion, drafted pieces coloured."""
    text = Text()
    for piece, is_drafted in pieces:
        text.append(piece, OURS if is_drafted else None)
    return text


def print_completion(console: Console, prompt: str, text: str, is_code: bool, sample: Sample, pieces: Pieces) -> None:
    """A prompt and its completion.

    Args:
        console: Where to print.
        prompt: The prompt's id.
        text: The prompt; a chat prompt is cut to its first line.
        is_code: Whether prompt and completion are one Python source.
        sample: Of the run.
        pieces: The completion.
    """
    title = Text(f"\n{prompt}, {sample.method}", "bold")
    if console.is_terminal:
        title.append("; ").append("green", OURS).append(" was drafted", "not bold")
    shown = (
        [completion_text(text, pieces)]
        if is_code
        else [Text(f"> {text.strip().splitlines()[0]}", "dim"), marked(pieces)]
    )
    console.print(Group(title, *shown), highlight=False, soft_wrap=not console.is_terminal)


def _tail(console: Console, text: Text, width: int, lines: int) -> Text:
    """The last lines of a text that is wrapped to a width."""
    return Text("\n").join(text.wrap(console, width)[-lines:])


def _colour(method: str) -> str:
    return "default" if method.startswith("HF") else OURS


def summary_table(measurement: Measurement, title: str) -> Table:
    """One row per method."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.caption = f"speed-up and identical: against {measurement.reference}"
    table.add_column("method", no_wrap=True)
    for name in ("tokens/s", "speed-up", "tokens/pass", "identical"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in measurement.rows():
        same = row.num_identical == row.num_runs
        table.add_row(
            Text(row.method, style=_colour(row.method)),
            f"{row.tokens_per_second:.1f}",
            f"{row.speedup:.2f}x",
            f"{row.tokens_per_pass:.2f}",
            f"{'yes' if same else 'no'} ({row.num_identical} of {row.num_runs})",
        )
    return table


def completion_text(prompt: str, pieces: Sequence[tuple[str, bool]]) -> Text:
    """A completion as Python source, drafted pieces marked.

    Args:
        prompt: Stands before it.
        pieces: Text of each step's tokens, and whether they were accepted draft tokens.
    """
    code = prompt + "".join(piece for piece, _ in pieces)
    text = Syntax("", "python", background_color="default").highlight(code)
    text.stylize("dim", 0, len(prompt))
    start = len(prompt)
    for piece, is_drafted in pieces:
        if is_drafted:
            text.stylize(DRAFTED, start, start + len(piece))
        start += len(piece)
    return text
