"""Measuring heads and a device, and the tree that follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from specdec.cli import app
from specdec.drafters import MedusaDrafter
from specdec.heads import HeadCalibration, MedusaHeads
from specdec.heads.tree_choice import best_tree, measured_tokens
from specdec.training.tree_tuning import measure_ranks, time_passes, tune
from tests.conformance import assert_identical, random_heads
from tests.tiny_models import new_model, prompts, tiny_model, tiny_tokenizer

HEADS = 3


def written(model: Any, count: int = 4, prompt: int = 6, tokens: int = 24) -> list[dict[str, list[int]]]:
    """Texts that the model wrote."""
    inputs = prompts(*[prompt] * count)
    ids = model.generate(**inputs, max_new_tokens=tokens, eos_token_id=None).tolist()
    return [{"input_ids": row, "supervised": [0] * prompt + [1] * tokens} for row in ids]


def test_ranks_are_those_of_the_targets_own_tokens() -> None:
    model = tiny_model()
    heads, examples = random_heads(model, HEADS), written(model)
    ranks = measure_ranks(model, heads, examples, num_ranks=5)
    expected = []
    for example in examples:
        ids = torch.tensor([example["input_ids"]])
        with torch.no_grad():
            lists = heads(model.model(ids).last_hidden_state)[:, 0].topk(5, dim=-1).indices.tolist()
        # From where the root is the first written token to where the last head's token is the last one.
        for at in range(5, ids.shape[1] - 1 - HEADS):
            tokens = [int(ids[0, at + 2 + head]) for head in range(HEADS)]
            expected.append([lists[head][at].index(t) if t in lists[head][at] else -1 for head, t in enumerate(tokens)])
    assert ranks.tolist() == expected
    assert (ranks >= 0).any()


def test_ranks_predict_what_a_generation_accepts() -> None:
    """Tokens per pass from single positions are those of a generation, up to which positions it starts from."""
    model = tiny_model()
    heads = random_heads(model, HEADS, spread=0.1)
    examples = written(model, count=6, tokens=60)
    ranks = measure_ranks(model, heads, examples)
    accuracies = [[float((ranks[:, head] == rank).mean()) for rank in range(10)] for head in range(HEADS)]
    tree = best_tree(accuracies, 16)
    heads.calibration = HeadCalibration(accuracies, tree)
    report = assert_identical(
        model, MedusaDrafter(heads, dynamic=False), prompts(*[6] * 6), max_new_tokens=60, eos_token_id=None
    )
    assert report.tokens_per_pass == pytest.approx(measured_tokens(ranks, tree), rel=0.1)


def test_all_sizes_are_timed() -> None:
    model = tiny_model()
    seconds, draft_seconds, takes_trees = time_passes(model, random_heads(model), written(model), 32)
    assert list(seconds) == [1, 2, 4, 8, 16, 32]
    assert seconds[1] > 0 and list(seconds.values()) == sorted(seconds.values())
    assert draft_seconds > 0
    assert takes_trees


def test_the_tree_with_most_tokens_per_second_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {1: 1.0, 8: 1.0, 16: 3.0, 64: 3.0}  # as if more than eight nodes were expensive
    monkeypatch.setattr("specdec.training.tree_tuning.time_passes", lambda *args: (seconds, 0.0, True))
    model, heads = tiny_model(), random_heads(tiny_model(), HEADS)
    heads.calibration = HeadCalibration([[0.5]])  # of other heads, and replaced
    tuning = tune(model, heads, written(model))
    assert heads.calibration is tuning.calibration
    assert tuning.chosen.nodes == 8
    assert [candidate.nodes for candidate in tuning.candidates] == [1, 2, 4, 8, 16, 32, 64]
    assert [c.measured for c in tuning.candidates] == sorted(c.measured for c in tuning.candidates)
    assert tuning.calibration.tree == tuning.chosen.tree
    assert tuning.calibration.step_seconds == seconds
    assert all(c.measured >= c.default * 0.9 for c in tuning.candidates)


def test_models_that_take_chains_only_get_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    real = time_passes(model, random_heads(model), written(model), 8)
    monkeypatch.setattr("specdec.training.tree_tuning.time_passes", lambda *args: (*real[:2], False))
    heads = random_heads(model, HEADS)
    tree = tune(model, heads, written(model)).chosen.tree
    assert tree == [[0] * depth for depth in range(1, len(tree) + 1)]


def test_answers_that_are_too_short_are_an_error() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="longer"):
        measure_ranks(model, random_heads(model, HEADS), written(model, tokens=HEADS))


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune") / "model"
    model = new_model("llama")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    random_heads(model, HEADS).save_pretrained(folder / "medusa")
    return folder


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tune") / "prompts.jsonl"
    lines = [json.dumps({"prompt": text}) for text in ("hello world", "tokens", "trees of ranks", "abcdefgh")]
    file.write_text("\n".join(lines))
    return file


def test_the_command_stores_a_calibration_beside_the_heads(model_folder: Path, prompt_file: Path) -> None:
    args = ["tune-tree", "--model", str(model_folder), "--data", str(prompt_file), "--max-new-tokens", "24"]
    result = CliRunner().invoke(app, [*args, "--max-nodes", "16", "--top-k", "6"])
    assert result.exit_code == 0, result.output
    assert "stored" in result.output
    assert "head" in result.output
    calibration = HeadCalibration.load(model_folder / "medusa")
    assert len(calibration.accuracies) == HEADS
    assert len(calibration.accuracies[0]) == 6
    assert calibration.num_tokens > 0
    assert calibration.tree
    assert calibration.device
    assert set(calibration.step_seconds) == {1, 2, 4, 8, 16}
    loaded = MedusaHeads.from_pretrained(model_folder / "medusa")
    assert loaded.calibration == calibration


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--max-nodes", "3"], "--max-nodes 3"),
        (["--heads", "/nowhere/heads"], "/nowhere/heads"),
        (["--heads", "someone/heads"], "--output"),
        (["--data", "/nowhere/prompts.jsonl"], "/nowhere/prompts.jsonl"),
    ],
)
def test_bad_input_is_named(model_folder: Path, prompt_file: Path, args: list[str], message: str) -> None:
    base = ["tune-tree", "--model", str(model_folder), "--data", str(prompt_file)]
    result = CliRunner().invoke(app, [*base, *args])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_heads_of_another_model_are_named(tmp_path: Path, model_folder: Path, prompt_file: Path) -> None:
    random_heads(new_model("llama", hidden_size=16, num_attention_heads=2)).save_pretrained(tmp_path)
    result = CliRunner().invoke(
        app, ["tune-tree", "--model", str(model_folder), "--data", str(prompt_file), "--heads", str(tmp_path)]
    )
    assert result.exit_code == 2
    assert "hidden size 16" in result.stderr
