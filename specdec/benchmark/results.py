"""What a benchmark has found, and its files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.benchmark.runs import Measurement
from specdec.benchmark.settings import BenchmarkSettings, Part
from specdec.common.provenance import write_json

if TYPE_CHECKING:
    from rich.console import Group

RESULTS_FILE, TEXT_FILE = "results.json", "results.md"


@dataclass
class PartResults:
    """What was measured at one setting.

    Args:
        measurement: Of all methods.
        part: The setting.
        num_prompts: Prompts that were measured.
    """

    measurement: Measurement
    part: Part
    num_prompts: int

    def to_dict(self) -> dict[str, Any]:
        """Medians and quartiles of each method, ready for JSON."""
        shape = {"temperature": self.part.temperature, "batch": self.part.batch_size, "num_prompts": self.num_prompts}
        return shape | self.measurement.to_dict()


@dataclass
class BenchmarkResults:
    """Results of `run_benchmark`; shown by rich as tables.

    Args:
        circumstances: Time, command, hardware, versions, commit.
        models: Target and draft model.
        settings: What was asked for.
        drafters: Settings of each contender, by name.
        parts: By name, in the order in which they were measured.
    """

    circumstances: dict[str, Any]
    models: dict[str, Any]
    settings: BenchmarkSettings
    drafters: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, PartResults] = field(default_factory=dict)

    @property
    def is_interrupted(self) -> bool:
        """Ctrl-C ended the run; what had been measured is here."""
        return any(part.measurement.is_interrupted for part in self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Medians and quartiles of each method, settings, models, versions; ready for JSON."""
        parts = {name: part.to_dict() for name, part in self.parts.items()}
        sizes = list(self.settings.batch_sizes)
        return {
            **self.circumstances,
            "models": self.models,
            "drafters": self.drafters,
            "benchmark": asdict(self.settings),
            "batch": sizes[0] if len(sizes) == 1 else sizes,
            "num_prompts": next(iter(parts.values()))["num_prompts"],
            "repeats": self.settings.repeats,
            "parts": parts,
        }

    def write_json(self, file: str | Path) -> None:
        """Writes `to_dict()`."""
        write_json(Path(file), self.to_dict())

    def save(self, folder: str | Path) -> list[Path]:
        """Writes `results.json`, `results.md` and, where matplotlib is installed, the figures.

        Returns:
            The files.
        """
        from specdec.benchmark.tables import markdown

        folder = Path(folder)
        self.write_json(folder / RESULTS_FILE)
        pictures = []
        try:
            from specdec.benchmark.plots import figures

            for name, figure in figures(self).items():
                pictures.append(folder / f"{name}.png")
                figure.savefig(pictures[-1], dpi=120)
        except ModuleNotFoundError as error:
            if error.name != "matplotlib":
                raise
        (folder / TEXT_FILE).write_text(markdown(self, pictures), encoding="utf-8")
        return [folder / RESULTS_FILE, folder / TEXT_FILE, *pictures]

    def __rich__(self) -> Group:
        from rich.console import Group

        from specdec.benchmark.tables import conditions, text_tables

        return Group(*(table.to_rich() for table in text_tables(self)), conditions(self))


def load_results(path: str | Path) -> dict[str, Any]:
    """Reads the results of a run.

    Args:
        path: A file that `write_json` wrote, or a folder that `save` wrote to.

    Raises:
        ValueError: It is not such a file.
    """
    file = Path(path)
    file = file / RESULTS_FILE if file.is_dir() else file
    if not file.is_file():
        raise ValueError(f"{file} is not a file; name the JSON file of a benchmark, or the folder given to --output")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        for part in found["parts"].values():
            for row in part["methods"]:
                _ = part["reference"], row["method"], row["speedup"], row["speedup_spread"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} does not hold results of `specdec bench` ({type(error).__name__}: {error})"
        ) from error
    return dict(found)
