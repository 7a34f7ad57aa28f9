"""Measures SpecReason on the reasoning example: accuracy against latency, greedy, one problem at a time.

    python benchmarks/bench_reasoning.py --threads 1

All methods solve the first held-out problem, then the second, ...: the target alone, the draft alone, speculation on
tokens alone (exact), SpecReason, and SpecReason with speculation on tokens in the target's own steps, once without
a limit and once with a budget of tokens for the thought, after which every method's thought is ended by force.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from specdec.api import accelerate
from specdec.benchmark.measuring import EncodedPrompt, Measurement, Method, Sample, Settings, run_interleaved
from specdec.budget import Budget
from specdec.common.loading import load_model, prepare_torch
from specdec.common.provenance import circumstances, model_info, write_json
from specdec.drafters import DraftModelDrafter, LookaheadDrafter, SpecReasonDrafter
from specdec.verifiers import StepVerifier

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "reasoning"))
from judging import CertaintyJudge
from task import BREAK, JUDGE_PROMPT, MAX_NEW_TOKENS, held_out_problems, prompt_text, written_answer

ROOT = Path(__file__).parents[1]
RESULTS, PICTURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
THRESHOLDS = (3, 5, 7, 8.5)
"""Of the digit's expectation, which comes near 9 and does not reach it; the likeliest digit does."""
END = "</think>"
COLUMNS = {"accuracy": "{:.1%}", "mean_seconds": "{:.3f}", "speedup": "{:.2f}×", "mean_tokens": "{:.0f}",
           "tokens_per_pass": "{:.2f}", "kept_share": "{:.1%}", "num_identical": "{}"}  # fmt: skip


class EndOfThought(LogitsProcessor):  # type: ignore[misc]
    """Forces `</think>` after `budget` tokens of a thought, unless it was written before."""

    def __init__(self, prompt_length: int, budget: int, end: int) -> None:
        self.prompt_length, self.budget, self.end = prompt_length, budget, end

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        thought = input_ids[:, self.prompt_length :]
        if thought.shape[1] != self.budget or bool((thought == self.end).any()):
            return scores
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.end] = 0.0
        return forced


@dataclass
class Limited:
    """Generates with a budget of tokens for the thought; None for no limit."""

    runner: Any
    budget: int | None
    end: int

    @property
    def report(self) -> Any:
        return getattr(self.runner, "report", None)

    def generate(self, ids: Tensor, **kwargs: Any) -> Any:
        if self.budget is not None:
            kwargs["logits_processor"] = LogitsProcessorList([EndOfThought(ids.shape[1], self.budget, self.end)])
        return self.runner.generate(ids, **kwargs)


@dataclass
class Pair:
    """Target and draft model, and the methods made of them."""

    target: Any
    draft: Any
    tokenizer: Any

    def plain(
        self, name: str, make: Callable[[], Any], budget: int | None, guarantee: str = "token-identical"
    ) -> Method:
        """A method whose thought is limited from outside."""
        end = int(self.tokenizer.convert_tokens_to_ids(END))
        return Method(name, lambda: Limited(make(), budget, end), guarantee=guarantee)

    def spec_reason(self, threshold: float, inner: str | None, budget: int | None, judge: str = "") -> Method:
        """SpecReason with the drafter `inner` for the target's own steps."""
        name = f"SpecReason {threshold:g}" + (f" + {inner}" if inner else "") + (f" ({judge})" if judge else "")

        def make() -> Any:
            text = None if budget is None else END + BREAK
            drafter = SpecReasonDrafter(
                self.draft, drafter=inner, judge_prompt=JUDGE_PROMPT, token_budget=budget, budget_text=text
            )
            chosen: Any = CertaintyJudge(self.tokenizer) if judge == "certainty" else judge or "expectation"
            return accelerate(self.target, drafter, StepVerifier(threshold, chosen), budget=Budget(owner=name))

        return Method(name, make, guarantee="approximate")

    def methods(self, budget: int | None) -> list[Method]:
        """All methods without a budget, the main ones with one; the first is what the others are compared with."""
        target, inner = self.target, DraftModelDrafter.name
        draft_model = lambda: accelerate(target, DraftModelDrafter(self.draft), budget=Budget(owner="draft model"))  # noqa: E731
        alone = self.plain("draft alone", lambda: self.draft, budget, guarantee="none")
        if budget is not None:
            return [
                self.plain("specdec off", lambda: accelerate(target, None), budget),
                alone,
                self.plain("draft model", draft_model, budget),
                self.spec_reason(7, None, budget),
                *(self.spec_reason(threshold, inner, budget) for threshold in (7, 8.5)),
            ]
        return [
            Method("HF generate", lambda: target),
            alone,
            Method("lookahead", lambda: accelerate(target, LookaheadDrafter(), budget=Budget(owner="lookahead"))),
            Method("draft model", draft_model),
            *(self.spec_reason(threshold, None, None) for threshold in THRESHOLDS),
            self.spec_reason(9, None, None, "argmax"),
            *(self.spec_reason(threshold, inner, None) for threshold in THRESHOLDS),
            *(self.spec_reason(9, inner, None, judge) for judge in ("argmax", "certainty")),
        ]


