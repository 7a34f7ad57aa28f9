"""What is used, at what size and why, in words and figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from specdec.budget import Budget, Choice
from specdec.report import SpeculationReport

if TYPE_CHECKING:
    from specdec.generation import Speculation


def explain(speculation: Speculation) -> str:
    """Several lines on the last call, on what it chose, and on what each source of drafts has earned."""
    report = speculation.report
    name = f"drafter {report.drafter!r}" if speculation.drafter else "no drafter"
    lines = [f"{name}, verifier {report.verifier!r}: output is {report.guarantee} to that of generate()"]
    if report.fallback is not None:
        return "\n".join([*lines, f"last call: done by the model's own generate(), because {report.fallback}"])
    if report.num_row_passes == 0:
        return "\n".join([*lines, "last call: none yet; the rest is known after the first generate()"])
    lines.append(_last_call(report))
    if report.cuda_graphs is not None:
        lines.append(f"CUDA graphs: {report.cuda_graphs}")
    if report.attention is not None:
        lines.append(f"attention over trees: {report.attention}")
    if report.drafter_error is not None:
        lines.append(f"the drafter was switched off: {report.drafter_error}")
    if speculation.drafter is not None:
        lines += _size(speculation.budget)
        lines += _sources(report)
    return "\n".join(lines)


def _last_call(report: SpeculationReport) -> str:
    return (
        f"last call: {report.num_generated_tokens} tokens in {report.num_row_passes} passes, "
        f"{report.tokens_per_pass:.2f} tokens per pass; {report.num_accepted_tokens} of {report.num_draft_tokens} "
        f"draft tokens accepted; the target was run on {'trees' if report.capability == 'tree' else 'chains'}"
    )


def _size(budget: Budget) -> list[str]:
    """Which sizes were chosen, and why the last one was."""
    if budget.fixed:
        return [f"size: all that is proposed, up to {budget.max_nodes} nodes, because the budget is fixed"]
    choice = budget.last_choice
    if choice is None:
        return [f"size: up to {budget.max_nodes} nodes; nothing was proposed yet"]
    times = ", ".join(f"{nodes}: {count}" for nodes, count in sorted(budget.sizes.items()))
    lines = [
        f"size: decisions by number of nodes so far (1 is no draft): {times}; drafting paused {budget.num_rests} times"
    ]
    return [*lines, _reason(choice)]


def _reason(choice: Choice) -> str:
    plain = choice.plain_tokens / choice.plain_seconds
    drafted = choice.tokens / choice.seconds
    by_draft = f"{choice.tokens:.2f} tokens in {choice.seconds * 1e3:.2f} ms = {drafted:.0f} tokens/s"
    by_plain = f"{choice.plain_tokens} in {choice.plain_seconds * 1e3:.2f} ms = {plain:.0f} tokens/s without a draft"
    if choice.nodes == 1:
        return f"why, the last time: no part of {choice.proposed} nodes promised more than {by_plain}"
    return f"why, the last time: {choice.nodes} of {choice.proposed} nodes promised {by_draft}, against {by_plain}"


def _sources(report: SpeculationReport) -> list[str]:
    """What each source earned, where the drafter tells."""
    sources: dict[str, Mapping[str, Any]] = {
        name: figures
        for name, figures in report.drafter_figures.items()
        if isinstance(figures, Mapping) and "credit" in figures
    }
    return [f"source {name!r}: {_earned(figures, report)}" for name, figures in sources.items()]


def _earned(figures: Mapping[str, Any], report: SpeculationReport) -> str:
    share = figures["credit"] / max(report.num_accepted_tokens, 1)
    text = (
        f"asked {figures['calls']} times, {figures['seconds'] / max(figures['calls'], 1) * 1e3:.2f} ms each; named "
        f"{figures['accepted']} accepted tokens, {figures['alone']} of them alone: {share:.0%} of the credit"
    )
    if figures["skipped"]:
        text += f"; not asked {figures['skipped']} times, because it did not earn its time"
    if "error" in figures:
        text += f"; left out after {figures['error']}"
    return text
