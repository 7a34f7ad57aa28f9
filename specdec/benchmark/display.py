"""What the benchmark and the demo show while they run.

Nothing is drawn while a method runs: the screen changes between runs only, so that no method is timed together with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from specdec.benchmark.measuring import EncodedPrompt, Measurement, Method, Observer, Sample, Settings, run_interleaved
from specdec.inspection.trace import token_pieces

MAX_PANEL_LINES = 16
OURS = "green"


class Display(Observer):
    """A bar over all runs; with a tokenizer, the completions side by side as well. Lines where there is no terminal.

    Args:
        console: None to show nothing.
        num_runs: Runs in all, the warm-up's included.
        tokenizer: The target's; decodes completions, drafted tokens in colour. None to show figures only.
    """

    def __init__(self, console: Console | None, num_runs: int, tokenizer: Any = None) -> None:
        self.console = console or Console(quiet=True)
        self.tokenizer = tokenizer
        self.methods: list[str] = []
        self.panels: dict[str, Panel] = {}
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("elapsed"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=self.console, auto_refresh=False, speed_estimate_period=600,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=num_runs)
        self.runs_of_method, self.total = 0, num_runs
        self.is_live = self.console.is_terminal and not self.console.is_dumb_terminal and not self.console.quiet
        self.live = Live(console=self.console, auto_refresh=False, transient=True)

    def __enter__(self) -> Display:
        if self.is_live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def begin(self, part: str, methods: Sequence[str], runs_of_method: int) -> None:
        """A part of the benchmark begins, with so many measured runs of each method."""
        self.methods, self.runs_of_method = list(methods), runs_of_method
        self.panels.clear()
        self._refresh(part)
        if not self.is_live:
            self._print(f"measuring: {part}")

    def warmed_up(self, method: str, failure: str | None) -> None:
        if failure:
            self.total -= self.runs_of_method
            self.left_out(method, failure)
        self.bar.advance(self.task)
        self._refresh()

    def left_out(self, method: str, reason: str) -> None:
        self.methods.remove(method)
        self.bar.update(self.task, total=self.total)
        self._print(f"{method} is left out: {reason}")

    def ran(self, sample: Sample) -> None:
        if self.tokenizer is not None and self.is_live:
            self.panels[sample.method] = self._panel(sample)
        self.bar.advance(self.task)
        self._refresh()

    def round_ended(self, prompt: EncodedPrompt, samples: Sequence[Sample]) -> None:
        """Prints the last method's completion, and the speeds where there are no panels."""
        if self.tokenizer is None:
            return
        title = Text(f"\n{prompt.id}, {samples[-1].method}", "bold")
        if self.is_live:
            title.append("; ").append("green", OURS).append(" was drafted", "not bold")
        lines = prompt.text.strip().splitlines()
        shown = Text(f"> {lines[0]}\n" if lines else "", "dim").append_text(completion(samples[-1], self.tokenizer))
        self.console.print(Group(title, shown), highlight=False, soft_wrap=not self.is_live)
        if not self.is_live:
            self._print("tokens/s: " + ", ".join(f"{s.method} {s.tokens_per_second:.0f}" for s in samples))
        self.panels.clear()

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)

    def _panel(self, sample: Sample) -> Panel:
        width, height = self.console.width // self._columns - 4, self._height
        lines = completion(sample, self.tokenizer).wrap(self.console, width)[2 - height :]
        passes = sample.num_tokens / max(sample.num_target_passes, 1)
        return Panel(
            Text("\n").join(lines),
            title=sample.method,
            subtitle=f"{sample.tokens_per_second:.0f} tokens/s, {passes:.2f} per pass",
            border_style="default" if sample.method.startswith("HF") else OURS,
            height=height,
        )

    @property
    def _columns(self) -> int:
        return 3 if self.console.width >= 96 else 2

    @property
    def _height(self) -> int:
        rows = max(-(-len(self.methods) // self._columns), 1)
        return min(max(4, (self.console.height - 2) // rows), MAX_PANEL_LINES)

    def _refresh(self, description: str | None = None) -> None:
        if description is not None:
            self.bar.update(self.task, description=description)
        if not self.is_live:
            return
        grid = Table.grid(expand=True)
        if self.tokenizer is not None:
            for _ in range(self._columns):
                grid.add_column(ratio=1)
            empty = {name: Panel("", title=name, border_style="dim", height=self._height) for name in self.methods}
            panels = list((empty | self.panels).values())
            for start in range(0, len(panels), self._columns):
                grid.add_row(*panels[start : start + self._columns])
        self.live.update(Group(grid, self.bar), refresh=True)


def measure_with_progress(
    part: str,
    methods: Sequence[Method],
    prompts: Sequence[EncodedPrompt],
    target: Any,
    settings: Settings,
    repeats: int = 1,
    console: Console | None = None,
) -> Measurement:
    """`run_interleaved` with a display; the last prompt is for the warm-up."""
    *measured, warm_up = prompts
    runs = len(measured) * repeats
    with Display(console or Console(), len(methods) * (1 + runs)) as display:
        display.begin(part, [method.name for method in methods], runs)
        return run_interleaved(methods, measured, target, settings, warm_up, repeats, display)


def completion(sample: Sample, tokenizer: Any) -> Text:
    """The first row's completion; drafted tokens in colour where the run was traced."""
    tokens = sample.outputs[0] or []
    passes = sample.trace.of_row(0) if sample.trace is not None else []
    drafted = [bool(sources) for made in passes for sources in made.sources_by_token]
    drafted += [False] * (len(tokens) - len(drafted))
    special = set(getattr(tokenizer, "all_special_ids", []))
    pieces = zip(tokens, token_pieces(tokens, tokenizer), drafted, strict=False)
    shown = [(piece, is_drafted) for token, piece, is_drafted in pieces if token not in special]
    text = Text()
    for is_drafted, run in groupby(shown, key=lambda entry: entry[1]):
        text.append("".join(piece for piece, _ in run), OURS if is_drafted else None)
    return text


def summary_table(measurement: Measurement, title: str) -> Table:
    """One row per method, the essential figures."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.caption = f"speed-up and identical: against {measurement.reference}"
    table.add_column("method", no_wrap=True)
    for name in ("tokens/s", "speed-up", "tokens/pass", "identical"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in measurement.rows():
        table.add_row(
            Text(row.method, style="default" if row.method.startswith("HF") else OURS),
            f"{row.tokens_per_second:.1f}",
            f"{row.speedup:.2f}x",
            f"{row.tokens_per_pass:.2f}",
            f"{'yes' if row.num_identical == row.num_runs else 'no'} ({row.num_identical} of {row.num_runs})",
        )
    return table
