"""Training windows of a run: examples read or written by the target itself, split, packed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from specdec.training.batches import WINDOW
from specdec.training.config import MedusaTrainingConfig
from specdec.training.distillation import distill
from specdec.training.examples import load_examples, split
from specdec.training.own_prompts import write_prompts
from specdec.training.packing import pack
from specdec.training.prompts import load_prompts

DISTILLED_FOLDER = "distilled"
_DIGESTED = 64


@dataclass
class TrainingData:
    """Windows, and the examples they are made of.

    Args:
        train: Windows to train on, numbered.
        evaluation: Held-out windows.
        num_examples: Of both.
        eval_examples: Held-out examples.
        source: Where they come from.
    """

    train: Any
    evaluation: Any
    num_examples: int
    eval_examples: Sequence[Any]
    source: str

    @property
    def digest(self) -> str:
        """Differs for other data."""
        found = hashlib.blake2b(str(len(self.train)).encode(), digest_size=8)
        for number in np.linspace(0, len(self.train) - 1, min(_DIGESTED, len(self.train)), dtype=int):
            found.update(np.array(self.train[int(number)]["input_ids"], np.int64).tobytes())
        return found.hexdigest()


def most_frequent(windows: Any, count: int) -> list[int]:
    """The `count` tokens that are supervised most often, ascending."""
    counts = np.zeros(0, np.int64)
    for batch in windows.iter(batch_size=1024):
        found = np.bincount(batch["input_ids"][batch["supervised"] != 0], minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    best = np.argsort(-counts, kind="stable")[:count]
    return sorted(best[counts[best] > 0].tolist())


def read_examples(config: MedusaTrainingConfig, source: str, tokenizer: Any) -> Any:
    """All examples of a source."""
    # The other settings chose the prompts; of answers to these, all are used.
    return load_examples(source, tokenizer, **({} if config.is_self_distilled else _reading(config)))


def _reading(config: MedusaTrainingConfig) -> dict[str, Any]:
    names = ("split", "text_field", "limit", "seed", "chat_template")
    return {name: getattr(config, name) for name in names}


def windows_of(config: MedusaTrainingConfig, source: str, tokenizer: Any) -> TrainingData:
    """Reads, splits and packs.

    Raises:
        ValueError: There is nothing to train on, or nothing to hold out.
    """
    examples = read_examples(config, source, tokenizer)
    train, held_out = split(examples, config.eval_fraction, config.seed)
    evaluation = pack(held_out, config.window, config.seed)
    evaluation = evaluation.select(range(min(len(evaluation), config.eval_windows)))
    windows = pack(train, config.window, config.seed)
    windows = windows.add_column(WINDOW, np.arange(len(windows)))
    return TrainingData(windows, evaluation, len(examples), held_out, source)


def self_distilled(config: MedusaTrainingConfig, model: Any, tokenizer: Any, console: Console | None) -> str:
    """Lets the target answer the prompts, its own or given ones; returns the folder of the answers."""
    folder = Path(config.output) / DISTILLED_FOLDER
    shared: dict[str, Any] = {"batch_size": config.distill_batch, "seed": config.seed, "console": console}
    if config.own_prompts is not None:
        template = config.chat_template
        prompts = write_prompts(model, tokenizer, config.own_prompts, folder, chat_template=template, **shared)
    else:
        prompts = load_prompts(config.prompts or "", tokenizer, **_reading(config))
    report = distill(
        model,
        tokenizer,
        prompts,
        folder,
        max_new_tokens=config.distill_tokens,
        temperature=config.distill_temperature,
        drafter="lookahead" if config.own_prompts is None else None,
        **shared,
    )
    return str(report.folder)
