"""What the lookahead drafter saves, and what it refuses to load."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specdec.drafters.lookahead import LookaheadDrafter
from specdec.drafters.ngrams.ngram_store import HEADER
from tests.drafters.lookahead_calls import WordTokenizer, call, context, paths, propose, proposed


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    drafter = LookaheadDrafter()
    drafter.add("a b c d", tokenizer=WordTokenizer("a b c d"))
    drafter.add([10, 11, 12], scope="shared")
    drafter.save(tmp_path / "index")
    return tmp_path / "index"


def test_save_and_load(saved: Path) -> None:
    drafter = LookaheadDrafter().load(saved, tokenizer=WordTokenizer("a b c d"))
    assert proposed(drafter, [0]) == [[1], [1, 2], [1, 2, 3]]
    assert proposed(drafter, [10]) == [[11], [11, 12]]
    drafter.add([20, 21])  # a loaded index grows
    call(drafter, [5], [30, 31])
    assert proposed(drafter, [20]) == [[21]] and proposed(drafter, [30]) == [[31]]
    drafter.save(saved)
    again = LookaheadDrafter().load(saved)
    assert [proposed(again, [t])[0] for t in (0, 10, 20, 30)] == [[1], [11], [21], [31]]
    assert len(list(saved.iterdir())) == 7  # the first save's arrays are gone
    with pytest.raises(ValueError, match="one drafter per tokenizer"):
        again.add("a", tokenizer=WordTokenizer("b a"))


def test_loading_does_not_change_what_was_saved(saved: Path) -> None:
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    drafter = LookaheadDrafter(corpus_bytes=4096).load(saved)
    for start in range(0, 1000, 20):
        drafter.add(list(range(start, start + 20)))
    assert drafter.stats()["corpus"]["bytes"] <= 4096 + drafter._indexes["corpus"].links[2].nbytes
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


def test_an_empty_drafter_is_saved_and_replaces_what_was_there(saved: Path, tmp_path: Path) -> None:
    LookaheadDrafter().save(tmp_path / "empty")
    drafter = LookaheadDrafter().load(saved)
    drafter.load(tmp_path / "empty")
    assert proposed(drafter, [0]) == [] and drafter.stats()["shared"]["tokens"] == 0
    LookaheadDrafter().save(saved)
    assert [file.name for file in saved.iterdir()] == [HEADER]


def test_foreign_tokenizer_and_orders(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would mean different text"):
        LookaheadDrafter().load(saved, tokenizer=WordTokenizer("b a c d"))
    with pytest.raises(ValueError, match=r"orders=\(1, 2, 4, 8\)"):
        LookaheadDrafter(orders=(1, 3)).load(saved)
    nameless = LookaheadDrafter()
    nameless.add([1, 2])
    nameless.save(tmp_path / "nameless")
    with pytest.raises(ValueError, match="saved without a tokenizer"):
        LookaheadDrafter().load(tmp_path / "nameless", tokenizer=WordTokenizer("a"))
    nameless.save(tmp_path / "nameless", tokenizer=WordTokenizer("a"))
    LookaheadDrafter().load(tmp_path / "nameless", tokenizer=WordTokenizer("a"))


def edit_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        header = json.loads((folder / HEADER).read_text())
        change(header)
        (folder / HEADER).write_text(json.dumps(header))

    return edit


def array_file(folder: Path, name: str = "corpus.text") -> Path:
    return next(folder.glob(f"{name}.*.npy"))


def flip_byte(folder: Path) -> None:
    data = bytearray(array_file(folder).read_bytes())
    data[-6] ^= 1
    array_file(folder).write_bytes(bytes(data))


def pickled_array(folder: Path) -> None:
    """An object array with a right size and digest: only its pickle would tell."""
    file = array_file(folder)
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    data = file.read_bytes()
    edit_header(
        lambda header: header["scopes"]["corpus"]["text"].update(
            bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
        )
    )(folder)


def swapped_arrays(folder: Path) -> None:
    """Text of one scope, links of the other."""

    def swap(header: dict[str, Any]) -> None:
        shared = array_file(folder, "shared.text")
        other = folder / shared.name.replace("shared", "corpus")
        shutil.copy(shared, other)
        header["scopes"]["corpus"]["text"] = header["scopes"]["shared"]["text"] | {"file": other.name}

    edit_header(swap)(folder)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, "holds no index"),
        (lambda folder: (folder / HEADER).unlink(), "is missing"),
        (lambda folder: (folder / HEADER).write_text('{"format": "spec'), "is not JSON"),
        (lambda folder: (folder / HEADER).write_bytes(b"\xff\xfe\x00"), "is not JSON"),
        (lambda folder: (folder / HEADER).write_text("[]"), "not the header of an index"),
        (edit_header(lambda header: header.update(format="other")), "not the header of an index"),
        (edit_header(lambda header: header.update(version=99)), "version 99"),
        (edit_header(lambda header: header.pop("orders")), "lacks entries"),
        (edit_header(lambda header: header["scopes"].update(secrets={})), "lacks entries"),
        (edit_header(lambda header: header["scopes"]["corpus"].pop("prev")), "lacks entries"),
        (edit_header(lambda header: header["scopes"]["corpus"]["text"].pop("sha256")), "lacks entries"),
        (
            edit_header(lambda header: header["scopes"]["corpus"]["text"].update(file="../../etc/passwd")),
            "names a foreign file",
        ),
        (lambda folder: array_file(folder).unlink(), "is missing"),
        (lambda folder: array_file(folder).write_bytes(array_file(folder).read_bytes()[:-4]), "truncated"),
        (lambda folder: array_file(folder).write_bytes(b""), "truncated"),
        (flip_byte, "SHA-256 differs"),
        (pickled_array, "not a .npy array"),
        (swapped_arrays, "do not belong together"),
    ],
)
def test_damaged_saves(saved: Path, damage: Callable[[Path], object], words: str) -> None:
    damage(saved)
    drafter = LookaheadDrafter()
    drafter.add([1, 2, 3])
    with pytest.raises(ValueError, match=words):
        drafter.load(saved)
    assert proposed(drafter, [1]) == [[2], [2, 3]]  # what was there stays


def test_saving_to_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        LookaheadDrafter().save(tmp_path / "file")


def test_an_interrupted_save_leaves_the_old_one(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = LookaheadDrafter().load(saved)
    drafter.add([50, 51])

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", fail)
        with pytest.raises(OSError, match="disk full"):
            drafter.save(saved)
    old = LookaheadDrafter().load(saved)
    assert proposed(old, [0])[0] == [1] and proposed(old, [50]) == []
    drafter.save(saved)
    assert proposed(LookaheadDrafter().load(saved), [50]) == [[51]]
    assert not list(saved.glob("*.tmp"))


def test_a_context_is_not_kept_or_changed() -> None:
    drafter = LookaheadDrafter()
    asked = context([1, 2, 3, 1], prompts=[3])
    before = copy.deepcopy(asked)
    session = drafter.start(asked)
    session.propose(asked, 16)
    session.finish(asked)
    assert [s.tolist() for s in asked.sequences] == [s.tolist() for s in before.sequences]
    asked.sequences[0][:] = 9
    assert paths(propose(drafter, context([1, 2, 3, 1]), 16))[0] == [2]
