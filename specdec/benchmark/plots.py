"""Results as figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.benchmark.contenders import AT_SIZE
from specdec.report import PHASES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from specdec.benchmark.results import BenchmarkResults
    from specdec.benchmark.runs import Row

COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#F0E442", "#882255", "#999999",
)  # fmt: skip
"""Okabe and Ito's, which can be told apart without red and green, and two more."""
BAR = 0.8
Lines = dict[str, list[tuple[int, float]]]
"""Points by method."""


def figures(results: BenchmarkResults) -> dict[str, Figure]:
    """All figures that there is something to show for, by name."""
    rows = {name: part.measurement.rows() for name, part in results.parts.items()}
    made = {
        "speedup": _speedup(_of_first_batch(results, rows)),
        "acceptance": _acceptance(_of_first_batch(results, rows)),
        "phases": _phases(_of_first_batch(results, rows)),
        "batches": _batches(results, rows),
        "tree_sizes": _tree_sizes(results, rows),
        "categories": _categories(rows),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def save_figures(results: BenchmarkResults, folder: Path) -> list[Path]:
    """Writes each as a PNG file; returns the paths."""
    paths = []
    for name, figure in figures(results).items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def _of_first_batch(results: BenchmarkResults, rows: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Other batch sizes have a figure of their own."""
    first = results.settings.batch_sizes[0]
    parts = {name: part.part for name, part in results.parts.items()}
    return {name: of for name, of in rows.items() if parts[name].batch_size == first or parts[name].is_random}


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty figure, `size` in inches."""
    from matplotlib.figure import Figure  # an optional dependency

    return Figure(figsize=size, layout="constrained")


def _grouped(axes: Any, groups: Sequence[str], series: dict[str, list[tuple[float, float, float] | None]]) -> None:
    """Horizontal bars in groups, each a value with its lower and upper end."""
    height = BAR / len(series)
    for number, (name, bars) in enumerate(series.items()):
        known = [(i, bar) for i, bar in enumerate(bars) if bar is not None]
        at = [i + (number - (len(series) - 1) / 2) * height for i, _ in known]
        values = [bar[0] for _, bar in known]
        error = [[max(bar[0] - bar[1], 0) for _, bar in known], [max(bar[2] - bar[0], 0) for _, bar in known]]
        has_spread = any(map(any, error))
        axes.barh(
            at,
            values,
            height,
            xerr=error if has_spread else None,
            label=name,
            color=COLOURS[number % len(COLOURS)],
            ecolor="#444444",
            capsize=2,
        )
        for y, value, bar in zip(at, values, known, strict=True):
            axes.text(bar[1][2], y, f"  {value:.2f}×", va="center", fontsize=8)
    axes.set_yticks(range(len(groups)), groups)
    axes.invert_yaxis()
    axes.margins(x=0.15, y=0.02)
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axes.figure.legend(loc="outside right upper", frameon=False)


def _speedup(rows: dict[str, list[Row]]) -> Figure:
    methods = list(dict.fromkeys(row.method for of_part in rows.values() for row in of_part[1:]))
    series: dict[str, list[tuple[float, float, float] | None]] = {}
    for part, of_part in rows.items():
        found = {row.method: row for row in of_part}
        bars = [found.get(method) for method in methods]
        series[part] = [None if row is None else (row.speedup, *row.speedup_spread) for row in bars]
    approximate = {row.method for of_part in rows.values() for row in of_part if row.guarantee == "approximate"}
    names = [f"{method} (approximate)" if method in approximate else method for method in methods]
    figure = new_figure((8, 1.2 + 0.28 * len(methods) * max(len(series), 2)))
    axes = figure.subplots()
    _grouped(axes, names, series)
    axes.axvline(1, color="#444444", linewidth=0.8)
    reference = next(iter(rows.values()))[0].method
    axes.set_xlabel(f"speed-up against {reference}: median and quartiles over the prompts")
    return figure


def _acceptance(rows: dict[str, list[Row]]) -> Figure | None:
    shown = {part: [row for row in of_part if row.accepted_per_position] for part, of_part in rows.items()}
    shown = {part: of_part for part, of_part in shown.items() if of_part}
    if not shown:
        return None
    figure = new_figure((4 * len(shown) + 2, 3.4))
    all_axes = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
    methods = list(dict.fromkeys(row.method for of_part in shown.values() for row in of_part))
    for axes, (part, of_part) in zip(all_axes, shown.items(), strict=True):
        for row in of_part:
            share = [100 * value for value in row.accepted_per_position]
            colour = COLOURS[methods.index(row.method) % len(COLOURS)]
            axes.plot(range(1, len(share) + 1), share, "o-", markersize=3, color=colour, label=row.method)
        axes.set_title(part)
        axes.set_xlabel("depth: draft tokens in a row")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_ylim(0, 100)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_ylabel("drafts accepted to this depth, %")
    handles: dict[str, Any] = {}
    for axes in all_axes:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _phases(rows: dict[str, list[Row]]) -> Figure | None:
    """Time per generated token, from the reports."""
    shown = {part: [row for row in of_part if row.seconds_per_phase] for part, of_part in rows.items()}
    shown = {part: of_part for part, of_part in shown.items() if of_part}
    if not shown:
        return None
    num_methods = max(len(of_part) for of_part in shown.values())
    figure = new_figure((4.2 * len(shown) + 1.4, 1.6 + 0.35 * num_methods))
    all_axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (part, of_part) in zip(all_axes, shown.items(), strict=True):
        names = [row.method for row in of_part]
        left = [0.0] * len(names)
        for number, phase in enumerate(PHASES):
            width = [_phase_ms(row, phase) for row in of_part]
            axes.barh(names, width, left=left, label=phase, color=COLOURS[number % len(COLOURS)])
            left = [a + b for a, b in zip(left, width, strict=True)]
        axes.invert_yaxis()
        axes.set_title(part)
        axes.set_xlabel("ms per token")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PHASES), frameon=False
    )
    return figure


