"""Measures SpecReason on the reasoning test bed: accuracy against latency, greedy, one problem at a time.

    python benchmarks/bench_reasoning.py --threads 2

All methods solve the first held-out problem, then the second, ...: the target alone, the draft alone, speculation on
tokens alone (exact), SpecReason, and SpecReason with speculation on tokens under the target's own steps, once without
a limit and once with a budget of tokens for the thought, after which every method's thought is ended by force. What
judging costs is measured after that, with a timer in the target, and without it nothing is timed but whole calls.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from specdec.api import accelerate
from specdec.benchmark.display import measure_with_progress
from specdec.benchmark.measuring import EncodedPrompt, Method, Settings
from specdec.benchmark.methods import HF_GENERATE, OFF
from specdec.budget import Budget
from specdec.commands import options
from specdec.common.errors import with_short_errors
from specdec.common.loading import load_model, prepare_torch
from specdec.common.provenance import circumstances, model_info, write_json
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.lookahead import LookaheadDrafter
from specdec.drafters.spec_reason import SpecReasonDrafter
from specdec.verifiers.step import StepVerifier

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "reasoning"))
from chains import problems as held_out_problems
from judging import CertaintyJudge
from reasoning_figures import judging_cost, plot, rows_of, table
from solving import MAX_NEW_TOKENS, prompt_text
from task import BREAK, JUDGE_PROMPT

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parents[1] / "docs" / "images"
MODELS = Path(__file__).parents[1] / "examples" / "reasoning" / "models"
THRESHOLDS = (3, 5, 7, 8.5)
"""Of the digit's expectation, which comes near 9 and does not reach it; the likeliest digit does."""
UNLIMITED, BUDGETED = "unlimited", "budget"
DRAFT, DRAFT_MODEL, LOOKAHEAD = "draft alone", "draft model", "lookahead"
CERTAINTY = "certainty"
TOKENS_BY = DraftModelDrafter.name
"""What drafts the tokens of the target's own steps: the same draft model."""
END = "</think>"

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, add_completion=False)


class EndOfThought(LogitsProcessor):  # type: ignore[misc]
    """Ends a thought by force: behind `budget` tokens the next one is `</think>`, if there has been none.

    Args:
        prompt_length: Tokens of the prompt.
        budget: Tokens of the thought.
        end: The token that ends it.
    """

    def __init__(self, prompt_length: int, budget: int, end: int) -> None:
        self.length, self.end = prompt_length + budget, end
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] < self.length or (input_ids[:, self.prompt_length :] == self.end).any():
            return scores
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.end], device=scores.device), 0.0)


@dataclass
class Limited:
    """Something that generates, with a budget for the thought.

    Args:
        runner: A model, or a stand-in for one.
        budget: Tokens of the thought; None for no limit.
        end: The token that ends a thought.
    """

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
    """Target, draft and what the methods need of them."""

    target: Any
    draft: Any
    tokenizer: Any
    judge: str

    @property
    def end(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(END))

    def token_level(self, name: str, make: Callable[[], Any], budget: int | None = None) -> Method:
        """The target with a drafter of tokens, made anew for each run: it says what the target says."""
        return Method(
            name, lambda: Limited(accelerate(self.target, make(), budget=Budget(owner=name)), budget, self.end)
        )

    def alone(self, budget: int | None) -> Method:
        """The draft without a target."""
        return Method(DRAFT, lambda: Limited(self.draft, budget, self.end), guarantee="none")

    def reasoner(
        self, name: str, threshold: float, inner: str | None, budget: int | None = None, judge: str | None = None
    ) -> Any:
        """SpecReason with `inner` under the target's own steps; `name` keeps apart what is learned of the pace."""
        drafter = SpecReasonDrafter(
            self.draft,
            drafter=inner,
            judge_prompt=JUDGE_PROMPT,
            token_budget=budget,
            budget_text=None if budget is None else END + BREAK,
        )
        judge = judge or self.judge
        verifier = StepVerifier(threshold, CertaintyJudge(self.tokenizer) if judge == CERTAINTY else judge)
        return accelerate(self.target, drafter, verifier, budget=Budget(owner=name))

    def spec_reason(
        self, threshold: float, inner: str | None, budget: int | None = None, judge: str | None = None
    ) -> Method:
        name = f"SpecReason {threshold:g}" + ("" if inner is None else f" + {inner}")
        name += "" if judge is None else f" ({judge})"
        return Method(name, lambda: self.reasoner(name, threshold, inner, budget, judge), guarantee="approximate")

    def methods(self) -> list[Method]:
        """All of them without a limit, what they are compared with first."""
        return [
            Method(HF_GENERATE, lambda: self.target),
            self.alone(None),
            self.token_level(LOOKAHEAD, LookaheadDrafter),
            self.token_level(DRAFT_MODEL, lambda: DraftModelDrafter(self.draft)),
            *(self.spec_reason(threshold, None) for threshold in THRESHOLDS),
            self.spec_reason(9, None, judge="argmax"),
            *(self.spec_reason(threshold, TOKENS_BY) for threshold in THRESHOLDS),
            *(self.spec_reason(9, TOKENS_BY, judge=judge) for judge in ("argmax", CERTAINTY)),
        ]

    def budgeted_methods(self, budget: int) -> list[Method]:
        """The main ones, a thought ended behind so many tokens."""
        return [
            self.token_level(OFF, lambda: None, budget),
            self.alone(budget),
            self.token_level(DRAFT_MODEL, lambda: DraftModelDrafter(self.draft), budget),
            self.spec_reason(7, None, budget),
            *(self.spec_reason(threshold, TOKENS_BY, budget) for threshold in (7, 8.5)),
        ]


