"""Settings: YAML, flags, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from specdec.cli import app
from specdec.commands import train_medusa
from specdec.training import MedusaTrainingConfig, medusa
from specdec.training.config import WITHOUT_EFFECT, settings


def call(*args: object) -> Any:
    return CliRunner().invoke(app, ["train-medusa", *map(str, args)], env={"COLUMNS": "200", "TERM": "dumb"})


def test_yaml_and_back(tmp_path: Path) -> None:
    config = MedusaTrainingConfig(
        data="x", trackers=("tensorboard", "wandb"), learning_rate=1e-3, gradient_checkpointing=True
    )
    config.save(tmp_path)
    assert MedusaTrainingConfig.load(tmp_path / "training.yaml") == config
    changed = MedusaTrainingConfig.load(tmp_path / "training.yaml", {"num_heads": 3})
    assert changed.num_heads == 3 and changed.data == "x"


def test_a_number_that_yaml_takes_for_text_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("learning_rate: 1e-3\nheads_version: 1\n")
    config = MedusaTrainingConfig.load(tmp_path / "c.yaml")
    assert config.learning_rate == 1e-3 and config.heads_version == "1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_headz: 3", r"num_headz is no setting.*known are data, .*num_heads"),
        ("num_heads: many", "num_heads must be of type int"),
        ("num_heads: 0", "num_heads=0 is not allowed; it must be at least 1"),
        ("recipe: medusa-3", "recipe.*one of medusa-1, medusa-2, medusa-2-distill"),
        ("schedule: steep", "schedule='steep'.*constant, cosine, linear"),
        ("eval_fraction: 0", "eval_fraction"),
        ("data: a\nprompts: b", "exclude each other"),
        ("- a", "one setting a line"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_said(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        MedusaTrainingConfig.load(tmp_path / "c.yaml")


def test_flags_go_before_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[MedusaTrainingConfig] = []

    def stop(config: MedusaTrainingConfig) -> None:
        seen.append(config)
        raise ValueError("seen")

    monkeypatch.setattr(medusa, "train", stop)
    (tmp_path / "c.yaml").write_text("data: from file\nsteps: 7\nnum_heads: 2\n")
    result = call("--config", tmp_path / "c.yaml", "--num-heads", 5, "--gradient-checkpointing", "--trackers", "a,b")
    assert result.exit_code == 2 and "Error: seen" in result.output
    (config,) = seen
    assert (config.data, config.steps, config.num_heads) == ("from file", 7, 5)
    assert config.gradient_checkpointing and config.trackers == ("a", "b")


def test_help_explains_every_setting() -> None:
    assert all(setting.help.endswith((".", ")", "...")) for setting in settings().values())
    assert set(settings()) >= WITHOUT_EFFECT
    output = call("--help").output
    assert all(f"--{name.replace('_', '-')}" in output for name in settings())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "x"], "--recipe must be one of"),
        (["--config", "missing.yaml"], "missing.yaml cannot be read"),
        ([], "name one of them"),
    ],
)
def test_errors_of_the_command_are_one_line(flags: list[str], message: str, tmp_path: Path) -> None:
    result = call(*flags, "--output", tmp_path / "out", "--cpu")
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_show_example(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "def f(x):", "completion": " return x"}\n')
    result = call("--data", tmp_path / "d.jsonl", "--show-example")
    assert result.exit_code == 0
    assert "return x" in result.output
    assert train_medusa.run.__doc__
