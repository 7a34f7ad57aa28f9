"""The script that trains the pair for GPUs runs, and what it exports goes together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

import specdec
from tests.examples.test_embedded_training import FUNCTION

SCRIPT = Path(__file__).parents[2] / "examples" / "gpu_pair" / "train.py"


def test_a_tiny_pair(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(50):
        body = "\n".join(f"    total += values[{i}] * weight_{number}" for i in range(60))
        text = "".join(FUNCTION.format(name=f"add_{number}_{part}", start=part, body=body) for part in range(2))
        (source / f"module_{number}.py").write_text(text)
    command = [sys.executable, str(SCRIPT), "--tiny", "--work", str(tmp_path / "pair"), "--source", str(source)]
    command += ["--target-tokens", "1024", "--draft-tokens", "1024", "--batch", "4", "--window", "16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    target, draft = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "pair" / "exported" / which).eval()
        for which in ("target", "draft")
    )
    ids = specdec.accelerate(target, draft).generate(
        target.dummy_inputs["input_ids"][:1, :4] % 100, max_new_tokens=8, do_sample=False
    )
    assert ids.shape[1] > 4
