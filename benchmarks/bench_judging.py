"""What it costs to ask the target about a drafted step: tokens and milliseconds per step.

The embedded draft model writes lines of code, every one of which is kept, so that all passes are judging passes. They
differ in the question that follows the step. Beside them: a target pass over one token, of which the step would have
taken one for each of its tokens.

    python benchmarks/bench_judging.py
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import specdec
from specdec.commands import options
from specdec.common.embedded import heldout_prompts, load_embedded
from specdec.common.loading import prepare_torch
from specdec.common.provenance import circumstances, write_json
from specdec.drafters import SpecReasonDrafter
from specdec.drafters.reasoning.judge_prompts import PLAIN
from specdec.verifiers import JudgedStep, StepVerifier

RESULTS = Path(__file__).parent / "results"
QUESTIONS = {"nothing": None, "a few words": "\n# score from 0 to 9: ", "the default question": PLAIN}
PLAIN_PASS = "one token, nothing asked"


def keeping(asks_target: bool) -> Callable[[JudgedStep], float]:
    """A judge that keeps every step, whether or not the target is asked."""

    def judge(step: JudgedStep) -> float:
        return 1.0

    judge.asks_target = asks_target  # type: ignore[attr-defined]
    return judge


def methods_of(target: Any, draft: Any, tokenizer: Any) -> dict[str, Any]:
    """A wrapped target per question, and one without drafting."""
    found: dict[str, Any] = {PLAIN_PASS: specdec.accelerate(target, None)}
    for name, question in QUESTIONS.items():
        drafter = SpecReasonDrafter(
            draft,
            judge_prompt=question,
            step_end="\n",
            max_step_tokens=48,
            thinking_end=None,
            tokenizer=tokenizer,
            target_tokenizer=tokenizer,
        )
        found[name] = specdec.accelerate(target, drafter, StepVerifier(0.5, keeping(question is not None)), strict=True)
    return found


def main(
    prompts: Annotated[int, typer.Option(min=1)] = 10,
    tokens: Annotated[int, typer.Option(min=2, help="Per prompt.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved.")] = 3,
    threads: options.Threads = None,
) -> None:
    """Measure and write benchmarks/results/judging.json."""
    prepare_torch(threads)
    (target, tokenizer), (draft, _) = load_embedded(), load_embedded("draft")
    methods = methods_of(target, draft, tokenizer)
    milliseconds, step_tokens, question_tokens = defaultdict(list), defaultdict(list), defaultdict(list)
    for number in range(repeats + 1):
        for text in heldout_prompts(prompts):
            ids = tokenizer(text.text, return_tensors="pt").input_ids
            for name, fast in methods.items():
                fast.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, eos_token_id=None)
                report = fast.report
                prefills = int(name == PLAIN_PASS)  # a first step is judged in the pass over the prompt
                passes = report.num_target_passes - prefills
                if number == 0:  # the first round warms up
                    continue
                spent = report.seconds["target"] + report.seconds["verify"]
                milliseconds[name].append(1e3 * spent / passes)
                step_tokens[name].append((report.num_generated_tokens - prefills) / passes)
                asked = report.drafter_figures.get("question_tokens", 0)
                question_tokens[name].append(asked / passes)
    table = Table(title=f"a judging pass, embedded target, {prompts} prompts x {tokens} tokens, medians")
    for column in ("what is asked", "tokens of the step", "tokens of the question", "ms per pass"):
        table.add_column(column)
    figures = {}
    for name in methods:
        values = [statistics.median(each[name]) for each in (step_tokens, question_tokens, milliseconds)]
        figures[name] = dict(zip(("step_tokens", "question_tokens", "milliseconds"), values, strict=True))
        table.add_row(name, *(f"{value:.1f}" for value in values))
    Console().print(table)
    write_json(RESULTS / "judging.json", {**circumstances(), "prompts": prompts, "tokens": tokens, "passes": figures})


if __name__ == "__main__":
    typer.run(main)
