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

    def to_dict(self, samples: bool = False) -> dict[str, Any]:
        """Ready for JSON.

        Args:
            samples: Whether to add every sample; outputs that are those of the reference are not repeated.
        """
        found = self.measurement.to_dict()
        if samples:
            found["samples"] = [asdict(sample) for sample in self.measurement.samples]
            for sample in found["samples"]:
                is_same = sample["identical_rows"] and all(sample["identical_rows"])
                if is_same and sample["method"] != found["reference"]:
                    del sample["outputs"]
        return {
            "temperature": self.part.temperature,
            "batch": self.part.batch_size,
            "num_prompts": self.num_prompts,
            **found,
        }


@dataclass
class BenchmarkResults:
    """Results of `run_benchmark`; shown by rich as tables.

    Args:
        circumstances: Time, command, hardware, versions, commit.
        models: Target and draft model.
        settings: What was asked for.
        parts: By name, in the order in which they were measured.
    """

    circumstances: dict[str, Any]
    models: dict[str, Any]
    settings: BenchmarkSettings
    parts: dict[str, PartResults] = field(default_factory=dict)

    def to_dict(self, samples: bool = False) -> dict[str, Any]:
        """Ready for JSON: medians and quartiles, and every sample if asked for."""
        parts = {name: part.to_dict(samples) for name, part in self.parts.items()}
        sizes = list(self.settings.batch_sizes)
        return {
            **self.circumstances,
            "models": self.models,
            "benchmark": asdict(self.settings),
            "batch": sizes[0] if len(sizes) == 1 else sizes,
            "num_prompts": next(iter(parts.values()))["num_prompts"],
            "repeats": self.settings.repeats,
            "parts": parts,
        }

    def write_json(self, file: str | Path, samples: bool = False) -> None:
        """Writes medians and quartiles of each method, and every sample if asked for."""
        write_json(Path(file), self.to_dict(samples))

    def save(self, folder: str | Path) -> list[Path]:
        """Writes `results.json`, `results.md` and, where matplotlib is installed, the figures.

        Returns:
            The files.
        """
        from specdec.benchmark.tables import markdown

        folder = Path(folder)
        self.write_json(folder / RESULTS_FILE, samples=True)
        try:
            from specdec.benchmark.plots import save_figures

            pictures = save_figures(self, folder)
        except ModuleNotFoundError as error:
            if error.name != "matplotlib":
                raise
            pictures = []
        (folder / TEXT_FILE).write_text(markdown(self, pictures), encoding="utf-8")
        return [folder / RESULTS_FILE, folder / TEXT_FILE, *pictures]

    def __rich__(self) -> Group:
        from rich.console import Group

        from specdec.benchmark.tables import conditions, tables

        return Group(*tables(self), conditions(self))


def load_results(path: str | Path) -> dict[str, Any]:
    """Reads the samples of a run.

    Args:
        path: The folder of a run, or its `results.json`.

    Raises:
        ValueError: It is not such a file, or holds no samples.
    """
    file = Path(path)
    file = file / RESULTS_FILE if file.is_dir() else file
    if not file.is_file():
        raise ValueError(
            f"{file} is not a file; name the JSON file of a benchmark, or the folder of one that has ended"
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        for part in found["parts"].values():
            if "samples" not in part and "methods" in part:
                raise ValueError("it is a summary without samples; name the folder given to --output instead")
            for sample in part["samples"]:
                _ = sample["method"], sample["prompt"], sample["num_tokens"], sample["seconds"], part["reference"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} does not hold results of `specdec bench` ({type(error).__name__}: {error})"
        ) from error
    return dict(found)
