"""Prompts for the target to answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from specdec.training.chat import ChatEncoder, as_messages
from specdec.training.examples import encode_all, prompt_ids
from specdec.training.records import Record, kind_of, read_records, sample


@dataclass(frozen=True)
class DistillationPrompt:
    """A prompt for the target to answer.

    Args:
        id: Where it comes from.
        input_ids: Its tokens.
        text: Its text.
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
    """Reads distinct prompts.

    The last assistant's turn of a conversation and the completion of a prompt are left out; text is cut into prompts of
    `prompt_tokens` tokens.

    Args:
        source: As for `load_examples`.
        tokenizer: The target's.
        prompt_tokens: Length of the prompts that text is cut into.
        split: As for `load_examples`.
        text_field: As for `load_examples`.
        limit: At most this many prompts, chosen by `seed`.
        seed: Of that choice.
        chat: A `prompt` is a user's turn: apply the chat template.
        chat_template: File with a Jinja template, in place of the tokenizer's own.

    Raises:
        ValueError: The source cannot be read, a record has no known form, or there is no prompt.
    """
    if prompt_tokens < 1:
        raise ValueError(f"prompt_tokens must be at least 1, got {prompt_tokens}; 128 is the default")
    records = read_records(source, tokenizer, split)
    encoder = _PromptEncoder(tokenizer, ChatEncoder(tokenizer, chat_template), text_field, prompt_tokens, chat)
    prompts = unique(encode_all(records, encoder.encode, [], "it has no prompt"))
    if not prompts:
        raise ValueError(f"{source} has no prompt in {len(records)} records; give prompts, conversations or text")
    return list(sample(prompts, limit, seed))


def unique(prompts: Iterable[DistillationPrompt]) -> list[DistillationPrompt]:
    """The first prompt of each token sequence that is not empty."""
    first: dict[tuple[int, ...], DistillationPrompt] = {}
    for prompt in prompts:
        if prompt.input_ids:
            first.setdefault(prompt.input_ids, prompt)
    return list(first.values())


def new_prompt(name: str, ids: Sequence[int], tokenizer: Any) -> DistillationPrompt:
    """A prompt of token ids."""
    return DistillationPrompt(name, tuple(ids), tokenizer.decode(ids, clean_up_tokenization_spaces=False))


@dataclass
class _PromptEncoder:
    tokenizer: Any
    chat: ChatEncoder
    text_field: str | None
    prompt_tokens: int
    as_turns: bool

    def encode(self, record: Record) -> Iterator[DistillationPrompt]:
        name = str(record.values.get("id", record.where))
        for suffix, ids in self._ids(record):
            yield new_prompt(name + suffix, ids, self.tokenizer)

    def _ids(self, record: Record) -> Iterator[tuple[str, list[int]]]:
        """Token ids of each prompt of a record, with what tells it from the others."""
        kind, values = kind_of(record, self.text_field), record.values
        if kind == "tokens":
            yield "", values["input_ids"][: values.get("num_prompt_tokens")]
        elif kind == "text":
            yield from self._pieces(values[self.text_field or "text"])
        elif kind == "messages":
            messages = as_messages(record, self.text_field)
            if messages and messages[-1]["role"] == "assistant":
                messages.pop()
            if messages:
                yield "", self.chat.prompt(messages, values.get("tools"), record.where)
        elif not isinstance(values["prompt"], str):
            raise ValueError(f"{record.where}: the prompt must be text; write turns as messages")
        elif self.as_turns:
            yield "", self.chat.prompt([{"role": "user", "content": values["prompt"]}], None, record.where)
        else:
            yield "", prompt_ids(self.tokenizer, values["prompt"])

    def _pieces(self, text: str) -> Iterator[tuple[str, list[int]]]:
        """Pieces of a document; a short last one is left out, unless it is the only one."""
        ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        beginning = prompt_ids(self.tokenizer, "")
        for start in range(0, len(ids), self.prompt_tokens):
            piece = ids[start : start + self.prompt_tokens]
            if start == 0 or len(piece) == self.prompt_tokens:
                yield f":{start}", beginning + piece