def _phase_ms(row: Row, phase: str) -> float:
    """Of the milliseconds per token, those of a phase."""
    share = row.seconds_per_phase.get(phase, 0.0) / (sum(row.seconds_per_phase.values()) or 1)
    return 1e3 * share / row.tokens_per_second


def _batches(results: BenchmarkResults, rows: dict[str, list[Row]]) -> Figure | None:
    sizes = results.settings.batch_sizes
    if len(sizes) < 2:
        return None
    found: dict[float, Lines] = {}
    for name, part in results.parts.items():
        if not part.part.is_random:
            lines = found.setdefault(part.part.temperature, {})
            for row in rows[name][1:]:
                lines.setdefault(row.method, []).append((part.part.batch_size, row.speedup))
    return _line_figure(found, "batch size", sizes, next(iter(rows.values()))[0].method)


def _tree_sizes(results: BenchmarkResults, rows: dict[str, list[Row]]) -> Figure | None:
    """Of the first batch size; methods without a tree are level lines."""
    sizes = results.settings.max_nodes
    if len(sizes) < 2:
        return None
    found: dict[float, Lines] = {}
    for name, of_part in rows.items():
        part = results.parts[name].part
        if part.is_random or part.batch_size != results.settings.batch_sizes[0]:
            continue
        lines = found.setdefault(part.temperature, {})
        for row in of_part[1:]:
            family, nodes = _family(row.method, sizes)
            lines.setdefault(family, []).extend((n, row.speedup) for n in ([nodes] if nodes else sizes))
    return _line_figure(found, "largest tree, nodes", sizes, next(iter(rows.values()))[0].method)


def _family(method: str, sizes: Sequence[int]) -> tuple[str, int | None]:
    """A method's name without its tree size, and the size."""
    for nodes in sizes:
        if method.endswith(AT_SIZE.format(nodes)):
            return method.removesuffix(AT_SIZE.format(nodes)), nodes
    return method, None


def _line_figure(found: dict[float, Lines], label: str, ticks: Sequence[int], reference: str) -> Figure:
    """Speed-ups against something, a panel per temperature."""
    figure = new_figure((4 * len(found) + 2, 3.4))
    all_axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    methods = list(dict.fromkeys(method for lines in found.values() for method in lines))
    for axes, (temperature, lines) in zip(all_axes, found.items(), strict=True):
        for method, points in lines.items():
            x, y = zip(*sorted(points), strict=True)
            axes.plot(x, y, "o-", markersize=4, color=COLOURS[methods.index(method) % len(COLOURS)], label=method)
        axes.axhline(1, color="#444444", linewidth=0.8)
        axes.set_title("greedy" if temperature == 0 else f"T={temperature:g}")
        axes.set_xlabel(label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(size) for size in ticks])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_ylabel(f"speed-up against {reference}")
    handles: dict[str, Any] = {}
    for axes in all_axes:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _categories(rows: dict[str, list[Row]]) -> Figure | None:
    part = next(iter(rows.values()))
    categories = list(dict.fromkeys(category for row in part for category in row.speedup_by_category))
    if len(categories) < 2:
        return None
    series: dict[str, list[tuple[float, float, float] | None]] = {
        row.method: [(row.speedup_by_category[c],) * 3 for c in categories] for row in part[1:]
    }
    figure = new_figure((8, 1.2 + 0.2 * len(categories) * len(series)))
    axes = figure.subplots()
    _grouped(axes, categories, series)
    axes.axvline(1, color="#444444", linewidth=0.8)
    axes.set_xlabel(f"speed-up against {part[0].method}, {next(iter(rows))}")
    return figure
