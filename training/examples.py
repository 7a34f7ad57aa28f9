"""Training examples: token ids, and which of them are to be learned."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from specdec.training.chat import ChatEncoder, TemplateRefusedError, as_messages
from specdec.training.records import Record, kind_of, read_records, sample

BUFFERED = 1000
"""Examples that are put into a table at once."""


@dataclass
class Example:
    """A text to learn from.

    Args:
        input_ids: Its tokens.
        supervised: For each token, whether it is to be learned; prompts are read, not learned.
    """

    input_ids: list[int]
    supervised: list[bool]

    def __post_init__(self) -> None:
        if len(self.input_ids) != len(self.supervised):
            raise ValueError(
                f"an example has {len(self.input_ids)} input_ids and {len(self.supervised)} supervised; "
                "give one flag per token"
            )


def load_examples(
    source: str,
    tokenizer: Any,
    *,
    split: str = "train",
    text_field: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    chat_template: str | None = None,
) -> Dataset:
    """Reads examples.

    What is supervised depends on the record: of `messages` and `conversations` the assistant's turns, of `prompt` and
    `completion` the completion, of token ids with `num_prompt_tokens` (what `distill` writes) all after the prompt, and
    of `text` everything. `"complete": false` beside `messages` or `completion` says that the last answer was cut: the
    end token after it is not supervised.

    Args:
        source: A folder that `distill` wrote; a `.jsonl` or `.json` file of records; a text file, one document; a
            folder of such files; or a data set for `datasets`: a local one, `name` or `name:configuration`.
        tokenizer: The target's.
        split: Of a data set.
        text_field: Field or column with text or turns; None to look for the known names.
        limit: So many records at most, chosen by `seed`.
        seed: Of that choice.
        chat_template: File with a Jinja template, in place of the tokenizer's own.

    Returns:
        Columns `input_ids` and `supervised`, a list each per example.

    Raises:
        ValueError: The source cannot be read, a record has no known form, or no token is supervised.
    """
    records = sample(read_records(source, tokenizer, split, text_field), limit, seed)
    encoder = ExampleEncoder(tokenizer, chat_template, text_field)
    dataset = to_dataset(encoder.encode_all(records))
    encoder.warn_of_losses(len(records))
    if len(dataset) == 0:
        raise ValueError(
            f"{source} has no supervised token in {len(records)} records: {encoder.first_loss or 'it is empty'}; "
            "give conversations with an assistant's turn, prompts with completions, or text"
        )
    return dataset


class ExampleEncoder:
    """Turns records into examples, and remembers which it could not use.

    Args:
        tokenizer: The target's.
        chat_template: File with a Jinja template, or None for the tokenizer's own.
        text_field: See `load_examples`.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None, text_field: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.text_field = text_field
        self.chat = ChatEncoder(tokenizer, chat_template)
        self.num_lost = 0
        self.first_loss: str | None = None

    def encode_all(self, records: Iterable[Record]) -> Iterator[Example]:
        """Examples with at least one supervised token."""
        for record in records:
            try:
                examples = [example for example in self.encode(record) if any(example.supervised)]
            except TemplateRefusedError as refusal:
                self._lose(f"{record.where}: {refusal}")
                continue
            if not examples:
                self._lose(f"{record.where}: nothing in it is supervised")
            yield from examples

    def encode(self, record: Record) -> list[Example]:
        """Examples of one record: one, or one per assistant's turn where the template wants it so.

        Raises:
            ValueError: The record has no known form.
            TemplateRefusedError: The chat template does not take its turns.
        """
        values = record.values
        kind = kind_of(record, self.text_field)
        if kind == "tokens":
            return [self._token_example(record)]
        if kind == "messages":
            messages = as_messages(record, self.text_field)
            complete = values.get("complete") is not False
            encoded = self.chat.encode(messages, values.get("tools"), record.where, complete=complete)
            return [Example(ids, flags) for ids, flags in encoded]
        if kind == "completion":
            return [self._completion_example(record)]
        if kind == "prompt":
            raise ValueError(
                f"{record.where} has a prompt and no completion; let the target write answers first: specdec distill"
            )
        return [self.text_example(values[self.text_field or "text"])]

    def text_example(self, text: str) -> Example:
        """A document: all of it is supervised, and so is the end-of-text token."""
        ids = self._ended(list(self.tokenizer(text).input_ids)) if text else []
        return Example(ids, [True] * len(ids))

    def warn_of_losses(self, num_records: int) -> None:
        """Says how many records were left out, if any."""
        if self.num_lost and self.num_lost < num_records:
            warnings.warn(
                f"{self.num_lost} of {num_records} records are left out; the first is {self.first_loss}", stacklevel=3
            )

    def _lose(self, reason: str) -> None:
        self.num_lost += 1
        self.first_loss = self.first_loss or reason

    def _ended(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def _completion_example(self, record: Record) -> Example:
        prompt, completion = (record.values[name] for name in ("prompt", "completion"))
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise ValueError(f"{record.where}: prompt and completion must be text; write turns as messages")
        start = prompt_ids(self.tokenizer, prompt)
        # Encoded as one text, a completion gets no second leading space from tokenizers that put one before a text.
        ids = list(self.tokenizer(prompt + completion).input_ids)
        if ids[: len(start)] != start:
            ids = start + list(self.tokenizer(completion, add_special_tokens=False).input_ids)
        if record.values.get("complete") is not False:
            ids = self._ended(ids)
        return Example(ids, [False] * len(start) + [True] * (len(ids) - len(start)))

    def _token_example(self, record: Record) -> Example:
        ids, flags = record.values["input_ids"], record.values.get("supervised")
        size = len(self.tokenizer)
        if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < size for i in ids):
            raise ValueError(
                f"{record.where}: input_ids must be token ids from 0 to {size - 1}; was it another model's?"
            )
        if flags is None:
            prompt = record.values.get("num_prompt_tokens") or 0
            if not 0 <= prompt <= len(ids):
                raise ValueError(f"{record.where}: num_prompt_tokens is {prompt}, and there are {len(ids)} input_ids")
            flags = [False] * prompt + [True] * (len(ids) - prompt)
        return Example(ids, [bool(flag) for flag in flags])


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a text to be continued: with the tokens that begin a text, without those that end it."""
    ids = list(tokenizer(prompt).input_ids)
    plain = list(tokenizer(prompt, add_special_tokens=False).input_ids)
    while ids and ids[-1] == tokenizer.eos_token_id and ids[-len(plain) :] != plain:
        ids.pop()
    return ids


def to_dataset(examples: Iterable[Example]) -> Dataset:
    """Examples as a table, five bytes a token."""
    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("supervised", pa.list_(pa.bool_()))])
    batches, buffer = [], []
    for example in examples:
        buffer.append({"input_ids": example.input_ids, "supervised": example.supervised})
        if len(buffer) == BUFFERED:
            batches.append(pa.RecordBatch.from_pylist(buffer, schema))
            buffer = []
    batches.append(pa.RecordBatch.from_pylist(buffer, schema))
    return Dataset(pa.Table.from_batches(batches, schema))


def flat_columns(
    examples: Dataset | Sequence[Example],
) -> tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.int64]]:
    """All examples end to end.

    Returns:
        Token ids `[tokens]`, flags `[tokens]`, and where each example begins and the last one ends, `[examples + 1]`.
    """
    dataset = examples if isinstance(examples, Dataset) else to_dataset(examples)
    if dataset._indices is not None:  # of `select` and `shuffle`
        dataset = dataset.flatten_indices(keep_in_memory=True)
    columns = [dataset.data.column(name).combine_chunks() for name in ("input_ids", "supervised")]
    ids, flags = (column.flatten().to_numpy(zero_copy_only=False) for column in columns)
    lengths = columns[0].value_lengths().to_numpy(zero_copy_only=False)
    return ids, flags, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def split(examples: Dataset, eval_fraction: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Sets examples apart for evaluation, by chance.

    Args:
        examples: What `load_examples` returned.
        eval_fraction: Share for evaluation; at least one example where it is not 0.
        seed: Of the choice.

    Returns:
        Examples for training and for evaluation, each in their old order.

    Raises:
        ValueError: The fraction is out of range, or nothing would be left for training.
    """
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction must be from 0 to below 1, got {eval_fraction}; 0.05 is usual")
    count = len(examples)
    num_eval = max(1, round(count * eval_fraction)) if eval_fraction else 0
    if num_eval >= count:
        raise ValueError(
            f"eval_fraction={eval_fraction} of {count} examples leaves none to train on; give more examples, or 0"
        )
    order = np.random.default_rng(seed).permutation(count)
    chosen, rest = np.sort(order[:num_eval]), np.sort(order[num_eval:])
    return examples.select(rest, keep_in_memory=True), examples.select(chosen, keep_in_memory=True)


def show_example(example: Example | dict[str, Any], tokenizer: Any, console: Console, max_tokens: int = 2000) -> None:
    """Prints an example; what is supervised is green and underlined, what is only read is dim.

    Args:
        example: Or a row of what `load_examples` returned.
        tokenizer: Decodes it.
        console: Where to print.
        max_tokens: Longer ones are cut.
    """
    if not isinstance(example, Example):
        example = Example(list(example["input_ids"]), [bool(flag) for flag in example["supervised"]])
    count, learned = len(example.input_ids), sum(example.supervised)
    console.print(Text.assemble(f"{count} tokens, {learned} of them ", ("supervised", "green underline"), ":"))
    shown = example.supervised[:max_tokens]
    text, start = Text(), 0
    for end in range(1, len(shown) + 1):
        if end == len(shown) or shown[end] != shown[start]:
            piece = tokenizer.decode(example.input_ids[start:end], clean_up_tokenization_spaces=False)
            text.append(piece, "green underline" if shown[start] else "dim")
            start = end
    if count > max_tokens:
        text.append(f" ... and {count - max_tokens} tokens more", "italic")
    console.print(text, soft_wrap=True)
