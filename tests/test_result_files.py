"""Committed result files hold summaries, and no samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specdec.common.provenance import write_json

FILES = sorted((Path(__file__).resolve().parents[1] / "benchmarks" / "results").glob("*.json"))
MOST_LINES, MOST_NUMBERS = 700, 64


def longest_list_of_numbers(value: Any) -> int:
    if isinstance(value, dict):
        return max(map(longest_list_of_numbers, value.values()), default=0)
    if not isinstance(value, list):
        return 0
    numbers = sum(isinstance(entry, int | float) for entry in value)
    return max([numbers, *map(longest_list_of_numbers, value)])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_result_file_is_a_summary(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    assert longest_list_of_numbers(json.loads(text)) <= MOST_NUMBERS


def test_raw_samples_are_noticed() -> None:
    assert longest_list_of_numbers({"a": [{"seconds": [0.5] * 65}]}) == 65


def test_written_results_read_back_an_entry_a_line(tmp_path: Path) -> None:
    results = {"rows": [{"name": str(i), "text": "x" * 80} for i in range(4)], "empty": [], "settings": {"a": None}}
    write_json(tmp_path / "a" / "b.json", results)
    text = (tmp_path / "a" / "b.json").read_text()
    assert json.loads(text) == results
    assert len(text.splitlines()) == 2 + 2 + 4 + 2
