"""What is stored beside heads about how good they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specdec.heads import HeadCalibration

ACCURACIES = [[0.6, 0.2, 0.1], [0.4, 0.1]]


def test_round_trip(tmp_path: Path) -> None:
    calibration = HeadCalibration(ACCURACIES, [[0], [1], [0, 0], [0, 1]], 4096, {1: 0.01, 8: 0.0125}, "cpu, 2 cores")
    calibration.save(tmp_path / "new" / "folder")
    assert HeadCalibration.load(tmp_path / "new" / "folder") == calibration


def test_only_accuracies_are_needed(tmp_path: Path) -> None:
    calibration = HeadCalibration(ACCURACIES)
    calibration.save(tmp_path)
    assert HeadCalibration.load(tmp_path) == calibration
    assert (calibration.tree, calibration.num_heads) == (None, 2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"accuracies": []}, "one rank at least"),
        ({"accuracies": [[0.5], []]}, "one rank at least"),
        ({"accuracies": [[0.5], [1.2]]}, "accuracies of head 2 must lie between 0 and 1"),
        ({"accuracies": [[0.5], [float("nan")]]}, "accuracies of head 2"),
        ({"accuracies": [[0.5, 0.6]]}, "sum to at most 1"),
        ({"num_tokens": -1}, "num_tokens=-1"),
        ({"step_seconds": {0: 0.1}}, r"step_seconds\[0\]"),
        ({"step_seconds": {4: 0.0}}, r"step_seconds\[4\]=0.0"),
        ({"tree": [[]]}, r"path \[\] is empty"),
        ({"tree": [[0], [0]]}, r"path \[0\] is empty or there twice"),
        ({"tree": [[0], [0, 0], [0, 0, 0]]}, r"path \[0, 0, 0\] is longer than the number of heads, 2"),
        ({"tree": [[0], [0, 2]]}, r"rank 2 in path \[0, 2\] is not one of the 2 measured ranks of head 2"),
        ({"tree": [[-1]]}, "rank -1"),
        ({"tree": [[1, 0], [1]]}, r"path \[1, 0\] comes without, or before, the path \[1\]"),
    ],
)
def test_values_that_can_not_be(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=named):
        HeadCalibration(**({"accuracies": ACCURACIES} | changes))
    (tmp_path / "medusa_tree.json").write_text(json.dumps({"accuracies": ACCURACIES} | changes))
    with pytest.raises(ValueError, match=rf"medusa_tree\.json.*{named}"):
        HeadCalibration.load(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        "{}",
        '{"accuracies": 5}',
        '{"accuracies": [[0.5]], "depth": 2}',
        '{"accuracies": [[0.5]], "tree": [[0.5]]}',
        '{"accuracies": [[0.5]], "tree": 3}',
        '{"accuracies": [[0.5]], "step_seconds": [1]}',
        '{"accuracies": [[0.5]], "num_tokens": "many"}',
    ],
)
def test_files_of_another_kind(text: str, tmp_path: Path) -> None:
    (tmp_path / "medusa_tree.json").write_text(text)
    with pytest.raises(ValueError, match=r"medusa_tree\.json is not a calibration of heads.*measure it again"):
        HeadCalibration.load(tmp_path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"medusa_tree\.json"):
        HeadCalibration.load(tmp_path)


def test_a_change_for_the_worse_is_not_saved(tmp_path: Path) -> None:
    calibration = HeadCalibration(ACCURACIES, [[0]])
    calibration.tree = [[0], [0, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match="longer than the number of heads"):
        calibration.save(tmp_path)
    assert not list(tmp_path.iterdir())
