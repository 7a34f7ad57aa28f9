"""Training runs on tiny models: what is learned, what is written, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from specdec.heads import HeadCalibration, MedusaHeads
from specdec.training import MedusaTrainingConfig, medusa
from specdec.training.evaluation import TREE_SIZES
from specdec.training.hidden_states import FinalHiddenStates
from specdec.training.losses import medusa_targets
from tests.tiny_models import MODELS, new_model, tiny_model
from tests.training.small_runs import head_accuracies, run, small_config

LEARNING: dict[str, Any] = {"steps": 150, "learning_rate": 0.03, "save_every": 1000, "log_every": 60}


def check_learned(tmp_path: Path, **changes: Any) -> None:
    """After a short run every head knows the cycle."""
    model = new_model("llama")
    result = run(small_config(tmp_path, **LEARNING | changes), model)
    assert min(head_accuracies(model, result.heads)) > 0.8
    assert result.evaluation is not None and min(result.evaluation.top(1)) > 0.8


def check_layers(tmp_path: Path) -> None:
    """Every layer of every head has weights of its own, which are trained and saved."""
    result = run(small_config(tmp_path, num_layers=2, steps=3, warmup_steps=0, learning_rate=0.01), new_model("llama"))
    first, second = MedusaHeads.from_pretrained(result.config.output).weights
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_heads_learn_what_comes_next(tmp_path: Path) -> None:
    check_learned(tmp_path)


def test_version_1_heads_learn_too(tmp_path: Path) -> None:
    check_learned(tmp_path, heads_version="1", num_layers=2)


def test_every_layer_has_weights_of_its_own(tmp_path: Path) -> None:
    check_layers(tmp_path)


def test_labels_off_by_one_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(medusa, "medusa_targets", lambda i, u, s, heads: medusa_targets(i, u, s, heads + 1)[1:])
    with pytest.raises(AssertionError):
        check_learned(tmp_path)


def test_shared_layers_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = MedusaHeads.__init__

    def shared(self: MedusaHeads, config: Any) -> None:
        build(self, config)
        self.weights[1] = self.weights[0]

    monkeypatch.setattr(MedusaHeads, "__init__", shared)
    with pytest.raises((AssertionError, RuntimeError)):
        check_layers(tmp_path)


def chat_file(folder: Path) -> Path:
    """Questions in other letters than the answers."""
    file = folder / "chat.jsonl"
    lines = [json.dumps({"prompt": "zyxwzyxw", "completion": "abcabcabcabc"}) for _ in range(20)]
    file.write_text("\n".join(lines) + "\n")
    return file


def check_prompts_not_learned(tmp_path: Path) -> None:
    """As many targets as completions have, whatever the prompts are."""
    result = run(small_config(tmp_path, data=str(chat_file(tmp_path)), steps=1))
    assert result.evaluation is not None
    held_out = 2
    with_end = result.evaluation.num_targets // held_out
    # Head 1 has the first token of a completion as a target too: it is looked for from inside the prompt.
    assert with_end in (12, 13)


def test_prompts_are_not_learned(tmp_path: Path) -> None:
    check_prompts_not_learned(tmp_path)


def test_supervised_prompts_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from specdec.training import evaluation

    for module in (medusa, evaluation):
        monkeypatch.setattr(
            module, "medusa_targets", lambda i, u, s, heads: medusa_targets(i, torch.ones_like(u), s, heads)
        )
    with pytest.raises(AssertionError):
        check_prompts_not_learned(tmp_path)


def test_the_target_is_left_alone(tmp_path: Path) -> None:
    model = new_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(small_config(tmp_path), model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training


def test_everything_is_written(tmp_path: Path) -> None:
    result = run(small_config(tmp_path))
    folder = Path(result.config.output)
    assert result.evaluation is not None
    calibration = HeadCalibration.load(folder)
    assert calibration.accuracies == result.evaluation.accuracies
    assert calibration.num_tokens == result.evaluation.num_targets > 0
    assert MedusaTrainingConfig.load(folder / "training.yaml") == result.config
    figures = json.loads((folder / "figures.json").read_text())
    assert set(figures["evaluation"]["tokens_per_pass"]) == {"chain", *(f"tree of {n}" for n in TREE_SIZES)}
    card = (folder / "README.md").read_text()
    for text in ("Medusa-1", "cycles.jsonl", "| steps | 6 of 4 windows |", "top-10", "tree of 64", "Not measured"):
        assert text in card
    expected = result.evaluation.tokens_per_pass
    assert 1 <= expected["chain"] <= expected["tree of 64"] + 1e-9


@pytest.mark.parametrize("recipe", ["medusa-2", "medusa-2-distill"])
def test_medusa_2(recipe: str, tmp_path: Path) -> None:
    model = new_model("llama")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = small_config(tmp_path, recipe=recipe, gradient_checkpointing=recipe == "medusa-2")
    result = run(config, model)
    folder = Path(result.config.output)
    assert result.before is not None and result.evaluation is not None
    assert result.before["divergence"] == pytest.approx(0, abs=1e-6)
    assert result.evaluation.divergence > 0
    assert result.evaluation.own_loss > 0
    assert (folder / "first-stage" / "README.md").exists() == (recipe == "medusa-2")
    assert "merge_and_unload" in (folder / "README.md").read_text()
    fresh = new_model("llama")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in fresh.state_dict().items())
    adapted = PeftModel.from_pretrained(fresh, str(folder / "adapter"))
    trained = {name for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert len(trained) == 2 * 7
    heads = MedusaHeads.from_pretrained(folder).bind(adapted)
    assert torch.isfinite(heads(torch.randn(1, 32))).all()


def test_one_stage_holds_the_target_to_its_own_output(tmp_path: Path) -> None:
    """Learning from the data moves the target's output; learning from itself does not."""
    settings = {**LEARNING, "learning_rate": 5e-3, "first_stage_steps": 5, "heads_weight": 0.01, "steps": 25}
    moved = {}
    for recipe in ("medusa-2", "medusa-2-distill"):
        (tmp_path / recipe).mkdir()
        result = run(small_config(tmp_path / recipe, recipe=recipe, **settings))
        assert result.evaluation is not None and result.before is not None
        moved[recipe] = result.evaluation
    assert moved["medusa-2"].own_loss < moved["medusa-2-distill"].own_loss
    assert moved["medusa-2-distill"].divergence < 0.2 * moved["medusa-2"].divergence


