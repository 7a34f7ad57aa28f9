"""Prompts for the target to answer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from specdec.training.chat import ChatEncoder, TemplateRefusedError, as_messages
from specdec.training.examples import prompt_ids
from specdec.training.records import Record, kind_of, read_records, sample


@dataclass(frozen=True)
class DistillationPrompt:
    """A prompt for the target to answer.

    Args:
        id: Where it comes from.
        input_ids: Its tokens.
        text: What they say.
    """

    id: str
    input_ids: tuple[int, ...]
    text: str


def load_prompts(
    source: str,
    tokenizer: Any,
    *,
    prompt_tokens: int = 128,
    split: str = "train",
    text_field: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    chat: bool = False,
    chat_template: str | None = None,
) -> list[DistillationPrompt]:
    """Reads prompts, each once.

    Of a conversation the last assistant's turn is left out; of a prompt with a completion, the completion; text is cut
    into prompts of `prompt_tokens` tokens.

    Args:
        source: As for `load_examples`.
        tokenizer: The target's.
        prompt_tokens: Length of the prompts that text is cut into.
        split: As for `load_examples`.
        text_field: As for `load_examples`.
        limit: So many prompts at most, chosen by `seed`.
        seed: Of that choice.
        chat: A `prompt` is a user's turn: apply the chat template.
        chat_template: File with a Jinja template, in place of the tokenizer's own.

    Raises:
        ValueError: The source cannot be read, a record has no known form, or there is no prompt.
    """
    if prompt_tokens < 1:
        raise ValueError(f"prompt_tokens must be at least 1, got {prompt_tokens}; 128 is the default")
    records = read_records(source, tokenizer, split, text_field)
    reader = _PromptReader(tokenizer, ChatEncoder(tokenizer, chat_template), text_field, prompt_tokens, chat)
    prompts = unique(prompt for prompt in reader.read(records) if prompt.input_ids)
    if not prompts:
        raise ValueError(f"{source} has no prompt in {len(records)} records; give prompts, conversations or text")
    if reader.num_refused:
        warnings.warn(
            f"{reader.num_refused} of {len(records)} records are left out; the first is {reader.first_refusal}",
            stacklevel=2,
        )
    return list(sample(prompts, limit, seed))


def unique(prompts: Iterable[DistillationPrompt]) -> list[DistillationPrompt]:
    """The prompts without those whose tokens came before."""
    return list({prompt.input_ids: prompt for prompt in reversed(list(prompts))}.values())[::-1]


@dataclass
class _PromptReader:
    tokenizer: Any
    encoder: ChatEncoder
    text_field: str | None
    prompt_tokens: int
    chat: bool
    num_refused: int = 0
    first_refusal: str | None = None

    def read(self, records: Iterable[Record]) -> Iterator[DistillationPrompt]:
        for record in records:
            try:
                yield from self._prompts(record)
            except TemplateRefusedError as refusal:
                self.num_refused += 1
                self.first_refusal = self.first_refusal or f"{record.where}: {refusal}"

    def _prompts(self, record: Record) -> Iterator[DistillationPrompt]:
        kind, values = kind_of(record, self.text_field), record.values
        name = str(values.get("id", record.where))
        if kind == "messages":
            messages = as_messages(record, self.text_field)
            if messages and messages[-1]["role"] == "assistant":
                messages.pop()
            if messages:
                yield self._prompt(name, self.encoder.prompt(messages, values.get("tools"), record.where))
        elif kind in ("prompt", "completion"):
            yield self._prompt(name, self._prompt_ids(record))
        elif kind == "tokens":
            yield self._prompt(name, values["input_ids"][: values.get("num_prompt_tokens")])
        else:
            yield from self._cut(name, values[self.text_field or "text"])

    def _prompt_ids(self, record: Record) -> list[int]:
        prompt = record.values["prompt"]
        if not isinstance(prompt, str):
            raise ValueError(f"{record.where}: the prompt must be text; write turns as messages")
        if self.chat:
            return self.encoder.prompt([{"role": "user", "content": prompt}], None, record.where)
        return prompt_ids(self.tokenizer, prompt)

    def _cut(self, name: str, text: str) -> Iterator[DistillationPrompt]:
        """Pieces of a document; a short last one is left out, unless it is the only one."""
        ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        beginning = prompt_ids(self.tokenizer, "")
        for start in range(0, len(ids), self.prompt_tokens):
            piece = ids[start : start + self.prompt_tokens]
            if start == 0 or len(piece) == self.prompt_tokens:
                yield self._prompt(f"{name}:{start}", beginning + piece)

    def _prompt(self, name: str, ids: list[int]) -> DistillationPrompt:
        return DistillationPrompt(name, tuple(ids), self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def batches_of(prompts: list[DistillationPrompt], batch_size: int) -> list[list[DistillationPrompt]]:
    """Prompts of like length together, the longest first: if memory is short, it is so at once."""
    ordered = iter(sorted(prompts, key=lambda prompt: -len(prompt.input_ids)))
    return list(iter(lambda: list(islice(ordered, batch_size)), []))
