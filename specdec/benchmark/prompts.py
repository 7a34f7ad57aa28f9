"""The prompts of a benchmark, and their batches."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from specdec.embedded import Prompt, heldout_prompts
from specdec.measuring import EncodedPrompt

EMBEDDED_PROMPTS = "embedded"
RANDOM_PROMPT_TOKENS = 128
T = TypeVar("T")


def read_benchmark_prompts(
    source: str, tokenizer: Any, limit: int | None = None, chat: bool | None = None
) -> list[EncodedPrompt]:
    """Reads prompts.

    Args:
        source: `"embedded"` for those of the package; a JSONL file with one `{"prompt": ...}` a line, perhaps with
            `id` and `category`, or in the layout of Spec-Bench and SPEED-Bench: `question_id`, `category` and `turns`,
            of which the first one is taken; a text file, which is one prompt; anything else is read as
            `specdec distill` reads it: a folder, or the name of a data set.
        tokenizer: The target's.
        limit: So many prompts at most, spread over all of them, and so over all categories.
        chat: Whether a prompt is a user's turn, which the chat template is applied to; if None, those in `turns` are,
            where there is a template.

    Returns:
        Prompts of one row each, on the CPU.

    Raises:
        ValueError: The source has no known form, or no prompt; or there is no chat template.
        FileNotFoundError: A file is missing.
    """
    if chat and not tokenizer.chat_template:
        raise ValueError("chat=True needs a chat template, and the tokenizer has none; use a chat model, or chat=False")
    if source == EMBEDDED_PROMPTS:
        return [_encoded(prompt, None, tokenizer, bool(chat)) for prompt in heldout_prompts(limit)]
    path = Path(source)
    if path.is_file() and path.suffix == ".jsonl":
        return [
            _encoded(prompt, category, tokenizer, bool(tokenizer.chat_template) and is_turn if chat is None else chat)
            for prompt, category, is_turn in spread_over(list(_records(path)), limit)
        ]
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            raise ValueError(f"{path} holds no prompt; write the text to complete, or JSONL")
        return [_encoded(Prompt(path.name, text), None, tokenizer, bool(chat))]
    if source.startswith((".", "/", "~")) and not path.expanduser().exists():
        raise FileNotFoundError(f"{source} does not exist; check the path")
    from specdec.training.prompts import load_prompts

    found = load_prompts(source, tokenizer, limit=limit, chat=bool(chat))
    return [EncodedPrompt(prompt.id, torch.tensor([prompt.input_ids])) for prompt in found]


def _records(path: Path) -> Iterator[tuple[Prompt, str | None, bool]]:
    """Prompt, category, and whether it is a user's turn, of each line."""
    found = 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            is_turn = "turns" in record
            text = record["turns"][0] if is_turn else record["prompt"]
            name = record.get("question_id", record.get("id", f"{path.name}:{number}"))
            if not isinstance(text, str) or not text:
                raise ValueError(text)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ValueError(
                f'line {number} of {path} is not a prompt; write {{"prompt": "..."}} a line, or '
                '{"question_id": 1, "category": "...", "turns": ["..."]}'
            ) from None
        found += 1
        category = record.get("category")
        yield Prompt(str(name), text), None if category is None else str(category), is_turn
    if not found:
        raise ValueError(f'{path} holds no prompt; write {{"prompt": "..."}} a line')


def spread_over(items: list[T], limit: int | None) -> list[T]:
    """So many at most, at even distances."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def _encoded(prompt: Prompt, category: str | None, tokenizer: Any, is_turn: bool) -> EncodedPrompt:
    if is_turn:
        turns = [{"role": "user", "content": prompt.text}]
        kwargs = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        ids = tokenizer.apply_chat_template(turns, **kwargs).input_ids
    else:
        ids = tokenizer(prompt.text, return_tensors="pt").input_ids
    return EncodedPrompt(prompt.id, ids, category=category)


def random_prompts(count: int, vocab: int) -> list[EncodedPrompt]:
    """Prompts of random tokens."""
    ids = torch.randint(vocab, (count, 1, RANDOM_PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    return [EncodedPrompt(f"random {i}", row) for i, row in enumerate(ids)]


def batches(prompts: Sequence[EncodedPrompt], size: int, pad: int, device: Any) -> list[EncodedPrompt]:
    """Batches of prompts as they come, on a device; prompts that do not fill a batch are left out.

    Args:
        prompts: Of one row each.
        size: Prompts per batch.
        pad: Token to fill shorter prompts with, on the left.
        device: Where the target takes them.

    Raises:
        ValueError: There are fewer prompts than a batch takes.
    """
    if len(prompts) < size:
        raise ValueError(f"a batch of {size} prompts cannot be made of {len(prompts)}; give more prompts")
    return [_batch(prompts[i : i + size], pad, device) for i in range(0, len(prompts) - size + 1, size)]


def _batch(prompts: Sequence[EncodedPrompt], pad: int, device: Any) -> EncodedPrompt:
    width = max(prompt.input_ids.shape[1] for prompt in prompts)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        length = prompt.input_ids.shape[1]
        ids[row, width - length :] = prompt.input_ids[0].cpu()
        mask[row, width - length :] = 1
    categories = dict.fromkeys(prompt.category for prompt in prompts)
    return EncodedPrompt(
        " | ".join(prompt.id for prompt in prompts),
        ids.to(device),
        mask.to(device),
        next(iter(categories)) if len(categories) == 1 else None,
    )
