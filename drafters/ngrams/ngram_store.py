"""Indexes on disk: `.npy` arrays, memory-mapped when loaded, and one JSON header; never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specdec.drafters.ngrams.ngram_index import SEPARATOR, NgramIndex

HEADER = "ngram_index.json"
FORMAT = "specdec-ngram-index"
VERSION = 1

_ARRAYS = ("text", "prev", "head")
_FILE_NAME = re.compile(r"(shared|corpus)\.(text|prev|head)\.[0-9a-f]{16}\.npy")


def save_indexes(path: str | os.PathLike[str], indexes: dict[str, NgramIndex], tokenizer: str | None) -> None:
    """Writes the indexes that hold anything. The header is replaced last, so a reader sees the old save or the new one.

    Args:
        path: Folder, made when it is missing.
        indexes: By scope.
        tokenizer: Fingerprint of the tokenizer the ids belong to, or None when it is not known.

    Raises:
        ValueError: If `path` is a file.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"path: an index is saved to a folder, and {folder} is a file; give another path")
    folder.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {"format": FORMAT, "version": VERSION, "tokenizer": tokenizer, "scopes": {}}
    for scope, index in indexes.items():
        if index.num_tokens:
            text, prev, head, orders = index.links
            used = {"text": text[: index.length + 1], "prev": prev[: index.length], "head": head}
            header["scopes"][scope] = {name: _write_array(folder, f"{scope}.{name}", a) for name, a in used.items()}
            header["orders"] = orders.tolist()
    with _new_file(folder) as file:
        file.write_text(json.dumps(header, indent=1), encoding="utf-8")
        os.replace(file, folder / HEADER)
    current = {entry["file"] for arrays in header["scopes"].values() for entry in arrays.values()}
    for old in folder.iterdir():
        if _FILE_NAME.fullmatch(old.name) and old.name not in current:
            old.unlink(missing_ok=True)


def load_indexes(
    path: str | os.PathLike[str], orders: tuple[int, ...], tokenizer: str | None
) -> tuple[dict[str, NgramIndex], str | None]:
    """Reads what `save_indexes` wrote. The arrays stay on disk until they are read, and are never written back.

    Args:
        path: The folder.
        orders: Orders of the drafter, which must be those of the index.
        tokenizer: Fingerprint the index must have, or None to take any.

    Returns:
        The indexes by scope, and the fingerprint of the saved one's tokenizer.

    Raises:
        ValueError: If anything about it is not as it was saved; the message says what.
    """
    folder = Path(path)
    header = _read_header(folder)
    saved = header["tokenizer"]
    if tokenizer is not None and saved != tokenizer:
        known = "was saved without a tokenizer" if saved is None else f"belongs to a tokenizer {saved[:12]}..."
        raise ValueError(
            f"path: the index in {folder} {known}, the given one is {tokenizer[:12]}...: token ids would mean "
            "different text. Build an index with this tokenizer, or leave `tokenizer` out if you know better"
        )
    if header["scopes"] and tuple(header["orders"]) != orders:
        raise ValueError(
            f"path: the index in {folder} has orders {tuple(header['orders'])}, the drafter {orders}; make the drafter "
            f"with orders={tuple(header['orders'])} or build the index again"
        )
    indexes = {}
    for scope, entries in header["scopes"].items():
        text, prev, head = (_read_array(folder, scope, name, entries[name]) for name in _ARRAYS)
        slots = head.shape[1] if head.ndim == 2 else 0
        is_whole = (
            text.ndim == 1
            and len(text) >= 2
            and prev.shape == (len(text) - 1, len(orders))
            and head.shape == (len(orders), slots)
            and slots.bit_count() == 1
            # Compiled loops run on these arrays unchecked: the separators at both ends are what stops them.
            and text[0] == text[-1] == SEPARATOR
        )
        if not is_whole:
            raise _damaged(folder / HEADER, f"describes arrays of {scope} that do not belong together")
        indexes[scope] = NgramIndex.from_links((text, prev, head, np.array(orders, np.int64)))
    return indexes, saved


@contextmanager
def _new_file(folder: Path) -> Iterator[Path]:
    """A temporary file, removed unless it has been given another name by then."""
    descriptor, name = tempfile.mkstemp(".tmp", dir=folder)
    os.close(descriptor)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _write_array(folder: Path, stem: str, array: NDArray[Any]) -> dict[str, Any]:
    with _new_file(folder) as file:
        with file.open("wb") as stream:
            np.save(stream, array, allow_pickle=False)
            os.fsync(stream.fileno())
        entry = {"bytes": file.stat().st_size, "dtype": str(array.dtype), "shape": list(array.shape)}
        digest = _digest(file)
        name = f"{stem}.{digest[:16]}.npy"
        os.replace(file, folder / name)
    return {"file": name, **entry, "sha256": digest}


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _damaged(file: Path, what: str) -> ValueError:
    return ValueError(f"path: {file} {what}; copy the index again, or build it with add(...) and save(...)")


def _read_header(folder: Path) -> dict[str, Any]:
    file = folder / HEADER
    if not file.is_file():
        raise ValueError(f"path: {folder} holds no index ({HEADER} is missing); give a folder that save(...) wrote")
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(file, f"is not JSON ({error})") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"path: {file} is not the header of an index; give a folder that save(...) wrote")
    if header.get("version") != VERSION:
        raise ValueError(
            f"path: the index in {folder} has version {header.get('version')!r}, this release reads {VERSION}; "
            "build it again with this release, or update specdec"
        )
    scopes = header.get("scopes")
    if (
        not isinstance(scopes, dict)
        or not set(scopes) <= {"shared", "corpus"}
        or not all(isinstance(entries, dict) and set(entries) == set(_ARRAYS) for entries in scopes.values())
        or not isinstance(header.get("tokenizer"), str | None)
        or not isinstance(header.get("orders", []), list)
        or (scopes and "orders" not in header)
    ):
        raise _damaged(file, "lacks entries of the format or holds unknown ones")
    return header


def _read_array(folder: Path, scope: str, name: str, entry: Any) -> NDArray[np.int32]:
    if not isinstance(entry, dict) or not {"file", "bytes", "dtype", "shape", "sha256"} <= set(entry):
        raise _damaged(folder / HEADER, f"lacks entries for {scope}.{name}")
    # The name is taken apart so that a header cannot point outside the folder.
    match = _FILE_NAME.fullmatch(str(entry["file"]))
    if match is None or match.groups() != (scope, name):
        raise _damaged(folder / HEADER, f"names a foreign file for {scope}.{name}: {entry['file']!r}")
    file = folder / match.group(0)
    if not file.is_file():
        raise _damaged(file, "is missing")
    if file.stat().st_size != entry["bytes"]:
        raise _damaged(file, f"has {file.stat().st_size} bytes where {entry['bytes']} were saved: it is truncated")
    if _digest(file) != entry["sha256"]:
        raise _damaged(file, "has other content than was saved (SHA-256 differs)")
    try:
        array = np.load(file, mmap_mode="c", allow_pickle=False).view(np.ndarray)
    except (ValueError, OSError, EOFError) as error:
        raise _damaged(file, f"is not a .npy array ({error})") from None
    if array.dtype != np.int32 or not array.flags.c_contiguous or list(array.shape) != entry["shape"]:
        raise _damaged(file, f"is {array.dtype} {list(array.shape)}, not the array that was saved")
    return array
