"""A run that was ended somewhere and started again gives the bits of one that was not."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from specdec.training import MedusaTrainingConfig, medusa
from specdec.training.batches import BatchPlan
from specdec.training.checkpoints import Checkpoints
from tests.training.small_runs import run, small_config

RECIPES: dict[str, dict[str, Any]] = {
    "medusa-1": {"accumulation": 2},
    "medusa-1, states kept": {"cache_states": True, "steps": 24},
    "medusa-2": {"recipe": "medusa-2", "lora_dropout": 0.3, "first_stage_steps": 3},
    "medusa-2-distill": {"recipe": "medusa-2-distill", "lora_dropout": 0.3},
}


class KilledError(Exception):
    """Stands for a kill: nothing of the run is executed after it."""


def result_of(folder: str) -> dict[str, Tensor]:
    """All weights that a run has written."""
    files = sorted(Path(folder).glob("*.safetensors")) + sorted(Path(folder).glob("adapter/*.safetensors"))
    return {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_bits(mine: MedusaTrainingConfig, other: MedusaTrainingConfig) -> None:
    found, expected = result_of(mine.output), result_of(other.output)
    assert found.keys() == expected.keys() and expected
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def configs(tmp_path: Path, **changes: Any) -> tuple[MedusaTrainingConfig, MedusaTrainingConfig]:
    """The same run twice, in folders of their own."""
    return tuple(small_config(tmp_path, output=str(tmp_path / name), **changes) for name in ("whole", "ended"))  # type: ignore[return-value]


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ends the run in its step of this number, counted over all stages."""
    step, count = medusa._Run._step, [0]

    def until(self: Any, *args: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            raise KilledError
        return step(self, *args)

    monkeypatch.setattr(medusa._Run, "_step", until)


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_killed_run_resumed_gives_the_same_bits(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, ended = configs(tmp_path, **RECIPES[recipe])
    run(whole)
    for number in (4, 4):  # after step 3 of the first stage or run; then some steps further
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            with pytest.raises(KilledError):
                run(ended)
    torch.rand(3)  # another generator state than the killed run had
    assert run(ended).is_complete
    assert_same_bits(ended, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_stop(number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, ended = configs(tmp_path, save_every=100)
    run(whole)
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    step = medusa._Run._step

    def signalled(self: Any, done: int, *args: Any) -> Any:
        if done == 2:
            os.kill(os.getpid(), number)
        return step(self, done, *args)

    with monkeypatch.context() as patch:
        patch.setattr(medusa._Run, "_step", signalled)
        result = run(ended)
    assert not result.is_complete and result.stopped_by == number
    assert result.steps in (3, 4)
    assert handlers == [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    assert run(ended).is_complete
    assert_same_bits(ended, whole)


def test_a_kill_while_saving_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, ended = configs(tmp_path)
    run(whole)
    with monkeypatch.context() as patch:
        save = Checkpoints._save_trained

        def fail_at_second(self: Any, models: Any, weights: Any, folder: str) -> None:
            if "00000004" in folder:
                raise KilledError
            save(self, models, weights, folder)

        patch.setattr(Checkpoints, "_save_trained", fail_at_second)
        with pytest.raises(KilledError):
            run(ended)
    folder = Path(ended.output) / "checkpoints"
    assert [path.name for path in sorted(folder.iterdir())] == ["partial-00000004", "step-00000002"]
    run(ended)
    assert_same_bits(ended, whole)


def test_the_latest_checkpoints_are_kept(tmp_path: Path) -> None:
    config = small_config(tmp_path, keep_checkpoints=2, save_every=1)
    run(config)
    found = sorted(path.name for path in (Path(config.output) / "checkpoints").iterdir())
    assert found == ["step-00000005", "step-00000006"]


def test_another_config_is_refused_by_name(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    run(config)
    with pytest.raises(ValueError, match=r"num_heads \(2 there, 3 here\), seed \(0 there, 1 here\).*output folder"):
        run(small_config(tmp_path, num_heads=3, seed=1, window=24))
    with pytest.raises(ValueError, match="'auto'"):
        run(small_config(tmp_path, resume="never"))


def test_other_data_under_the_same_name_are_refused(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    run(config)
    lines = Path(config.data or "").read_text().splitlines()
    Path(config.data or "").write_text("\n".join(lines[::-1][:30]) + "\n")
    with pytest.raises(ValueError, match="data are not those"):
        run(config)


def test_what_does_not_touch_the_weights_may_change(tmp_path: Path) -> None:
    whole, _ = configs(tmp_path)
    run(whole)
    again = small_config(tmp_path, output=whole.output, save_every=3, keep_checkpoints=1, log_every=5)
    before = result_of(whole.output)
    assert run(again).is_complete  # complete already: it is evaluated again
    assert all(torch.equal(before[name], tensor) for name, tensor in result_of(again.output).items())


def test_each_window_comes_once_an_epoch_however_steps_are_cut() -> None:
    one = BatchPlan(10, batch_size=4, seed=3)
    two = BatchPlan(10, batch_size=2, num_processes=2, seed=3)
    parts = BatchPlan(10, batch_size=1, num_processes=2, accumulation=2, seed=3)
    order = [window for step in range(5) for window in one.batch(step, 0, 0)]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    for step in range(5):
        expected = sorted(one.batch(step, 0, 0))
        assert sorted(two.batch(step, 0, 0) + two.batch(step, 0, 1)) == expected
        assert sorted(w for a in range(2) for p in range(2) for w in parts.batch(step, a, p)) == expected
    assert one.steps(2) == 5
