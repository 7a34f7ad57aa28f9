"""Small training runs that the tests share."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from specdec.heads import MedusaHeads
from specdec.training import MedusaTrainingConfig, TrainingResult, medusa, train
from specdec.training.evaluation import Evaluation
from tests.tiny_models import new_model, tiny_tokenizer

CYCLE = "abcdefghij"
"""Text that goes round: after each letter it is known what follows at any distance."""


def write_cycles(folder: Path, count: int = 40, length: int = 24) -> Path:
    """Texts that begin anywhere in the cycle."""
    file = folder / "cycles.jsonl"
    text = CYCLE * (length // len(CYCLE) + 2)
    lines = [json.dumps({"text": text[i % len(CYCLE) :][: length - i % 5]}) for i in range(count)]
    file.write_text("\n".join(lines) + "\n")
    return file


def small_config(folder: Path, **changes: Any) -> MedusaTrainingConfig:
    """A run of some steps on the CPU."""
    values: dict[str, Any] = {
        "data": str(write_cycles(folder)),
        "output": str(folder / "run"),
        "num_heads": 2,
        "window": 24,
        "batch_size": 4,
        "steps": 6,
        "eval_fraction": 0.1,
        "warmup_steps": 2,
        "log_every": 2,
        "save_every": 2,
        "lora_rank": 4,
        "cpu": True,
    }
    return MedusaTrainingConfig(**values | changes)


def run(config: MedusaTrainingConfig, model: Any = None, **changes: Any) -> TrainingResult:
    """Trains on a tiny random model of its own."""
    model = model if model is not None else new_model("llama", **changes)
    return train(config, model, tiny_tokenizer(), Console(file=io.StringIO()))


def recorded_run(config: MedusaTrainingConfig) -> dict[str, Any]:
    """Trains, and gives the losses of each step, the sums of the heads' parameters, and the evaluation."""
    curve: list[list[float]] = []
    log = medusa._Run._log

    def record(self: Any, step: int, recent: list[Any], *args: Any) -> str:
        (counts,) = recent
        result = Evaluation.of(self.accelerator.reduce(counts, reduction="sum"))
        curve.append([*result.losses, result.own_loss])
        return log(self, step, recent, *args)

    medusa._Run._log = record  # type: ignore[method-assign]
    try:
        result = run(config)
    finally:
        medusa._Run._log = log  # type: ignore[method-assign]
    assert result.evaluation is not None
    weights = [p.double().sum().item() for p in result.heads.parameters()]
    return {"curve": curve, "weights": weights, "evaluation": result.evaluation.to_dict()}


def head_accuracies(model: Any, heads: MedusaHeads) -> list[float]:
    """How often each head is right on the cycle, found out without the trainer's code."""
    ids = torch.tensor([tiny_tokenizer()(CYCLE * 2).input_ids])
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state[0]
        best = heads.bind(model)(hidden).argmax(-1)
    shares = []
    for k in range(1, heads.config.num_heads + 1):
        right = [int(best[k - 1, t]) == int(ids[0, t + 1 + k]) for t in range(ids.shape[1] - 1 - k)]
        shares.append(sum(right) / len(right))
    return shares