@app.command()
@with_short_errors
def main(
    name: Annotated[str, typer.Option(help="Of the results and their picture.")] = "reasoning",
    models: Annotated[Path, typer.Option(help="Folder of target/ and draft/.")] = MODELS,
    problems: Annotated[int, typer.Option(min=1, help="Held-out problems.")] = 200,
    first: Annotated[int, typer.Option(help="Number of the first; those below 600 have been looked at before.")] = 600,
    budget: Annotated[int, typer.Option(min=1, help="Tokens of a thought, in the part with a limit.")] = 192,
    judge: Annotated[str, typer.Option(help="certainty, argmax, expectation.")] = "expectation",
    judging_problems: Annotated[int, typer.Option(min=1, help="Problems on which judging is timed.")] = 20,
    threads: options.Threads = None,
) -> None:
    """Measure and write benchmarks/results/NAME.json and docs/images/NAME.png."""
    console = Console()
    prepare_torch(threads)
    target, tokenizer = load_model(str(models / "target"), "float32", "cpu")
    draft, _ = load_model(str(models / "draft"), "float32", "cpu")
    pair = Pair(target, draft, tokenizer, judge)
    asked = list(held_out_problems(problems + 1, first))
    prompts = [
        EncodedPrompt(f"{number}", tokenizer(prompt_text(p, tokenizer), return_tensors="pt").input_ids)
        for number, p in enumerate(asked)
    ]
    about = {
        "models": {"target": model_info("target", target), "draft": model_info("draft", draft)},
        "settings": {
            "problems": problems,
            "first_problem": first,
            "batch": 1,
            "budget": budget,
            "judge": judge,
            "judge_prompt": JUDGE_PROMPT,
        },
    }
    here = circumstances()
    answers = {f"{number}": problem.answer for number, problem in enumerate(asked)}
    parts: dict[str, list[dict[str, Any]]] = {}
    for part, methods in ((UNLIMITED, pair.methods()), (BUDGETED, pair.budgeted_methods(budget))):
        settings = Settings.of(MAX_NEW_TOKENS)
        measured = measure_with_progress(part, methods, prompts, target, settings, console=console)
        parts[part] = rows_of(measured, answers, tokenizer)
    titles = {UNLIMITED: "no limit", BUDGETED: f"a thought of {budget} tokens at most"}
    for part, rows in parts.items():
        console.print(table(rows, f"{problems} held-out problems, greedy, batch 1, {titles[part]}"))
    reasoner = pair.reasoner("judging", 7, None)
    judging = judging_cost(reasoner, target, prompts[:judging_problems], tokenizer, MAX_NEW_TOKENS)
    console.print(judging, highlight=False)
    results = {**here, **about, "parts": parts, "judging": judging}
    write_json(RESULTS / f"{name}.json", results)
    plot(parts, PICTURES / f"{name}.png", titles)
    console.print(f"written to {RESULTS / name}.json and {PICTURES / name}.png", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
