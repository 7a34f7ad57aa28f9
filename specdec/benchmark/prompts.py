"""The prompts of a benchmark, and their batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from specdec.benchmark.measuring import EncodedPrompt, end_tokens
from specdec.common.embedded import heldout_prompts
from specdec.common.prompts import own_prompts
from specdec.training.records import TEXT_SUFFIXES, read_records

EMBEDDED_PROMPTS = "embedded"
OWN_PROMPTS = {"own": "heldout", "own-tuning": "tuning"}
"""The split of the package's chat prompts by the name of the source."""
DEFAULT_SOURCE = "default"
"""The package's chat prompts for a tokenizer with a chat template, else `EMBEDDED_PROMPTS`."""
RANDOM_PROMPT_TOKENS = 128
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """What is asked, before it is encoded.

    Args:
        id: For tables.
        texts: A text to complete, or a user's turns.
        category: The kind of task.
        is_chat: Whether they are turns.
    """

    id: str
    texts: Sequence[str]
    category: str | None = None
    is_chat: bool = False

    @classmethod
    def of(cls, record: Any, where: str) -> Question:
        """A question from a record with `prompt`, or with `turns` as in Spec-Bench and SPEED-Bench.

        Raises:
            ValueError: There is no text in it.
        """
        is_chat = "turns" in record
        texts = list(record["turns"]) if is_chat else [record["prompt"]]
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"{where} has no text; turns must be a list of texts")
        category = record.get("category")
        name = str(record.get("question_id", record.get("id", where)))
        return cls(name, texts, None if category is None else str(category), is_chat)


def read_benchmark_prompts(
    source: str, tokenizer: Any, limit: int | None = None, chat: bool | None = None, split: str = "train"
) -> list[EncodedPrompt]:
    """Reads prompts; of questions of several turns, the first ones.

    Args:
        source: `"own"` for the package's held-out chat prompts, `"own-tuning"` for the others; `"embedded"` for its
            beginnings of Python code; `"default"` for one or the other, by whether there is a chat template; a JSONL
            file with one `{"prompt": ...}` a line, perhaps with `id` and `category`, or in the layout of Spec-Bench and
            SPEED-Bench: `question_id`, `category` and `turns`; a text file, which is one prompt; anything else is read
            as `specdec distill` reads it: a folder, a table, or the name of a data set, `name:configuration`.
        tokenizer: The target's.
        limit: Questions at most, at even distances over all of them, and so over all categories.
        chat: Whether a prompt is a user's turn, which the chat template is applied to; if None, those in `turns` are,
            where there is a template.
        split: Of a data set.

    Returns:
        Prompts of one row each, on the CPU.

    Raises:
        ValueError: The source has no known form, or no prompt; or there is no chat template.
        FileNotFoundError: A file is missing.
    """
    return [turns[0] for turns in read_benchmark_questions(source, tokenizer, limit, chat, split)]


def read_benchmark_questions(
    source: str,
    tokenizer: Any,
    limit: int | None = None,
    chat: bool | None = None,
    split: str = "train",
    num_turns: int = 1,
    answer: Callable[[Tensor], Sequence[int]] | None = None,
) -> list[list[EncodedPrompt]]:
    """Reads prompts, those of one question together; see `read_benchmark_prompts`.

    A later turn is a prompt that holds the turns before it and the answers that the target gives to them: the same text
    for all methods, whatever they would have answered themselves.

    Args:
        source: See `read_benchmark_prompts`.
        tokenizer: See there.
        limit: See there.
        chat: See there.
        split: See there.
        num_turns: Turns of a question at most.
        answer: Completes a prompt `[1, tokens]`; returns the new token ids. Needed for more than one turn.
    """
    if chat and not tokenizer.chat_template:
        raise ValueError("chat=True needs a chat template, and the tokenizer has none; use a chat model, or chat=False")
    if num_turns > 1 and answer is None:
        raise ValueError(f"num_turns={num_turns} needs answers to the turns before the last; pass answer=...")
    made = []
    for question in _questions(source, tokenizer, limit, bool(chat), split):
        if isinstance(question, EncodedPrompt):
            made.append([question])
            continue
        is_chat = bool(tokenizer.chat_template) and question.is_chat if chat is None else chat
        made.append(list(_turns(question, tokenizer, is_chat, num_turns, answer)))
    return made


