"""The folder of a benchmark: samples are written as they come, so that an interrupted run can go on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specdec.benchmark.runs import Measurement, Sample, Settings
from specdec.common.provenance import write_json

RUN_FILE, ROUNDS_FILE = "run.json", "rounds.jsonl"
MAX_DIFFERENCES = 4


class RunRecord:
    """What a run has measured so far.

    Args:
        folder: Made if it is missing; None to keep nothing.
        identity: All that the figures depend on.
        circumstances: When and how the run was started; kept from the first start.

    Raises:
        ValueError: The folder holds another run.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any], circumstances: Mapping[str, Any]) -> None:
        self.folder = folder
        self.circumstances = dict(circumstances)
        self._rounds: list[dict[str, Any]] = []
        if folder is None:
            return
        file = folder / RUN_FILE
        mine = json.loads(json.dumps(identity))
        if not file.exists():
            if (folder / ROUNDS_FILE).exists():
                raise ValueError(f"{folder} holds samples but no {RUN_FILE}; use another folder, or delete this one")
            write_json(file, {"identity": mine, "circumstances": self.circumstances})
            return
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            theirs, self.circumstances = known["identity"], known["circumstances"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not that of a benchmark ({error}); use another folder") from error
        if different := _differences(theirs, mine):
            shown = "; ".join(different[:MAX_DIFFERENCES]) + (" ..." if len(different) > MAX_DIFFERENCES else "")
            raise ValueError(
                f"{folder} holds a run that this one cannot go on with: {shown}. Use another folder, or delete this one"
            )
        self._rounds = self._read()

    def _read(self) -> list[dict[str, Any]]:
        """Whole rounds; a last line that was cut off is removed, and its round run again."""
        assert self.folder is not None
        file = self.folder / ROUNDS_FILE
        if not file.exists():
            return []
        data = file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            file.write_bytes(whole)
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}); use another folder, or delete this one") from error

    def earlier(self, part: str, reference: str, settings: Settings) -> Measurement:
        """What an earlier start has measured of a part."""
        found = Measurement(reference, settings)
        for line in self._rounds:
            if line["part"] == part:
                found.samples += [Sample(**sample) for sample in line.get("samples", [])]
                found.failed |= line.get("failed", {})
        return found

    def add_round(self, part: str, samples: Sequence[Sample]) -> None:
        """Keeps the samples of all methods on one prompt."""
        self._append({"part": part, "samples": [asdict(sample) for sample in samples]})

    def add_failure(self, part: str, method: str, reason: str) -> None:
        """Keeps that a method is left out."""
        self._append({"part": part, "failed": {method: reason}})

    def _append(self, line: Mapping[str, Any]) -> None:
        if self.folder is not None:
            with (self.folder / ROUNDS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _differences(theirs: Any, mine: Any, name: str = "") -> list[str]:
    """Values that differ, each with its name."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        keys = dict.fromkeys([*theirs, *mine])
        return [d for key in keys for d in _differences(theirs.get(key), mine.get(key), f"{name}.{key}".strip("."))]
    if theirs == mine:
        return []
    return [f"{name} ({_short(theirs)} there, {_short(mine)} here)"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
