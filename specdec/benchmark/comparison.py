"""Two benchmarks against each other: what has changed by more than noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from specdec.benchmark.tables import TextTable

MIN_CHANGE = 0.02
"""Smaller relative changes are noise: runs of the same program differ by this much between starts."""
SAME_SETTINGS = ("temperature", "batch", "settings", "reference")


@dataclass(frozen=True)
class Change:
    """How a method's figure has changed.

    Args:
        part: Of the benchmark.
        method: Its name.
        figure: `"speed-up"`, or `"tokens/s"` for the reference, whose speed-up is always 1.
        old: Median over the prompts.
        new: The same in the other benchmark.
        old_spread: First and third quartile over the prompts.
        new_spread: The same in the other benchmark.
    """

    part: str
    method: str
    figure: str
    old: float
    new: float
    old_spread: tuple[float, float]
    new_spread: tuple[float, float]

    @property
    def verdict(self) -> str:
        """`"faster"` or `"slower"` where each median lies outside the other's quartiles, far enough; else `"noise"`."""
        if self.new > max(self.old_spread[1], self.old * (1 + MIN_CHANGE)) and self.old < self.new_spread[0]:
            return "faster"
        if self.new < min(self.old_spread[0], self.old * (1 - MIN_CHANGE)) and self.old > self.new_spread[1]:
            return "slower"
        return "noise"


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Changes of all methods that both benchmarks have.

    The speed-up is compared, as both its runs were made in turn on the same machine: a machine that has become slower
    as a whole changes only the reference's tokens per second.

    Args:
        old: From `load_results`.
        new: From `load_results`.

    Raises:
        ValueError: There is nothing to compare: no part at the same setting, or no method in common.
    """
    changes = []
    for name in (name for name in old["parts"] if name in new["parts"]):
        theirs, mine = old["parts"][name], new["parts"][name]
        if different := [k for k in SAME_SETTINGS if k in theirs and k in mine and theirs[k] != mine[k]]:
            shown = ", ".join(f"{key} {theirs[key]} and {mine[key]}" for key in different)
            raise ValueError(f"part {name} was measured with other settings: {shown}; measure again with the same")
        rows = {row["method"]: row for row in mine["methods"]}
        for row in (row for row in theirs["methods"] if row["method"] in rows):
            is_reference = row["method"] == theirs["reference"]
            key = "tokens_per_second" if is_reference else "speedup"
            medians, spreads = ([r[k] for r in (row, rows[row["method"]])] for k in (key, f"{key}_spread"))
            figure = "tokens/s" if is_reference else "speed-up"
            changes.append(Change(name, row["method"], figure, *medians, *map(tuple, spreads)))
    if not changes:
        raise ValueError("the two benchmarks have no part and method in common; nothing can be compared")
    return changes


def comparison_tables(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[TextTable]:
    """One table per part; below the last one, what stands in the way of a fair comparison.

    Args:
        old: From `load_results`.
        new: From `load_results`.
    """
    changes = compare(old, new)
    notes = [
        f"A change is more than noise when each median lies outside the other's quartiles, by {MIN_CHANGE:.0%} or more."
    ]
    different = [name for name in ("hardware", "models", "versions") if old.get(name) != new.get(name)]
    notes += [f"{name} differs: {old.get(name)} and {new.get(name)}" for name in different]
    columns = ["method", "figure", "old", "new", "new / old", "change"]
    parts = list(dict.fromkeys(change.part for change in changes))
    return [
        TextTable(part, columns, [_cells(c) for c in changes if c.part == part], notes if part == parts[-1] else [])
        for part in parts
    ]


def _cells(change: Change) -> list[str]:
    form = ".0f" if change.figure == "tokens/s" else ".2f"
    values = [
        f"{median:{form}} ({spread[0]:{form}}–{spread[1]:{form}})"
        for median, spread in ((change.old, change.old_spread), (change.new, change.new_spread))
    ]
    return [change.method, change.figure, *values, f"{change.new / change.old:.3f}", change.verdict]
