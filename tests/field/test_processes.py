"""Weights spread over processes: they run in step, and one that fails leaves no other one waiting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import specdec
from specdec.passes.tensor_parallel import Ranks
from tests.conformance import FailingDrafter, OracleDrafter
from tests.tiny_models import new_model, prompts

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, os, sys
from tests.field import test_processes

with open(f"{sys.argv[1]}/{os.environ['RANK']}.json", "w") as file:
    json.dump(getattr(test_processes, sys.argv[2])(sys.argv[1]), file)
"""


def sharded(folder: str) -> Any:
    """What two processes generate of prompts of different length, with `fully_shard`."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    model = new_model("llama")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    rank = torch.distributed.get_rank()
    fast = specdec.accelerate(model, "lookahead")
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kwargs in ({}, {"synced_gpus": True}):
            output = fast.generate(**prompts(9, seed=rank), max_new_tokens=6 + 9 * rank, **kwargs)
            found.append([output.tolist(), fast.report.fallback])
    torch.distributed.destroy_process_group()
    return found


def failing(folder: str) -> Any:
    """What both processes of a tensor-parallel model raise where the first one's drafter does."""
    import transformers
    from transformers.distributed import DistributedConfig

    torch.distributed.init_process_group("gloo")
    transformers.logging.set_verbosity_error()
    config = DistributedConfig(tp_plan="auto")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder + "/model", distributed_config=config).eval()
    found = []
    for method, error in (("propose", ValueError("broken")), ("observe", ValueError("broken")), ("start", KeyError())):
        drafter = FailingDrafter(OracleDrafter([[5] * 24]), method, 0 if method == "start" else 1, error)
        try:
            specdec.accelerate(model, drafter, strict=True).generate(**prompts(9), max_new_tokens=12)
        except Exception as raised:
            found.append([type(raised).__name__, str(raised)])
    torch.distributed.destroy_process_group()
    return found


def in_two_processes(what: str, folder: Path) -> list[Any]:
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(folder / "script.py"), str(folder), what],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_fully_sharded_models_run_in_step(tmp_path: Path) -> None:
    model = new_model("llama")
    for rank, found in enumerate(in_two_processes("sharded", tmp_path)):
        expected = model.generate(**prompts(9, seed=rank), max_new_tokens=6 + 9 * rank).tolist()
        for output, fallback in found:
            assert output == expected
            assert "must run the same number of passes" in fallback


@pytest.mark.slow
def test_the_first_processs_error_is_told_to_the_others(tmp_path: Path) -> None:
    new_model("llama").save_pretrained(tmp_path / "model")
    first, second = in_two_processes("failing", tmp_path)
    assert [kind for kind, _ in first] == ["ValueError", "ValueError", "KeyError"]
    assert second == [["RuntimeError", "the first process, which drafts for all, has failed; see its error"]] * 3


def test_an_error_is_broadcast_before_it_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr("torch.distributed.broadcast", lambda tensor, source: told.append(tensor[0, 0, 0].item()))
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Ranks(torch.device("cpu")).share(interrupted, 1, 4)
    assert told == [-2]
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.broadcast", lambda tensor, source: tensor.fill_(-2))
    with pytest.raises(RuntimeError, match="the first process, which drafts for all, has failed"):
        Ranks(torch.device("cpu")).share(lambda: None, 1, 4)
