"""Folders of answers: a manifest and one file per batch, so that an interrupted run continues."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from specdec.training.records import DISTILLATION, SHARDS

OWN_PROMPTS = "own_prompts"
"""Folder inside the answers' folder with the prompts that the model wrote itself."""


def begin(folder: Path, manifest: dict[str, Any]) -> None:
    """Makes the folder, or sees to it that it belongs to the same distillation."""
    file = folder / DISTILLATION
    for name in (DISTILLATION, SHARDS):
        for left_over in folder.glob(f".{name}.*"):  # by a run that was killed
            left_over.unlink()
    if file.exists():
        old = json.loads(file.read_text(encoding="utf-8"))
        other = [name for name, value in manifest.items() if old.get(name) != value]
        if other:
            differences = ", ".join(f"{name} was {old.get(name)!r:.40} and is {manifest[name]!r:.40}" for name in other)
            raise ValueError(f"{folder} holds another distillation: {differences}; use another folder, or remove it")
        return
    folder.mkdir(parents=True, exist_ok=True)
    if any(path.name != OWN_PROMPTS for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and not of a distillation; use another folder")
    write_atomically(file, json.dumps(manifest, indent=2) + "\n")


def write_atomically(file: Path, text: str) -> None:
    """The file is there with all of the text, or not at all."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


@contextmanager
def seeded(seed: int, index: int, device: torch.device) -> Iterator[None]:
    """Random numbers of one batch; afterwards the global state is as before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0] >> np.uint64(1)))
        yield


def progress_bar(console: Console | None) -> Progress:
    """Counts, speed, and time left; nothing without a console."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=False, compact=True),
        console=console or Console(quiet=True),
        disable=console is None,
    )


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
