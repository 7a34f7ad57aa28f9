"""The roofline: costs from the model itself, and what is shown of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from typer.testing import CliRunner

from specdec.benchmark.roofline import (
    DeviceLimits,
    Roofline,
    StepCosts,
    StepTime,
    device_limits,
    measure_roofline,
    roofline_tables,
    step_costs,
)  # fmt: skip
from specdec.cli import app
from tests.test_cli import save_model
from tests.tiny_models import LLAMA_LIKE, tiny_model


def test_costs_of_a_dense_model() -> None:
    model = tiny_model()
    costs = step_costs(model)
    body = sum(p.numel() for name, p in model.named_parameters() if name != "model.embed_tokens.weight")
    assert costs.weight_bytes == 4 * body, "of the input embedding a step reads a few rows"
    assert costs.kv_bytes == 2 * 2 * 2 * 8 * 4, "two layers, keys and values, two heads of eight in float32"
    assert costs.num_experts == costs.expert_bytes == 0
    assert costs.bytes(3, 10, 2) == costs.weight_bytes + costs.kv_bytes * 13 * 2
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert costs.node_flops == 2 * (body - norms)
    assert costs.flops(2, 6) == 2 * (costs.node_flops + costs.attention_flops * 8)


def test_costs_of_a_mixture_of_experts() -> None:
    config = tf.MixtralConfig(**LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2)
    costs = step_costs(tf.MixtralForCausalLM(config).eval())
    assert costs.expert_bytes == 2 * 4 * 3 * 32 * 48 * 4
    assert costs.active_share(1) == 0.5
    assert costs.active_share(2) == 0.75
    assert costs.bytes(1, 0) == costs.weight_bytes + costs.expert_bytes / 2 + costs.kv_bytes


def test_a_shared_embedding_is_read_whole() -> None:
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA_LIKE | {"tie_word_embeddings": True})).eval()
    assert step_costs(model).weight_bytes == 4 * sum(p.numel() for p in model.parameters())


def test_the_limit_is_the_slower_of_memory_and_arithmetic() -> None:
    costs = StepCosts(1000, 0, 0, 0, 10, 500, 0)
    assert costs.floor(1, 0, bandwidth=100.0, flops=1e9) == pytest.approx(10.1)
    assert costs.floor(100, 0, bandwidth=1e9, flops=1000.0) == pytest.approx(50.0)


@pytest.mark.parametrize("mode", ["auto", "eager"])
def test_measuring(mode: str) -> None:
    seen: list[StepTime] = []
    found = measure_roofline(tiny_model(), (1, 4), (8, 16), 2, mode, on_time=seen.append)  # type: ignore[arg-type]
    assert [(entry.context, entry.nodes) for entry in seen] == [(8, 1), (8, 4), (16, 1), (16, 4)]
    assert found.times == seen
    assert all(entry.step > 0 and entry.target > 0 and entry.reached > 0 for entry in seen)
    assert sum(found.shares.values()) == pytest.approx(1.0)
    assert (found.cuda_graphs is None) == (mode == "auto"), "on a CPU nobody expects graphs"
    assert all(entry.target < entry.step for entry in seen)
    assert json.loads(json.dumps(found.to_dict()))["times"][0]["nodes"] == 1


def test_limits_are_of_the_device() -> None:
    limits = device_limits(torch.device("cpu"), torch.float32)
    assert limits.bandwidth > 1e8
    assert limits.flops > 1e8


def test_tables_name_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    found = Roofline(StepCosts(10**9, 2 * 10**9, 8, 2, 1000, 10**9, 1), DeviceLimits(4e12, 9e14), 1)
    found.times = [StepTime(1, 512, 0.002, 0.0019, 0.001), StepTime(64, 512, 0.0022, 0.002, 0.001)]
    found.shares = {"attention": 0.25, "host: Python and launches": 0.75}
    Console(width=120).print(roofline_tables(found))
    text = capsys.readouterr().out
    for part in ("4 TB/s", "2 of 8 experts", "50.0%", "1.10x", "75.0%"):
        assert part in text


def test_the_command(tmp_path: Path) -> None:
    save_model(tmp_path / "model", layers=1, seed=0)
    file = tmp_path / "out.json"
    sizes = ["--nodes", "1", "--nodes", "2", "--context", "8", "--device", "cpu", "--json", str(file)]
    result = CliRunner().invoke(app, ["roofline", "--model", str(tmp_path / "model"), *sizes])
    assert result.exit_code == 0, result.output
    written = json.loads(file.read_text())
    assert {"commit", "hardware", "versions", "model", "costs", "limits", "times", "shares"} <= set(written)
    refused = CliRunner().invoke(app, ["roofline", "--cuda-graphs", "maybe"])
    assert refused.exit_code != 0
    assert "--cuda-graphs maybe is not known; use one of auto, eager, off" in refused.output


def test_a_model_without_trees_is_refused() -> None:
    model = tf.MambaForCausalLM(tf.MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()
    with pytest.raises(ValueError, match="cannot be measured on trees"):
        measure_roofline(model, (4,), (8,))
