"""The corpus and the tokenizer of the embedded models: the standard library of the running Python."""

from __future__ import annotations

import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

EOS, PAD = "<|endoftext|>", "<|pad|>"
VOCAB_SIZE = 4096
MAX_LENGTH = 2048

# Generated tables, data and files that no one writes by hand.
DROPPED_FOLDERS = ("site-packages", "encodings", "pydoc_data", "lib2to3/tests/data", "__pycache__", "turtledemo")
DROPPED_NAMES = re.compile(
    r"^(_sysconfigdata.*|_casefix|test_unicode_identifiers|test_codecmaps.*|.*_codecs?_?data.*|test_unicodedata)\.py$"
)
SMALLEST_FILE = 500
# Above this share of digits (or of \x.. escapes) a file is a table, not code.
LARGEST_TABLE_SHARE = 0.15
HELD_OUT_ONE_IN = 25
HELD_OUT_SIZES = range(3_000, 60_000)

# A newline run and the indentation after it are one piece, so "\n        " can become one token;
# a word takes one leading sign or space along (" return", ".append", "_name").
PIECES = r"(?:\r?\n)+[ \t]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"
# The pieces of GPT-2: a word takes a space along, never a sign; digits are not cut.
OTHER_PIECES = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
OTHER_DRAFT = "other-draft"
OTHER: dict[str, Any] = {"vocab_size": 2000, "pieces": OTHER_PIECES}
"""Settings of a tokenizer that cuts text differently, for a draft model that does not share the target's."""


@dataclass(frozen=True)
class Document:
    """One source file: its path relative to the standard library, and its text."""

    path: str
    text: str


def _is_table(text: str) -> bool:
    digits = sum(map(str.isdigit, text)) + 4 * len(re.findall(r"\\[xuU][0-9a-fA-F]", text))
    return digits > LARGEST_TABLE_SHARE * len(text)


def collect(root: Path | None = None) -> list[Document]:
    """Reads every hand-written source file under `root` (the running Python's standard library)."""
    root = root or Path(sysconfig.get_path("stdlib"))
    documents, seen = [], set()
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if any(f"/{folder}/" in f"/{path}" for folder in DROPPED_FOLDERS) or DROPPED_NAMES.match(file.name):
            continue
        try:
            text = file.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) < SMALLEST_FILE or digest in seen or _is_table(text):
            continue
        seen.add(digest)
        documents.append(Document(path, text))
    return documents


def is_held_out(document: Document) -> bool:
    """Whether a file is kept from training: decided by its path alone, so that it never moves."""
    bucket = int.from_bytes(hashlib.sha256(document.path.encode()).digest()[:8], "big")
    return len(document.text) in HELD_OUT_SIZES and bucket % HELD_OUT_ONE_IN == 0


def write_jsonl(documents: list[Document], path: Path) -> None:
    with path.open("w", encoding="utf-8") as out:
        for document in documents:
            out.write(json.dumps({"path": document.path, "text": document.text}) + "\n")


def read_jsonl(path: Path) -> list[Document]:
    with path.open(encoding="utf-8") as lines:
        return [Document(**json.loads(line)) for line in lines]


def train_tokenizer(
    texts: Iterator[str], folder: Path, vocab_size: int = VOCAB_SIZE, pieces: str = PIECES
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer and saves it as a transformers tokenizer directory."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def encode(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Encodes documents into one stream of token ids, an end-of-text token after each.

    Raises:
        ValueError: a document does not survive the round trip through the tokenizer.
    """
    stream: list[int] = []
    for document in documents:
        ids = tokenizer.backend_tokenizer.encode(document.text).ids
        if tokenizer.decode(ids) != document.text:
            raise ValueError(f"the tokenizer changes {document.path}; its decoder must undo its pre-tokenizer")
        stream += [*ids, tokenizer.eos_token_id]
    return np.array(stream, dtype=np.uint16)


def tokenizer_folder(which: str, work: Path) -> Path:
    return work / ("other-tokenizer" if which == OTHER_DRAFT else "tokenizer")


def stream_file(name: str, which: str, work: Path) -> Path:
    """Where the encoded training or held-out files of a model are."""
    return work / (f"{name}-other.npy" if which == OTHER_DRAFT else f"{name}.npy")
