"""Reads training data: files, folders and data sets, as records."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

DISTILLATION = "distillation.json"
"""Manifest of a folder that `distill` wrote."""
SHARDS = "shard-*.jsonl"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
RECORD_SUFFIXES = (".jsonl", ".json")
TABLE_SUFFIXES = (".parquet", ".csv", ".arrow")
FORMS = (
    '"messages" (role, content), "conversations" (from, value), "prompt" and "completion", "text", '
    'or "input_ids" and "num_prompt_tokens"'
)

Item = TypeVar("Item")


@dataclass(frozen=True)
class Record:
    """One record of a source.

    Args:
        where: Its place in the source, for messages.
        values: Its fields.
    """

    where: str
    values: dict[str, Any]


def kind_of(record: Record, text_field: str | None = None) -> str:
    """`"tokens"`, `"messages"`, `"completion"`, `"prompt"` or `"text"`.

    Raises:
        ValueError: The record has no known form.
    """
    values = record.values
    names = ", ".join(values) or "none"
    if text_field is not None:
        if isinstance(values.get(text_field), (str, list)):
            return "text" if isinstance(values[text_field], str) else "messages"
        raise ValueError(f"{record.where} has no text and no turns in {text_field!r}; its fields are {names}")
    has = {name for name, value in values.items() if value is not None}
    if "input_ids" in has:
        return "tokens"
    if has & {"messages", "conversations"}:
        return "messages"
    if "prompt" in has:
        return "completion" if "completion" in has else "prompt"
    if isinstance(values.get("text"), str):
        return "text"
    raise ValueError(
        f"{record.where} has the fields {names}; known are {FORMS}. "
        "Name the field with the text or the turns with --text-field"
    )


def read_records(source: str, tokenizer: Any, split: str = "train") -> Sequence[Record]:
    """All records of a source; see `load_examples`.

    Raises:
        ValueError: It cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return _read_folder(path, tokenizer, split)
    if source.startswith(("/", "./", "../", "~")) or path.suffix in (*RECORD_SUFFIXES, *TEXT_SUFFIXES):
        raise ValueError(f"{source} does not exist; check the path")
    return _Table(source, _load_dataset(source, split))


def sample(items: Sequence[Item], limit: int | None, seed: int) -> Sequence[Item]:
    """At most `limit` random items, in their old order."""
    if limit is None or limit >= len(items):
        return items
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}; leave it out for all records")
    chosen = np.sort(np.random.default_rng(seed).choice(len(items), limit, replace=False))
    return [items[i] for i in chosen.tolist()]


class _Table(Sequence[Record]):
    """Rows of a data set, read when they are needed."""

    def __init__(self, name: str, dataset: Any) -> None:
        self.name, self.dataset = name, dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return Record(f"row {index} of {self.name}", self.dataset[index])

    def __iter__(self) -> Iterator[Record]:
        for index, row in enumerate(self.dataset):
            yield Record(f"row {index} of {self.name}", row)


def _read_file(path: Path) -> Sequence[Record]:
    if path.suffix in TABLE_SUFFIXES:
        from datasets import load_dataset

        return _Table(str(path), load_dataset(path.suffix[1:], data_files=str(path), split="train"))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text in UTF-8 ({error}); check the file") from None
    if path.suffix == ".jsonl":
        # Not splitlines(): JSON may hold the other line separators of Unicode as they are.
        lines = [(f"line {number} of {path}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        return [
            _record(where, _parse(line, f"{where} is not JSON", "it may be cut off: correct or remove it"))
            for where, line in lines
        ]
    if path.suffix == ".json":
        values = _parse(text, f"{path} is not JSON", "with one object a line, name it .jsonl")
        if not isinstance(values, list):
            raise ValueError(f"{path} holds {type(values).__name__}, not a list of records; write [{{...}}, ...]")
        return [_record(f"record {i} of {path}", value) for i, value in enumerate(values)]
    return [Record(str(path), {"text": text})]


def _parse(text: str, problem: str, remedy: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{problem} ({error}); {remedy}") from None


def _record(where: str, values: Any) -> Record:
    if not isinstance(values, dict):
        raise ValueError(f"{where} is not a JSON object; known fields are {FORMS}")
    return Record(where, values)


def _read_folder(folder: Path, tokenizer: Any, split: str) -> Sequence[Record]:
    if (folder / DISTILLATION).is_file():
        return _read_distilled(folder, tokenizer)
    if any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
        return _Table(str(folder), _saved_dataset(folder, split))
    visible = [p for p in sorted(folder.rglob("*")) if not any(part[0] == "." for part in p.relative_to(folder).parts)]
    for suffixes in (RECORD_SUFFIXES, TEXT_SUFFIXES):
        files = [path for path in visible if path.suffix in suffixes and path.is_file()]
        if files:
            return [record for path in files for record in _read_file(path)]
    if any(path.suffix in TABLE_SUFFIXES for path in visible):
        return _Table(str(folder), _load_dataset(str(folder), split))
    known = ", ".join((*RECORD_SUFFIXES, *TEXT_SUFFIXES, *TABLE_SUFFIXES))
    raise ValueError(f"{folder} holds no data: no file ends in {known}; name a folder with such files")


def _saved_dataset(folder: Path, split: str) -> Any:
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(folder))
    if not isinstance(dataset, DatasetDict):
        return dataset
    if split not in dataset:
        raise ValueError(f"split={split!r} is not in {folder}; it has {', '.join(dataset)}")
    return dataset[split]


def _load_dataset(source: str, split: str) -> Any:
    from datasets import load_dataset

    name, _, configuration = source.partition(":")
    try:
        return load_dataset(name, configuration or None, split=split)
    except Exception as error:  # of the network, the hub, the data set's own files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{source} is neither a file or folder here nor a data set that can be loaded ({reason}); "
            "check name, configuration (name:configuration) and split"
        ) from error


def _read_distilled(folder: Path, tokenizer: Any) -> list[Record]:
    from specdec.drafters.ngrams.documents import tokenizer_fingerprint

    manifest = json.loads((folder / DISTILLATION).read_text(encoding="utf-8"))
    if manifest["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise ValueError(
            f"{folder} holds answers of {manifest['model']}, in token ids of another tokenizer; "
            "distil with the model that is to be trained"
        )
    shards = sorted(folder.glob(SHARDS))
    if len(shards) < manifest["num_batches"]:
        warnings.warn(
            f"{folder} is not complete: {len(shards)} of {manifest['num_batches']} batches; "
            "run specdec distill again to continue",
            stacklevel=4,
        )
    return [record for shard in shards for record in _read_file(shard)]
