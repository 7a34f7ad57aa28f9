"""Two processes with a batch each train like one with both."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from specdec.training import MedusaTrainingConfig
from tests.training.small_runs import recorded_run, small_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, os, sys
import torch
from specdec.training import MedusaTrainingConfig
from tests.training.small_runs import recorded_run

torch.set_num_threads(1)
record = recorded_run(MedusaTrainingConfig.load(sys.argv[1]))
with open(f"{sys.argv[1]}-{os.environ['RANK']}.json", "w") as file:
    json.dump(record, file)
"""
PROCESSES = 2


def launch(config: MedusaTrainingConfig, folder: Path) -> list[dict[str, Any]]:
    """Trains in two processes; returns what each recorded."""
    config.save(folder)
    file = folder / "training.yaml"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"PYTHONPATH": ROOT, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": PROCESSES,
              "LOCAL_WORLD_SIZE": PROCESSES, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    started = []
    for rank in range(PROCESSES):
        environment = os.environ | {k: str(v) for k, v in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        command = [sys.executable, "-c", SCRIPT, str(file)]
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE))
    errors = [process.communicate(timeout=200)[1].decode() for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(error[-3000:] for error in errors)
    return [json.loads(Path(f"{file}-{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.parametrize(
    "recipe",
    [
        {"recipe": "medusa-1"},
        pytest.param({"recipe": "medusa-2-distill", "lora_dropout": 0.0}, marks=pytest.mark.slow),
    ],
    ids=lambda recipe: recipe["recipe"],
)
def test_two_processes_give_the_loss_curve_of_one(recipe: dict[str, Any], tmp_path: Path) -> None:
    shared = {**recipe, "learning_rate": 0.01, "steps": 5, "log_every": 1}
    one = recorded_run(small_config(tmp_path, output=str(tmp_path / "one"), batch_size=4, **shared))
    two = launch(small_config(tmp_path, output=str(tmp_path / "two"), batch_size=2, **shared), tmp_path / "config")
    for found in two:
        assert len(found["curve"]) == 5
        for mine, expected in zip(found["curve"], one["curve"], strict=True):
            assert mine == pytest.approx(expected, rel=2e-5)
        assert found["weights"] == pytest.approx(one["weights"], rel=1e-4, abs=1e-4)
        assert found["evaluation"]["losses"] == pytest.approx(one["evaluation"]["losses"], rel=1e-4)
