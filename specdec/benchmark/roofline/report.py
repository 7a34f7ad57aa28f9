"""A roofline in tables and in a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table

from specdec.benchmark.plots import COLOURS, new_figure
from specdec.benchmark.roofline.measure import Roofline

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def roofline_tables(found: Roofline) -> Group:
    """Costs and limits, step times, and where the time goes."""
    costs, limits = found.costs, found.limits
    head = Table(title="what a step must read and compute", show_header=False, title_justify="left")
    head.add_row("weights", _bytes(costs.weight_bytes + costs.expert_bytes))
    if costs.num_experts:
        share = f"{costs.num_chosen} of {costs.num_experts} experts per token"
        head.add_row("of these, experts", f"{_bytes(costs.expert_bytes)}, {share}")
    head.add_row("kv cache", f"{_bytes(costs.kv_bytes)} per token of context")
    head.add_row("operations", f"{costs.node_flops / 1e9:.3g} GFLOP per node")
    head.add_row("measured copy", f"{_bytes(limits.bandwidth)}/s")
    head.add_row("measured matrix product", f"{limits.flops / 1e12:.3g} TFLOP/s")
    head.add_row("CUDA graphs", found.cuda_graphs or "-")
    parts = [head, _times(found), _shares(found)]
    if found.phases:
        phases = Table(title="a short generation, ms per pass", title_justify="left")
        for phase in found.phases:
            phases.add_column(phase, justify="right")
        phases.add_row(*(f"{spent * 1e3:.3f}" for spent in found.phases.values()))
        parts.append(phases)
    return Group(*parts)


def _times(found: Roofline) -> Table:
    table = Table(title=f"steps, batch {found.batch}", title_justify="left")
    columns = ("context", "nodes", "step ms", "target pass ms", "outside it", "limit ms", "of the limit", "of 1 node")
    for column in columns:
        table.add_column(column, justify="right")
    first = {entry.context: entry.step for entry in reversed(found.times)}
    for entry in found.times:
        table.add_row(
            str(entry.context),
            str(entry.nodes),
            f"{entry.step * 1e3:.3f}",
            f"{entry.target * 1e3:.3f}",
            f"{max(1 - entry.target / entry.step, 0):.1%}",
            f"{entry.floor * 1e3:.3f}",
            f"{entry.reached:.1%}",
            f"{entry.step / first[entry.context]:.2f}x",
        )
    return table


def _shares(found: Roofline) -> Table:
    table = Table(title="where the time of a step without a draft goes", show_header=False, title_justify="left")
    for kind, share in found.shares.items():
        table.add_row(kind, f"{share:.1%}")
    return table


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def roofline_figure(found: Roofline) -> Figure:
    """Step times over tree sizes with their limits, and where the time goes."""
    figure = new_figure((9.0, 4.0))
    times, shares = figure.subplots(1, 2, width_ratios=(3, 2))
    for colour, context in zip(COLOURS, dict.fromkeys(entry.context for entry in found.times), strict=False):
        entries = [entry for entry in found.times if entry.context == context]
        nodes = [entry.nodes for entry in entries]
        times.plot(nodes, [e.step * 1e3 for e in entries], "o-", color=colour, label=f"{context} tokens: step")
        times.plot(nodes, [e.target * 1e3 for e in entries], ":", color=colour, label=f"{context} tokens: target pass")
        times.plot(nodes, [e.floor * 1e3 for e in entries], "--", color=colour, label=f"{context} tokens: limit")
    times.set(xscale="log", yscale="log", xlabel="nodes of the tree", ylabel="ms", title="time of a step")
    sizes = sorted({entry.nodes for entry in found.times})
    times.set_xticks(sizes, [str(size) for size in sizes])
    times.set_xticks([], minor=True)
    times.legend(fontsize=7)
    names = list(found.shares)[::-1]
    shares.barh(names, [100 * found.shares[name] for name in names], color=COLOURS[0])
    for at, name in enumerate(names):
        shares.text(100 * found.shares[name] + 1, at, f"{100 * found.shares[name]:.0f} %", va="center", fontsize=8)
    shares.set(xlim=(0, 112), xlabel="% of a step without a draft", title="where it goes")
    shares.tick_params(axis="y", labelsize=8)
    return figure