@pytest.mark.parametrize("name", list(MODELS))
def test_hidden_states_of_packed_windows_are_those_of_the_examples_alone(name: str) -> None:
    model = tiny_model(name)
    states = FinalHiddenStates(model)
    lengths = (7, 12, 3)
    ids = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([[1] * 7 + [2] * 12 + [3] * 3 + [0] * 2] * 2)
    positions = torch.cat([torch.arange(n) for n in (*lengths, 2)]).expand(2, -1).contiguous()
    embedded = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: embedded.append(args[0]))
    with torch.no_grad():
        found = states(ids, segments, positions)
        embedded.clear()
        for part in ids.split([*lengths, 2], dim=1)[:3]:
            model(input_ids=part)
    hook.remove()
    torch.testing.assert_close(found[:, :22], torch.cat(embedded, dim=1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("forced", ["stopped", "rows"])
def test_other_ways_to_hidden_states(forced: str) -> None:
    model = tiny_model("llama")
    usual, other = FinalHiddenStates(model), FinalHiddenStates(model)
    assert usual.uses_decoder and usual.packed
    if forced == "stopped":
        other._run = other._stopped
    else:
        other.packed = False
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    segments = torch.tensor([[1] * 9 + [2] * 7, [1] * 4 + [2] * 10 + [0] * 2])
    positions = torch.tensor([[*range(9), *range(7)], [*range(4), *range(10), 0, 1]])
    with torch.no_grad():
        expected, found = usual(ids, segments, positions), other(ids, segments, positions)
    real = segments != 0
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)


def test_the_target_answers_the_prompts_first_and_the_gain_is_measured(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text * 3}) + "\n" for text in ("abc", "xyz", "hello ", "q", "no")))
    config = small_config(
        tmp_path, data=None, prompts=str(prompts), steps=1, distill_tokens=12, measure_prompts=1, measure_tokens=8
    )
    result = run(config)
    assert (tmp_path / "run" / "distilled").is_dir()
    assert result.speedup is not None
    methods = {row["method"]: row for row in result.speedup["methods"]}
    assert all(row["num_identical"] == row["num_runs"] for row in methods.values())
    assert "specdec medusa" in (tmp_path / "run" / "README.md").read_text()
