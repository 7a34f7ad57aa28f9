"""What is shown while methods are measured.

Nothing is drawn while a method runs: the screen changes between runs only, so that no method is timed together with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from specdec.benchmark.measuring import EncodedPrompt, Method, run_interleaved
from specdec.benchmark.runs import Measurement, Settings


class MeasuringProgress:
    """A bar over all runs, with the time left; lines only, where the console is no terminal.

    Args:
        console: None to show nothing.
        total: Runs, the warm-up's included.
    """

    def __init__(self, console: Console | None, total: int) -> None:
        self.console = console
        self.total = total
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("elapsed"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=console, auto_refresh=False, transient=True, speed_estimate_period=600,
            disable=console is None or not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> MeasuringProgress:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def begin(self, part: str) -> None:
        """Another part begins."""
        self.bar.update(self.task, description=part, refresh=True)
        if self.console is not None and not self.console.is_terminal:
            self.console.print(f"measuring: {part}", highlight=False)

    def ran(self, *run: object) -> None:
        """A run has ended."""
        self.bar.update(self.task, advance=1, refresh=True)

    def left_out(self, method: str, reason: str, runs_saved: int) -> None:
        """A method is left out, so that there are fewer runs."""
        self.total -= runs_saved
        self.bar.update(self.task, total=self.total, refresh=True)
        if self.console is not None:
            self.console.print(f"{method} is left out: {reason}", highlight=False, soft_wrap=True)


def measure_with_progress(
    part: str,
    methods: Sequence[Method],
    prompts: Sequence[EncodedPrompt],
    target: Any,
    settings: Settings,
    repeats: int,
    console: Console | None = None,
) -> Measurement:
    """`run_interleaved` behind a progress bar; the last prompt is for the warm-up.

    Args:
        part: What the bar is called.
        methods: See `run_interleaved`.
        prompts: See `run_interleaved`.
        target: See `run_interleaved`.
        settings: See `run_interleaved`.
        repeats: See `run_interleaved`.
        console: Where to show it.
    """
    *measured, warm_up = prompts
    runs = len(measured) * repeats
    with MeasuringProgress(console or Console(), len(methods) * (1 + runs)) as progress:
        progress.begin(part)

        def warmed_up(method: str, failure: str | None) -> None:
            progress.ran()
            if failure:
                progress.left_out(method, failure, runs)

        return run_interleaved(methods, measured, target, settings, warm_up, repeats, warmed_up, progress.ran)
