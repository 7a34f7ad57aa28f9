"""Summaries of the reasoning benchmark: accuracy and latency by method, the cost of judging, the trade-off drawn."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import torch
from rich.table import Table

from specdec.benchmark.measuring import EncodedPrompt
from specdec.benchmark.plots import COLOURS
from specdec.benchmark.runs import Measurement, Sample, spread

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "reasoning"))
from task import JUDGE_PROMPT, written_answer

COLUMNS = {
    "accuracy": "{:.1%}",
    "mean_seconds": "{:.3f}",
    "speedup": "{:.2f}×",
    "mean_tokens": "{:.0f}",
    "tokens_per_pass": "{:.2f}",
    "kept_share": "{:.1%}",
    "question_tokens": "{:.0f}",
    "num_identical": "{}",
}
TITLES = (
    "accuracy",
    "s a problem",
    "speed-up",
    "tokens",
    "tokens a pass",
    "steps kept",
    "question tokens",
    "identical",
)


def rows_of(measured: Measurement, answers: Mapping[str, int], tokenizer: Any) -> list[dict[str, Any]]:
    """One summary per method; a speed-up is the median over the problems of the ratio of whole calls' times."""
    by_method: dict[str, list[Sample]] = {}
    for sample in measured.samples:
        by_method.setdefault(sample.method, []).append(sample)
    plain = {sample.prompt: sample.seconds for sample in by_method[measured.reference]}
    return [_row(name, samples, plain, answers, tokenizer) for name, samples in by_method.items()]


def _row(
    name: str, samples: list[Sample], plain: Mapping[str, float], answers: Mapping[str, int], tokenizer: Any
) -> dict[str, Any]:
    texts = [tokenizer.decode(sample.outputs[0] or [], skip_special_tokens=True) for sample in samples]
    right = [written_answer(text) == answers[sample.prompt] for text, sample in zip(texts, samples, strict=True)]
    figures = [(sample.report or {}).get("drafter_figures", {}) for sample in samples]
    judged = sum(f.get("judged", 0) for f in figures)
    count = len(samples)
    return {
        "method": name,
        "accuracy": sum(right) / count,
        "mean_seconds": mean(s.seconds for s in samples),
        "median_seconds": median(s.seconds for s in samples),
        "speedup": median(plain[s.prompt] / s.seconds for s in samples),
        "mean_tokens": mean(s.num_tokens for s in samples),
        "tokens_per_pass": sum(s.num_tokens for s in samples) / max(sum(s.num_target_passes for s in samples), 1),
        "target_passes": sum(s.num_target_passes for s in samples) / count,
        "steps_judged": judged,
        "kept_share": sum(f.get("kept", 0) for f in figures) / judged if judged else None,
        "salvaged_tokens": sum(f.get("salvaged_tokens", 0) for f in figures) / count,
        "question_tokens": sum(f.get("question_tokens", 0) for f in figures) / count,
        "num_identical": sum(all(s.identical_rows or [False]) for s in samples),
        "seconds_quartiles": spread(s.seconds for s in samples),
    }


def table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    out = Table("method", title=title, title_justify="left")
    for name in TITLES:
        out.add_column(name, justify="right")
    for row in rows:
        cells = ["" if row[key] is None else shown.format(row[key]) for key, shown in COLUMNS.items()]
        out.add_row(row["method"], *cells)
    return out


class _Clock:
    """Notes tokens and seconds of each forward of a model."""

    def __init__(self, model: Any) -> None:
        self.passes: list[tuple[list[int], float]] = []
        self._start = 0.0
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, with_kwargs=True),
        ]

    def _begin(self, model: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._start = perf_counter()

    def _end(self, model: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        seconds = perf_counter() - self._start
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self.passes.append((ids[0].tolist(), seconds))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def judging_cost(
    reasoner: Any, target: Any, prompts: Sequence[EncodedPrompt], tokenizer: Any, max_new_tokens: int
) -> dict[str, Any]:
    """Tokens and milliseconds of a pass that judges, beside those of a pass over one token, by timing each forward.

    Args:
        reasoner: SpecReason without a drafter of tokens, so that the target's own passes take one token.
        target: The model under it.
        prompts: Problems.
        tokenizer: Of both models.
        max_new_tokens: Of each answer.
    """
    question = tokenizer(JUDGE_PROMPT, add_special_tokens=False).input_ids
    clock = _Clock(target)
    try:
        for prompt in prompts:
            reasoner.generate(prompt.input_ids, max_new_tokens=max_new_tokens, do_sample=False)
    finally:
        clock.close()
    given = [prompt.input_ids[0].tolist() for prompt in prompts]
    judging = [(len(ids), seconds) for ids, seconds in clock.passes if len(ids) > 1 and ids not in given]
    asked = any(_holds(ids, question) for ids, _ in clock.passes)
    single = [seconds for ids, seconds in clock.passes if len(ids) == 1]
    return {
        "problems": len(prompts),
        "threads": torch.get_num_threads(),
        "judging_passes": len(judging),
        "question_tokens": len(question) if asked else 0,
        "median_tokens_of_a_judging_pass": median(tokens for tokens, _ in judging) if judging else None,
        "median_ms_of_a_judging_pass": 1e3 * median(seconds for _, seconds in judging) if judging else None,
        "one_token_passes": len(single),
        "median_ms_of_a_one_token_pass": 1e3 * median(single) if single else None,
    }


def _holds(ids: Sequence[int], part: Sequence[int]) -> bool:
    """Whether `part` stands in `ids`, behind something else."""
    return any(list(ids[i : i + len(part)]) == list(part) for i in range(1, len(ids) - len(part) + 1))


def plot(parts: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, titles: Mapping[str, str]) -> None:
    """Accuracy against mean latency, one panel a part; SpecReason's thresholds are joined by a line."""
    from matplotlib.figure import Figure  # an optional dependency

    figure = Figure(figsize=(5.2 * len(parts), 4.2), layout="constrained")
    for axes, (part, rows) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts.items(), strict=True):
        lines: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
        singles = []
        for row in rows:
            first, *rest = row["method"].split(" ", 2)
            if first == "SpecReason":
                lines.setdefault(" ".join([first, *rest[1:]]), []).append((rest[0], row))
            else:
                singles.append(row)
        for number, row in enumerate(singles):
            axes.scatter(row["mean_seconds"], 100 * row["accuracy"], s=36, label=row["method"], color=COLOURS[number])
        for number, (name, points) in enumerate(lines.items(), start=len(singles)):
            at = [(row["mean_seconds"], 100 * row["accuracy"]) for _, row in points]
            style = {"color": COLOURS[number % len(COLOURS)], "marker": "os"[number % 2], "markersize": 5}
            axes.plot(*zip(*at, strict=True), label=name, **style)
            for (threshold, _), place in zip(points, at, strict=True):
                axes.annotate(threshold, place, textcoords="offset points", xytext=(4, -10), fontsize=8)
        axes.set(title=titles[part], xlabel="seconds a problem, mean", ylabel="problems solved, %")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="center right")
    figure.savefig(path, dpi=110)
