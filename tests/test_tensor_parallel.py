"""A model whose weights are spread over two processes gives the tokens of one process, and neither waits for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import specdec
from specdec.budget import Budget
from specdec.drafters import DraftModelDrafter, LookaheadDrafter, MedusaDrafter
from specdec.fallback import of_processes
from tests.tiny_models import new_model, prompts, tiny_model

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = 2
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8},
}
SCRIPT = """
import json, os, sys
from tests.test_tensor_parallel import outputs

with open(f"{sys.argv[1]}/{os.environ['RANK']}.json", "w") as file:
    json.dump(outputs(sys.argv[1] + "/model", True), file)
"""


def outputs(folder: str, is_sharded: bool) -> dict[str, Any]:
    """Outputs and reports of all cases, in this process."""
    import transformers

    kwargs: dict[str, Any] = {}
    rank = int(os.environ.get("RANK", "0"))
    if is_sharded:
        from transformers.distributed import DistributedConfig

        torch.distributed.init_process_group("gloo")
        kwargs["distributed_config"] = DistributedConfig(tp_plan="auto")
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()
    assert model.tp_size == (PROCESSES if is_sharded else None)
    draft_model = new_model("llama", seed=1)
    found = {}
    for name, case in CASES.items():
        for drafter, budget in (
            ("auto", Budget()),
            # Processes that are not of one mind: only the first one's drafts count.
            (LookaheadDrafter(max_depth=4 + 3 * rank), Budget(16, fixed=True)),
            (DraftModelDrafter(draft_model), Budget(16)),
            (None, Budget()),
        ):
            fast = specdec.accelerate(model, drafter, budget=budget)
            torch.manual_seed(0)
            output = fast.generate(**prompts(12, 7), max_new_tokens=24, **case)
            named = drafter if drafter is None or isinstance(drafter, str) else drafter.name
            found[f"{named} {name}"] = [output.tolist(), fast.report.num_accepted_tokens, fast.report.fallback]
        torch.manual_seed(0)
        found[f"generate {name}"] = [model.generate(**prompts(12, 7), max_new_tokens=24, **case).tolist(), 0, None]
    with pytest.raises(ValueError, match="cannot be spread over processes") if is_sharded else _nothing():
        specdec.accelerate(model, MedusaDrafter() if is_sharded else None)
    if is_sharded:
        with pytest.warns(UserWarning, match="its tree alone is shared"):
            specdec.accelerate(model, draft_model, verifier="traversal").generate(
                **prompts(5), max_new_tokens=2, do_sample=True
            )
        torch.distributed.destroy_process_group()
    return found


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


@pytest.mark.slow
def test_two_processes_say_what_one_says(tmp_path: Path) -> None:
    new_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path)],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    alone = outputs(str(tmp_path / "model"), False)
    for rank in range(PROCESSES):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, (output, accepted, fallback) in found.items():
            assert output == alone[name][0] == alone[f"generate {name.split()[-1]}"][0], (rank, name)
            assert fallback is None
            if name.startswith("lookahead"):
                assert accepted == alone[name][1]
    assert alone["lookahead greedy"][1] > 0


def test_models_spread_over_some_processes_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sharded:
        tp_size = 2

    assert of_processes(tiny_model(), True) is None
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    assert of_processes(Sharded(), False) == "the model is spread over 2 of 4 processes, not over all"
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    assert of_processes(Sharded(), False) is None
    assert "its tree alone" in str(of_processes(Sharded(), True))