def rows_of(measured: Measurement, answers: Mapping[str, int], tokenizer: Any) -> list[dict[str, Any]]:
    """One summary per method; a speed-up is the median over the problems of the ratio of whole calls' times."""
    by_method: dict[str, list[Sample]] = {}
    for sample in measured.samples:
        by_method.setdefault(sample.method, []).append(sample)
    plain = {sample.prompt: sample.seconds for sample in by_method[measured.reference]}
    return [{"method": name, **_row(samples, plain, answers, tokenizer)} for name, samples in by_method.items()]


def _row(
    samples: Sequence[Sample], plain: Mapping[str, float], answers: Mapping[str, int], tokenizer: Any
) -> dict[str, Any]:
    texts = [tokenizer.decode(sample.outputs[0] or [], skip_special_tokens=True) for sample in samples]
    figures = [(sample.report or {}).get("drafter_figures", {}) for sample in samples]
    judged, kept = (sum(f.get(name, 0) for f in figures) for name in ("judged", "kept"))
    seconds = [sample.seconds for sample in samples]
    tokens = [sample.num_tokens for sample in samples]
    return {
        "accuracy": mean(written_answer(text) == answers[s.prompt] for text, s in zip(texts, samples, strict=True)),
        "mean_seconds": mean(seconds),
        "speedup": median(plain[s.prompt] / s.seconds for s in samples),
        "mean_tokens": mean(tokens),
        "tokens_per_pass": sum(tokens) / max(sum(s.num_target_passes for s in samples), 1),
        "kept_share": kept / judged if judged else None,
        "num_identical": sum(bool(s.identical_rows and all(s.identical_rows)) for s in samples),
        "seconds_quartiles": quantiles(seconds, n=4)[::2] if len(seconds) > 1 else seconds * 2,
    }


def table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    out = Table("method", *(name.replace("_", " ") for name in COLUMNS), title=title, title_justify="left")
    for row in rows:
        out.add_row(row["method"], *("" if row[k] is None else shown.format(row[k]) for k, shown in COLUMNS.items()))
    return out


def plot(parts: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Accuracy against mean latency, one panel per part."""
    from matplotlib.figure import Figure  # an optional dependency

    figure = Figure(figsize=(5.2 * len(parts), 4.2), layout="constrained")
    for axes, (part, rows) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts.items(), strict=True):
        for row in rows:
            axes.scatter(row["mean_seconds"], 100 * row["accuracy"], label=row["method"])
        axes.set(title=part, xlabel="seconds a problem, mean", ylabel="problems solved, %")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    problems: Annotated[int, typer.Option(min=1, help="Held-out problems.")] = 200,
    first: Annotated[int, typer.Option(help="Number of the first; those below 600 have been looked at before.")] = 600,
    budget: Annotated[int, typer.Option(min=1, help="Tokens of a thought, in the part with a limit.")] = 192,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
) -> None:
    """Measure and write benchmarks/results/reasoning.json and docs/images/reasoning.png."""
    prepare_torch(threads)
    models = ROOT / "examples" / "reasoning" / "models"
    target, tokenizer = load_model(str(models / "target"), "float32", "cpu")
    draft, _ = load_model(str(models / "draft"), "float32", "cpu")
    pair, asked = Pair(target, draft, tokenizer), held_out_problems(problems + 1, first)
    prompts = [
        EncodedPrompt(str(number), tokenizer(prompt_text(problem, tokenizer), return_tensors="pt").input_ids)
        for number, problem in enumerate(asked)
    ]
    answers = {str(number): problem.answer for number, problem in enumerate(asked)}
    parts = {}
    for part, limit in (("unlimited", None), ("budget", budget)):
        methods, asks = pair.methods(limit), Settings.of(MAX_NEW_TOKENS)
        measured = run_interleaved(methods, prompts[:-1], target, asks, prompts[-1])
        parts[part] = rows_of(measured, answers, tokenizer)
        Console().print(table(parts[part], f"{problems} held-out problems, greedy, batch 1, {part}"))
    settings = {"problems": problems, "first_problem": first, "batch": 1, "budget": budget, "judge": "expectation",
                "judge_prompt": JUDGE_PROMPT}  # fmt: skip
    about = {"target": model_info("target", target), "draft": model_info("draft", draft)}
    write_json(RESULTS / "reasoning.json", {**circumstances(), "models": about, "settings": settings, "parts": parts})
    plot(parts, PICTURES / "reasoning.png")


if __name__ == "__main__":
    app()
