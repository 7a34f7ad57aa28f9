"""Hidden states that are kept on disk: the same weights, and one pass of the target per window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from specdec.training.hidden_states import FinalHiddenStates
from specdec.training.state_cache import StateCache
from tests.training.small_runs import run, small_config

STEPS = 24


def count_windows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the windows that the target is run on."""
    counted, call = [0], FinalHiddenStates.__call__

    def counting(self: Any, input_ids: Any, *args: Any) -> Any:
        counted[0] += len(input_ids)
        return call(self, input_ids, *args)

    monkeypatch.setattr(FinalHiddenStates, "__call__", counting)
    return counted


def test_the_target_runs_once_per_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = count_windows(monkeypatch)
    plain = run(small_config(tmp_path, output=str(tmp_path / "plain"), steps=STEPS))
    without, counted[0] = counted[0], 0
    kept = run(small_config(tmp_path, output=str(tmp_path / "kept"), steps=STEPS, cache_states=True))
    assert plain.is_complete and kept.is_complete
    assert counted[0] < 0.7 * without
    mine, theirs = (load_file(tmp_path / name / "medusa_lm_head.safetensors") for name in ("kept", "plain"))
    assert all(torch.allclose(mine[name], theirs[name], atol=1e-4) for name in theirs)
    assert not (tmp_path / "kept" / "states").exists()


def test_only_whole_batches_come_from_disk(tmp_path: Path) -> None:
    cache = StateCache(tmp_path, "key")
    computed: list[list[int]] = []

    def states(windows: list[int]) -> torch.Tensor:
        def compute() -> torch.Tensor:
            computed.append(windows)
            return torch.tensor(windows, dtype=torch.bfloat16)[:, None, None].expand(-1, 3, 2)

        return cache.states(torch.tensor(windows), compute)

    for windows in ([0, 1], [1, 2], [2, 0], [3, 1], [3, 2]):
        assert states(windows)[:, 0, 0].tolist() == windows
    assert computed == [[0, 1], [1, 2], [3, 1]]
    again = StateCache(tmp_path, "key")
    other = StateCache(tmp_path, "other data")
    cache = again
    states([0, 3])
    assert states([0, 3])[:, 0, 0].tolist() == [0, 3] and len(computed) == 3
    cache = other
    states([0, 3])
    assert len(computed) == 4
    again.remove()
    other.remove()
    assert not list(tmp_path.iterdir())
