"""What a call of `generate` did."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import zip_longest
from typing import Any

from rich.console import Console
from rich.table import Table

from specdec.inspection.audit import StepAudit
from specdec.inspection.trace import Trace

PHASES = ("prefill", "compile", "draft", "target", "verify", "commit")


@dataclass
class SpeculationReport:
    """Counts and times of one call, in vLLM's words.

    Args:
        drafter: Name of the drafter, or "none".
        verifier: Name of the verifier.
        guarantee: `"token-identical"`, `"distribution"` or `"approximate"`.
        capability: `"tree"`, `"chain"` or `"plain"`: how the target was run.
        num_drafts: Proposals with at least one draft token that went into a target pass, counted per row.
        num_draft_tokens: Draft tokens in target passes.
        num_accepted_tokens: Draft tokens that were accepted.
        num_accepted_tokens_per_pos: Accepted draft tokens by depth in the tree, the root's children first.
        num_target_passes: Forwards of the target, the prefill included.
        num_row_passes: The same, counted per row.
        num_generated_tokens: Tokens returned, over all rows.
        num_near_ties: Tokens whose two best scores were so close that another rounding could have swapped them; None
            where that was not looked at, as in float32.
        near_tie_gap: Closer than this is a near-tie.
        seconds: Wall time per phase.
        fallback: Why the model's own `generate` did the work; None when specdec did.
        drafter_error: What the drafter raised before it was switched off; None when it did not.
        drafter_figures: What the drafter tells of itself, by name.
        trace: Which pass and which source each token came from, if `generate(trace=True)` asked for it.
        cuda_graphs: Whether steps were replayed as CUDA graphs, and why not; None where that was no question.
        attention: What computed attention over trees, and why; None where there were none.
        compiled: Whether passes were compiled, and why not; None where that was not asked for.
    """

    drafter: str = "none"
    verifier: str = "exact"
    guarantee: str = "token-identical"
    capability: str = "tree"
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    num_target_passes: int = 0
    num_row_passes: int = 0
    num_generated_tokens: int = 0
    num_near_ties: int | None = None
    near_tie_gap: float | None = None
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    fallback: str | None = None
    drafter_error: str | None = None
    drafter_figures: dict[str, Any] = field(default_factory=dict)
    trace: Trace | None = field(default=None, repr=False)
    cuda_graphs: str | None = None
    attention: str | None = None
    compiled: str | None = None

    @property
    def tokens_per_pass(self) -> float:
        """Tokens returned per target pass and row."""
        return self.num_generated_tokens / max(self.num_row_passes, 1)

    @property
    def acceptance_rate(self) -> float:
        """Share of the draft tokens that were accepted."""
        return self.num_accepted_tokens / max(self.num_draft_tokens, 1)

    @property
    def audit(self) -> StepAudit | None:
        """Who wrote which reasoning step; None for a drafter that writes none."""
        steps = self.drafter_figures.get("steps")
        return None if steps is None else StepAudit.of_dicts(steps)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the time spent inside to a phase; a phase inside another one is not counted twice."""
        start = time.perf_counter()
        counted_before = sum(self.seconds.values())
        try:
            yield
        finally:
            counted_inside = sum(self.seconds.values()) - counted_before
            self.seconds[phase] += time.perf_counter() - start - counted_inside

    def count_pass(self, draft_tokens: list[int]) -> None:
        """Counts a target pass over rows with these numbers of draft tokens."""
        self.num_target_passes += 1
        self.num_row_passes += len(draft_tokens)
        self.num_drafts += sum(n > 0 for n in draft_tokens)
        self.num_draft_tokens += sum(draft_tokens)

    def count_accepted(self, accepted: int) -> None:
        """Counts one row's accepted draft tokens of one pass."""
        self.num_accepted_tokens += accepted
        missing = accepted - len(self.num_accepted_tokens_per_pos)
        self.num_accepted_tokens_per_pos += [0] * missing
        for depth in range(accepted):
            self.num_accepted_tokens_per_pos[depth] += 1

    def count_near_ties(self, rows: list[list[bool]]) -> None:
        """Counts the near-ties among the tokens that rows have kept."""
        self.num_near_ties = (self.num_near_ties or 0) + sum(map(sum, rows))

    def add(self, other: SpeculationReport) -> None:
        """Adds the counts and times of another call; what describes how it ran is taken over from it."""
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if f.name in ("drafter", "verifier", "guarantee", "trace") or theirs is None:
                continue
            if f.name.startswith("num_") and isinstance(theirs, int):
                theirs += mine or 0
            elif isinstance(theirs, list):
                theirs = [sum(pair) for pair in zip_longest(mine, theirs, fillvalue=0)]
            elif f.name == "seconds":
                theirs = {phase: spent + theirs[phase] for phase, spent in mine.items()}
            setattr(self, f.name, theirs)

    def to_dict(self) -> dict[str, Any]:
        """All fields but the trace, and derived figures, ready for JSON."""
        found = asdict(replace(self, trace=None))
        del found["trace"]
        return found | {"tokens_per_pass": self.tokens_per_pass, "acceptance_rate": self.acceptance_rate}

    def __rich__(self) -> Table:
        table = Table(title="specdec report", show_header=False, title_justify="left")
        for name, value in self.to_dict().items():
            if name == "seconds":
                value = ", ".join(f"{phase} {spent:.3f}" for phase, spent in self.seconds.items() if spent)
            elif isinstance(value, float):
                value = f"{value:.3f}"
            elif name == "drafter_figures":
                value = ", ".join(map(_figure, self.drafter_figures.items())) or None
            if value is not None:
                table.add_row(name, str(value))
        return table

    def __str__(self) -> str:
        console = Console(width=100, file=io.StringIO(), force_jupyter=False)
        with console.capture() as text:
            console.print(self)
        return text.get().rstrip()


def _figure(item: tuple[str, Any]) -> str:
    """A drafter's figure in a line; of a list, how long it is: `audit` prints the steps themselves."""
    name, amount = item
    shown = len(amount) if isinstance(amount, list) else f"{amount:.3f}" if isinstance(amount, float) else amount
    return f"{name} {shown}"
