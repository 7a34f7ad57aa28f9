"""Two benchmarks against each other: what has changed by more than noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from specdec.benchmark.tables import TextTable

MIN_CHANGE = 0.02
"""Changes below this are noise, however sure they are: runs of the same program differ by so much between starts."""
RESAMPLES = 4000
SAME_SETTINGS = ("temperature", "batch", "settings")


@dataclass(frozen=True)
class Change:
    """How a method's figures have changed.

    Args:
        part: Where.
        method: Of what.
        figure: `"speed-up"`, or `"tokens/s"` for the reference, whose speed-up is always 1.
        old: Median over the prompts.
        new: The same in the other benchmark.
        ratio: Median over the prompts of new by old.
        interval: In which 95 % of the ratio's bootstrap resamples over the prompts lie.
        tokens_per_pass: Old and new.
        identical: Old and new share of outputs that are the reference's.
    """

    part: str
    method: str
    figure: str
    old: float
    new: float
    ratio: float
    interval: tuple[float, float]
    tokens_per_pass: tuple[float, float]
    identical: tuple[float, float]

    @property
    def verdict(self) -> str:
        """`"faster"` or `"slower"` where the whole interval is on one side of 1, and far enough; else `"noise"`."""
        if abs(self.ratio - 1) >= MIN_CHANGE:
            if self.interval[0] > 1:
                return "faster"
            if self.interval[1] < 1:
                return "slower"
        return "noise"


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Changes of all methods that both benchmarks have, prompt by prompt.

    The speed-up is compared, as both its runs were made in turn on the same machine: a machine that has become slower
    as a whole changes only the reference's tokens per second.

    Args:
        old: From `load_results`.
        new: From `load_results`.

    Raises:
        ValueError: There is nothing to compare: no part at the same setting, no method or no prompt in common.
    """
    changes = []
    parts = [name for name in old["parts"] if name in new["parts"]]
    for name in parts:
        theirs, mine = old["parts"][name], new["parts"][name]
        if different := [k for k in SAME_SETTINGS if k in theirs and k in mine and theirs[k] != mine[k]]:
            shown = ", ".join(f"{key} {theirs[key]} and {mine[key]}" for key in different)
            raise ValueError(f"part {name} was measured with other settings: {shown}; measure again with the same")
        if theirs["reference"] != mine["reference"]:
            raise ValueError(f"part {name} has another reference: {theirs['reference']} and {mine['reference']}")
        methods = dict.fromkeys(s["method"] for s in theirs["samples"])
        found = {s["method"] for s in mine["samples"]}
        changes += [_change(name, method, theirs, mine) for method in methods if method in found]
    if not changes:
        raise ValueError("the two benchmarks have no part and method in common; nothing can be compared")
    return changes


def _change(part: str, method: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Change:
    is_reference = method == old["reference"]
    values = [_speeds(p, method) if is_reference else _speedups(p, method) for p in (old, new)]
    prompts = [prompt for prompt in values[0] if prompt in values[1]]
    if not prompts:
        raise ValueError(f"part {part}: the two benchmarks have no prompt in common; nothing can be compared")
    ratios = np.array([values[1][prompt] / values[0][prompt] for prompt in prompts])
    return Change(
        part,
        method,
        "tokens/s" if is_reference else "speed-up",
        old=median(values[0][prompt] for prompt in prompts),
        new=median(values[1][prompt] for prompt in prompts),
        ratio=float(np.median(ratios)),
        interval=interval(ratios),
        tokens_per_pass=(_tokens_per_pass(old, method), _tokens_per_pass(new, method)),
        identical=(_identical(old, method), _identical(new, method)),
    )


def interval(ratios: Any) -> tuple[float, float]:
    """Where the median lies when the prompts are drawn anew with replacement: 95 % of 4000 draws, with a fixed seed."""
    drawn = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(low), float(high)


def _speeds(part: Mapping[str, Any], method: str) -> dict[str, float]:
    """Tokens per second by prompt, the median over the repeats."""
    found: dict[str, list[float]] = {}
    for sample in part["samples"]:
        if sample["method"] == method:
            found.setdefault(sample["prompt"], []).append(sample["num_tokens"] / sample["seconds"])
    return {prompt: median(speeds) for prompt, speeds in found.items()}


def _speedups(part: Mapping[str, Any], method: str) -> dict[str, float]:
    mine, reference = _speeds(part, method), _speeds(part, part["reference"])
    return {prompt: speed / reference[prompt] for prompt, speed in mine.items()}


def _tokens_per_pass(part: Mapping[str, Any], method: str) -> float:
    return next((float(row["tokens_per_pass"]) for row in part["methods"] if row["method"] == method), float("nan"))


def _identical(part: Mapping[str, Any], method: str) -> float:
    row = next(row for row in part["methods"] if row["method"] == method)
    return float(row["num_identical"] / row["num_runs"])


def comparison_tables(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[TextTable]:
    """One table per part, and what stands in the way of a fair comparison.

    Args:
        old: From `load_results`.
        new: From `load_results`.
    """
    changes = compare(old, new)
    notes = [
        f"{name} differs: {old[name]} and {new[name]}"
        for name in ("hardware", "models", "versions")
        if old.get(name) != new.get(name)
    ]
    explained = (
        f"A change is beyond noise when 95 % of the bootstrap's medians over the prompts lie on one side of 1 and the "
        f"median is at least {MIN_CHANGE:.0%} away from it."
    )
    parts = dict.fromkeys(change.part for change in changes)
    columns = ["method", "figure", "old", "new", "new / old", "95 %", "change", "tokens/pass", "identical"]
    return [
        TextTable(part, columns, [_cells(c) for c in changes if c.part == part], [explained, *notes] if last else [])
        for part, last in zip(parts, [False] * (len(parts) - 1) + [True], strict=True)
    ]


def _cells(change: Change) -> Sequence[str]:
    form = ".0f" if change.figure == "tokens/s" else ".2f"
    passes = [f"{value:.2f}" for value in change.tokens_per_pass]
    same = [f"{value:.0%}" for value in change.identical]
    return [
        change.method,
        change.figure,
        f"{change.old:{form}}",
        f"{change.new:{form}}",
        f"{change.ratio:.3f}",
        f"{change.interval[0]:.3f}–{change.interval[1]:.3f}",
        change.verdict,
        " → ".join(dict.fromkeys(passes)),
        " → ".join(dict.fromkeys(same)),
    ]