def _questions(
    source: str, tokenizer: Any, limit: int | None, chat: bool, split: str
) -> Sequence[Question | EncodedPrompt]:
    """What a source holds."""
    if source == DEFAULT_SOURCE:
        source = "own" if tokenizer.chat_template else EMBEDDED_PROMPTS
    if source in OWN_PROMPTS:
        own = own_prompts(OWN_PROMPTS[source])
        questions = [Question(p.id, [turn["content"] for turn in p.messages], p.category, True) for p in own]
        return spread_over(questions, limit)
    if source == EMBEDDED_PROMPTS:
        return [Question(prompt.id, [prompt.text]) for prompt in heldout_prompts(limit)]
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".jsonl":
        return spread_over(list(_lines(path)), limit)
    if path.is_file() and path.suffix in TEXT_SUFFIXES:
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            raise ValueError(f"{path} holds no prompt; write the text to complete, or JSONL")
        return [Question(path.name, [text])]
    if source.startswith((".", "/", "~")) and not path.exists():
        raise FileNotFoundError(f"{source} does not exist; check the path")
    from specdec.training.prompts import load_prompts

    records = read_records(source, tokenizer, split)
    if len(records) and records[0].values.get("turns"):
        chosen = spread_over(range(len(records)), limit)
        return [Question.of(records[i].values, records[i].where) for i in chosen]
    found = load_prompts(source, tokenizer, split=split, limit=limit, chat=chat)
    return [EncodedPrompt(prompt.id, torch.tensor([prompt.input_ids])) for prompt in found]


def _lines(path: Path) -> Iterator[Question]:
    """The question of each line of a JSONL file."""
    lines = [(n, line) for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f'{path} holds no prompt; write {{"prompt": "..."}} a line')
    for number, line in lines:
        try:
            yield Question.of(json.loads(line), f"{path.name}:{number}")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ValueError(
                f'line {number} of {path} is not a prompt; write {{"prompt": "..."}} a line, or '
                '{"question_id": 1, "category": "...", "turns": ["..."]}'
            ) from None


def _turns(
    question: Question,
    tokenizer: Any,
    is_chat: bool,
    num_turns: int,
    answer: Callable[[Tensor], Sequence[int]] | None,
) -> Iterator[EncodedPrompt]:
    """The prompts of a question, a turn each."""
    messages: list[dict[str, str]] = []
    ids = torch.empty((1, 0), dtype=torch.int64)
    for number, text in enumerate(question.texts[:num_turns], start=1):
        if number > 1:
            assert answer is not None
            new = list(answer(ids))
            messages.append({"role": "assistant", "content": tokenizer.decode(new, skip_special_tokens=True)})
            ids = torch.cat([ids, torch.tensor([new], dtype=torch.int64)], 1)
        if is_chat:
            messages.append({"role": "user", "content": text})
            kwargs = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
            ids = tokenizer.apply_chat_template(messages, **kwargs).input_ids
        elif number > 1:
            more = tokenizer("\n" + text + "\n", return_tensors="pt", add_special_tokens=False).input_ids
            ids = torch.cat([ids, more], 1)
        else:
            ids = tokenizer(text, return_tensors="pt").input_ids
        name = question.id if number == 1 else f"{question.id}:{number}"
        yield EncodedPrompt(name, ids, category=question.category, text=text)


def answers_of(model: Any, max_new_tokens: int) -> Callable[[Tensor], list[int]]:
    """Greedy answers of a model, as `read_benchmark_questions` takes them: without the end-of-text token."""
    ends = end_tokens(model)

    def answer(ids: Tensor) -> list[int]:
        ids = ids.to(model.device)
        kwargs = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **kwargs)
        new: list[int] = output[0, ids.shape[1] :].tolist()
        return [token for token in new if token not in ends]

    return answer


def spread_over(items: Sequence[T], limit: int | None) -> Sequence[T]:
    """At most `limit` of them, at even distances."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def random_prompts(count: int, vocab: int) -> list[EncodedPrompt]:
    """Prompts of random tokens."""
    ids = torch.randint(vocab, (count, 1, RANDOM_PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    return [EncodedPrompt(f"random {i}", row) for i, row in enumerate(ids)]


def batches(prompts: Sequence[EncodedPrompt], size: int, pad: int, device: Any) -> list[EncodedPrompt]:
    """Batches of prompts in order, on a device; prompts that do not fill a batch are left out.

    Args:
        prompts: Of one row each.
        size: Prompts per batch.
        pad: Token to pad shorter prompts with, on the left.
        device: The target's.

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
    categories = {prompt.category for prompt in prompts}
    return EncodedPrompt(
        " | ".join(prompt.id for prompt in prompts),
        ids.to(device),
        mask.to(device),
        categories.pop() if len(categories) == 1 else None,
        prompts[0].text,
    )
