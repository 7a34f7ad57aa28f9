"""Checkpoints of a training run, each written completely or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from specdec.training.config import MedusaTrainingConfig

FOLDER = "checkpoints"
STATE_FILE = "state.json"
WEIGHTS_FILE = "trained.safetensors"


class Checkpoints:
    """The checkpoints in the output folder of a run.

    accelerate's `save_state` writes optimizer, schedule and random generators; of the weights, only trained parameters
    are written.

    Args:
        accelerator: Of the run; model, optimizer and schedule are prepared.
        config: Of the run, resolved.
    """

    def __init__(self, accelerator: Any, config: MedusaTrainingConfig) -> None:
        self.accelerator = accelerator
        self.config = config
        self.folder = Path(config.output) / FOLDER
        accelerator.register_save_state_pre_hook(self._save_trained)
        accelerator.register_load_state_pre_hook(self._load_trained)

    def save(self, step: int, record: Mapping[str, Any]) -> None:
        """Writes the checkpoint of a step, and removes the oldest ones.

        Args:
            step: Completed steps.
            record: What else to keep, as JSON.
        """
        final, partial = self.folder / f"step-{step:08d}", self.folder / f"partial-{step:08d}"
        if final.exists():
            return
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state = {"step": step, "num_processes": self.accelerator.num_processes, "config": self.config.to_dict()}
            (partial / STATE_FILE).write_text(json.dumps({**state, "record": dict(record)}), encoding="utf-8")
            for path in partial.rglob("*"):  # on disk before the folder gets its final name
                if path.is_file():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
            os.replace(partial, final)
            for old in self._all()[: -self.config.keep_checkpoints]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def load_latest(self) -> tuple[int, dict[str, Any]]:
        """Restores the latest checkpoint.

        Returns:
            Completed steps, 0 without a checkpoint, and the record.

        Raises:
            ValueError: It is of a run with other settings, or resuming is not wanted.
        """
        found = self._all()
        if not found:
            return 0, {}
        if self.config.resume == "never":
            raise ValueError(f"{self.folder} has a checkpoint; remove the folder, or let resume be 'auto'")
        state = json.loads((found[-1] / STATE_FILE).read_text(encoding="utf-8"))
        if different := self.config.differences(state["config"]):
            raise ValueError(
                f"{found[-1]} is of a run with other settings: {', '.join(different)}; "
                "use the same ones, or another output folder"
            )
        if state["num_processes"] != self.accelerator.num_processes:
            raise ValueError(
                f"{found[-1]} is of a run with num_processes={state['num_processes']}, not "
                f"{self.accelerator.num_processes}; launch as many, or use another output folder"
            )
        self.accelerator.load_state(str(found[-1]))
        return int(state["step"]), state["record"]

    def _all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if (path / STATE_FILE).is_file())

    def _save_trained(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        weights.clear()
        if self.accelerator.is_main_process:
            tensors = {name: p.detach().cpu().contiguous() for name, p in self._trained(models).items()}
            save_file(tensors, Path(folder) / WEIGHTS_FILE)

    def _load_trained(self, models: list[nn.Module], folder: str) -> None:
        trained, stored = self._trained(models), load_file(Path(folder) / WEIGHTS_FILE)
        if set(stored) != set(trained):
            raise ValueError(f"{folder} holds other parameters than this run trains; use another output folder")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(stored[name])
        models.clear()

    def _trained(self, models: list[nn.Module]) -> dict[str, nn.Parameter]:
        module = self.accelerator.unwrap_model(models[0])
        return {name: p for name, p in module.named_parameters() if p.requires_grad}
