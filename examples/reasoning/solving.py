"""Answers of a model to problems of the test bed, in batches, and the draft's chains for the target to judge."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from task import BREAK, Problem, written_answer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 320


def prompt_text(problem: Problem, tokenizer: PreTrainedTokenizerBase) -> str:
    """The problem in the chat template, whose thinking block stays open."""
    message = [{"role": "user", "content": str(problem)}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


@torch.inference_mode()
def solve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Iterable[Problem],
    batch: int = 64,
    **options: Any,
) -> Iterator[str]:
    """What the model writes to each problem, the special tokens left out."""
    prompts = [prompt_text(problem, tokenizer) for problem in problems]
    for start in range(0, len(prompts), batch):
        inputs = tokenizer(
            prompts[start : start + batch],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        ).to(model.device)
        inputs.pop("token_type_ids", None)
        ids = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, pad_token_id=tokenizer.pad_token_id, **options)
        yield from tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Iterable[Problem]) -> float:
    """Share of problems answered rightly, by greedy decoding."""
    listed = list(problems)
    texts = solve(model, tokenizer, listed, do_sample=False)
    return sum(written_answer(text) == p.answer for p, text in zip(listed, texts, strict=True)) / len(listed)


def draft_chains(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Chains that `model` writes to problems, the second half of them sampled, so that more goes wrong."""
    torch.manual_seed(seed)
    half = len(problems) // 2
    for part, sampled in ((problems[:half], False), (problems[half:], True)):
        for problem, text in zip(part, solve(model, tokenizer, part, do_sample=sampled), strict=True):
            thought = text.partition("</think>")[0]
            steps = [part + BREAK for part in thought.split(BREAK) if part.strip()]
            operations = [(operation.kind, operation.number) for operation in problem.operations]
            yield {"start": problem.start, "operations": operations, "steps": steps}
