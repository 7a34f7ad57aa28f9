"""Training examples: token ids, and which of them are supervised."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from specdec.training.chat import ChatEncoder, TemplateRefusedError, as_messages
from specdec.training.records import Record, kind_of, read_records, sample

Item = TypeVar("Item")


@dataclass
class Example:
    """A text to learn from.

    Args:
        input_ids: Its tokens.
        supervised: For each token, whether it is a training target; prompts are not.
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
    `completion` the completion, of token ids with `num_prompt_tokens` (what `distill` writes) all after the prompt, of
    token ids with `supervised` what that says, and of `text` everything. `"complete": false` beside `messages` or
    `completion` says that the last answer was cut: the end token after it is not supervised.

    Args:
        source: A folder that `distill` wrote; a `.jsonl` or `.json` file of records; a text file, one document; a
            folder of such files; or a data set for `datasets`: a local one, `name` or `name:configuration`.
        tokenizer: The target's.
        split: Of a data set.
        text_field: Field or column with text or turns; None to look for the known names.
        limit: Read at most this many records, chosen by `seed`.
        seed: Of that choice.
        chat_template: File with a Jinja template, in place of the tokenizer's own.

    Returns:
        Columns `input_ids` and `supervised`, a list each per example.

    Raises:
        ValueError: The source cannot be read, a record has no known form, or no token is supervised.
    """
    records = sample(read_records(source, tokenizer, split), limit, seed)
    encoder = ExampleEncoder(tokenizer, ChatEncoder(tokenizer, chat_template), text_field)
    losses: list[str] = []
    dataset = to_dataset(encode_all(records, encoder.encode, losses))
    if len(dataset) == 0:
        raise ValueError(
            f"{source} has no supervised token in {len(records)} records: {[*losses, 'it is empty'][0]}; "
            "give conversations with an assistant's turn, prompts with completions, or text"
        )
    return dataset


def encode_all(
    records: Sequence[Record],
    encode: Callable[[Record], Iterable[Item]],
    losses: list[str],
    empty: str = "nothing in it is supervised",
) -> Iterator[Item]:
    """Items of all records; warns when only some records have any.

    Args:
        records: What to encode.
        encode: Items of one record.
        losses: Receives a reason for each record without items.
        empty: The reason, unless the chat template refuses the record.
    """
    found = False
    for record in records:
        try:
            items, reason = list(encode(record)), empty
        except TemplateRefusedError as refusal:
            items, reason = [], str(refusal)
        if not items:
            losses.append(f"{record.where}: {reason}")
        found = found or bool(items)
        yield from items
    if losses and found:
        warnings.warn(f"{len(losses)} of {len(records)} records are left out; the first is {losses[0]}", stacklevel=4)


@dataclass
class ExampleEncoder:
    """Turns records into examples.

    Args:
        tokenizer: The target's.
        chat: Renders conversations.
        text_field: See `load_examples`.
    """

    tokenizer: Any
    chat: ChatEncoder
    text_field: str | None = None

    def encode(self, record: Record) -> list[Example]:
        """Examples of one record that have a supervised token, one per assistant's turn if the template needs it.

        Raises:
            ValueError: The record has no known form.
            TemplateRefusedError: The chat template does not accept its turns.
        """
        kind, complete = kind_of(record, self.text_field), record.values.get("complete") is not False
        if kind == "prompt":
            raise ValueError(
                f"{record.where} has a prompt and no completion; let the target write answers first: specdec distill"
            )
        if kind == "messages":
            messages = as_messages(record, self.text_field)
            encoded = self.chat.encode(messages, record.values.get("tools"), record.where, complete=complete)
        elif kind == "tokens":
            encoded = [self._tokens(record)]
        elif kind == "completion":
            encoded = [self._completion(record, complete)]
        else:
            text = record.values[self.text_field or "text"]
            ids = self._ended(list(self.tokenizer(text).input_ids)) if text else []
            encoded = [(ids, [True] * len(ids))]
        return [Example(ids, flags) for ids, flags in encoded if any(flags)]

    def _ended(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def _completion(self, record: Record, complete: bool) -> tuple[list[int], list[bool]]:
        prompt, completion = (record.values[name] for name in ("prompt", "completion"))
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise ValueError(f"{record.where}: prompt and completion must be text; write turns as messages")
        start = prompt_ids(self.tokenizer, prompt)
        # Encoded as one text, a completion gets no second leading space from tokenizers that put one before a text.
        ids = list(self.tokenizer(prompt + completion).input_ids)
        if ids[: len(start)] != start:
            ids = start + list(self.tokenizer(completion, add_special_tokens=False).input_ids)
        return _after(len(start), self._ended(ids) if complete else ids)

    def _tokens(self, record: Record) -> tuple[list[int], list[bool]]:
        ids, flags = record.values["input_ids"], record.values.get("supervised")
        size = len(self.tokenizer)
        if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < size for i in ids):
            raise ValueError(
                f"{record.where}: input_ids must be token ids from 0 to {size - 1}; was it another model's?"
            )
        if flags is not None:
            return ids, [bool(flag) for flag in flags]
        prompt = record.values.get("num_prompt_tokens") or 0
        if not 0 <= prompt <= len(ids):
            raise ValueError(f"{record.where}: num_prompt_tokens is {prompt}, and there are {len(ids)} input_ids")
        return _after(prompt, ids)


def _after(prompt: int, ids: list[int]) -> tuple[list[int], list[bool]]:
    """Everything after the prompt is supervised."""
    return ids, [False] * prompt + [True] * (len(ids) - prompt)


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a text to be continued: with the tokens that begin a text, without those that end it."""
    ids = list(tokenizer(prompt).input_ids)
    plain = list(tokenizer(prompt, add_special_tokens=False).input_ids)
    while ids and ids[-1] == tokenizer.eos_token_id and ids[-len(plain) :] != plain:
        ids.pop()
    return ids


