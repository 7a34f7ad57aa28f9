"""Results as figures: speed-up by method, and acceptance by depth."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from specdec.benchmark.results import BenchmarkResults
    from specdec.benchmark.runs import Row

COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#F0E442", "#882255", "#999999",
)  # fmt: skip
"""Okabe and Ito's, which can be told apart without red and green, and two more."""


def figures(results: BenchmarkResults) -> dict[str, Figure]:
    """All figures that there is something to show for, by name."""
    rows = {name: part.measurement.rows() for name, part in results.parts.items()}
    drafting = {part: [row for row in of_part if row.accepted_per_position] for part, of_part in rows.items()}
    drafting = {part: of_part for part, of_part in drafting.items() if of_part}
    return {"speedup": _speedup(rows)} | ({"acceptance": _acceptance(drafting)} if drafting else {})


def _new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # an optional dependency

    return Figure(figsize=(width, height), layout="constrained")


def _speedup(rows: dict[str, list[Row]]) -> Figure:
    """Horizontal bars with quartiles, a group per method and a bar per part."""
    methods = list(dict.fromkeys(row.method for of_part in rows.values() for row in of_part[1:]))
    approximate = {row.method for of_part in rows.values() for row in of_part if row.guarantee == "approximate"}
    height = 0.8 / len(rows)
    figure = _new_figure(8, 1.2 + 0.28 * len(methods) * max(len(rows), 2))
    axes = figure.subplots()
    for number, (part, of_part) in enumerate(rows.items()):
        at = [methods.index(row.method) + (number - (len(rows) - 1) / 2) * height for row in of_part[1:]]
        values = [row.speedup for row in of_part[1:]]
        below = [max(row.speedup - row.speedup_spread[0], 0) for row in of_part[1:]]
        above = [max(row.speedup_spread[1] - row.speedup, 0) for row in of_part[1:]]
        colour = COLOURS[number % len(COLOURS)]
        axes.barh(at, values, height, xerr=[below, above], label=part, color=colour, ecolor="#444444", capsize=2)
        for y, value, error in zip(at, values, above, strict=True):
            axes.text(value + error, y, f"  {value:.2f}×", va="center", fontsize=8)
    axes.set_yticks(range(len(methods)), [f"{m} (approximate)" if m in approximate else m for m in methods])
    axes.invert_yaxis()
    axes.margins(x=0.15, y=0.02)
    axes.spines[["top", "right"]].set_visible(False)
    axes.axvline(1, color="#444444", linewidth=0.8)
    axes.set_xlabel(f"speed-up over {next(iter(rows.values()))[0].method}: median and quartiles over the prompts")
    if len(rows) > 1:
        figure.legend(loc="outside right upper", frameon=False)
    return figure


def _acceptance(rows: dict[str, list[Row]]) -> Figure:
    """Lines by depth, a panel per part."""
    figure = _new_figure(4 * len(rows) + 2, 3.4)
    all_axes = figure.subplots(1, len(rows), sharex=True, sharey=True, squeeze=False)[0]
    methods = list(dict.fromkeys(row.method for of_part in rows.values() for row in of_part))
    lines = {}
    for axes, (part, of_part) in zip(all_axes, rows.items(), strict=True):
        for row in of_part:
            share = [100 * value for value in row.accepted_per_position]
            colour = COLOURS[methods.index(row.method) % len(COLOURS)]
            (lines[row.method],) = axes.plot(range(1, len(share) + 1), share, "o-", markersize=3, color=colour)
        axes.set(title=part, xlabel="depth: draft tokens in a row", xscale="log", ylim=(0, 100))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_ylabel("drafts accepted to this depth, %")
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", frameon=False, fontsize=8)
    return figure
