"""Solves one held-out problem with SpecReason and shows who wrote which step.

python examples/reasoning/reason.py
python examples/reasoning/reason.py --problem 7 --threshold 3 --drafter lookahead
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path
from typing import Annotated

import torch
import typer
from judging import CertaintyJudge
from rich.console import Console
from task import HELD_OUT, JUDGE_PROMPT, MAX_NEW_TOKENS, held_out_problems, prompt_text, written_answer
from transformers import AutoModelForCausalLM, AutoTokenizer

import specdec
from specdec.drafters.spec_reason import SpecReasonDrafter
from specdec.verifiers.step import StepVerifier

MODELS = Path(__file__).parent / "models"


def main(
    problem: Annotated[int, typer.Option(min=0, max=HELD_OUT - 1, help="Number of a held-out problem.")] = 0,
    threshold: Annotated[float, typer.Option(min=0, max=9, help="Steps scored lower are rewritten.")] = 7,
    drafter: Annotated[str, typer.Option(help="Drafts the target's own tokens: draft-model, lookahead, none.")] = (
        "draft-model"
    ),
    judge: Annotated[str, typer.Option(help="expectation, argmax, certainty.")] = "expectation",
    models: Annotated[Path, typer.Option(help="Folder of target/ and draft/.")] = MODELS,
) -> None:
    """Solve a problem by SpecReason and print the audit."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(models / "target")
    target, draft = (AutoModelForCausalLM.from_pretrained(models / name).eval() for name in ("target", "draft"))
    (asked,) = held_out_problems(1, problem)
    inputs = tokenizer(prompt_text(asked, tokenizer), return_tensors="pt")

    reasoner = SpecReasonDrafter(draft, drafter=None if drafter == "none" else drafter, judge_prompt=JUDGE_PROMPT)
    judged_by = CertaintyJudge(tokenizer) if judge == "certainty" else judge
    fast = specdec.accelerate(target, reasoner, verifier=StepVerifier(threshold=threshold, judge=judged_by))
    ids = fast.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)

    text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    console = Console()
    console.print(f"{asked}\n\n{text}\n", markup=False, highlight=False)
    print(fast.report.audit)
    verdict = "right" if written_answer(text) == asked.answer else f"wrong, it is {asked.answer}"
    console.print(f"the answer is {verdict}; guarantee: {fast.report.guarantee}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