def to_dataset(examples: Iterable[Example]) -> Dataset:
    """Examples as a table, five bytes a token."""
    pairs = [(np.array(e.input_ids, np.int32), np.array(e.supervised, np.bool_)) for e in examples]
    columns = {
        "input_ids": pa.array([ids for ids, _ in pairs], pa.list_(pa.int32())),
        "supervised": pa.array([flags for _, flags in pairs], pa.list_(pa.bool_())),
    }
    return Dataset(pa.table(columns))


def flat_columns(
    examples: Dataset | Sequence[Example],
) -> tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.int64]]:
    """All examples end to end.

    Returns:
        Token ids `[tokens]`, flags `[tokens]`, and the bounds of the examples, `[examples + 1]`.
    """
    dataset = examples if isinstance(examples, Dataset) else to_dataset(examples)
    table = dataset.with_format("arrow")[:]
    columns = [table.column(name).combine_chunks() for name in ("input_ids", "supervised")]
    ids, flags = (column.flatten().to_numpy(zero_copy_only=False) for column in columns)
    lengths = columns[0].value_lengths().to_numpy(zero_copy_only=False)
    return ids, flags, np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def split(examples: Dataset, eval_fraction: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Splits off random examples for evaluation.

    Args:
        examples: What `load_examples` returned.
        eval_fraction: Share for evaluation; at least one example unless it is 0.
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
    """Prints an example; supervised tokens are green and underlined, others dim.

    Args:
        example: Or a row of what `load_examples` returned.
        tokenizer: Decodes it.
        console: Where to print.
        max_tokens: Longer ones are cut.
    """
    values = vars(example) if isinstance(example, Example) else example
    ids, supervised = list(values["input_ids"]), [bool(flag) for flag in values["supervised"]]
    console.print(
        Text.assemble(f"{len(ids)} tokens, {sum(supervised)} of them ", ("supervised", "green underline"), ":")
    )
    shown = supervised[:max_tokens]
    edges = [i for i in range(len(shown)) if i == 0 or shown[i] != shown[i - 1]]
    text = Text()
    for start, end in zip(edges, [*edges[1:], len(shown)], strict=True):
        piece = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
        text.append(piece, "green underline" if shown[start] else "dim")
    if len(ids) > max_tokens:
        text.append(f" ... and {len(ids) - max_tokens} tokens more", "italic")
    console.print(text, soft_wrap=True)
