"""Checkpoints of heads: every layout in and out, and every fault named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from specdec.heads import HeadCalibration, MedusaHeads
from tests.heads.checkpoint_files import (
    HIDDEN,
    WILD_CONFIG,
    assert_same,
    new_heads,
    numbers,
    save_raw,
    wild,
    wild_logits,
    wild_vllm,
    with_shared_projections,
)
from tests.heads.test_medusa import states
from tests.tiny_models import VOCAB, new_model, tiny_model


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("prefix", ["", "medusa_head."])
@pytest.mark.parametrize("file_name", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
def test_heads_in_the_wild_load(file_name: str, prefix: str, num_layers: int, tmp_path: Path) -> None:
    tensors = wild(5, num_layers)
    folder = save_raw(tmp_path, {prefix + name: value for name, value in tensors.items()}, WILD_CONFIG, file_name)
    with pytest.warns(UserWarning, match="the tensors are right") as warned:
        heads = MedusaHeads.from_pretrained(folder)
    said = [str(warning.message).split(" says ")[1] for warning in warned]
    expected = ["num_heads 2, the tensors say 5", "num_layers 1, the tensors say 2"][:num_layers]
    assert said == [f"{words}; the tensors are right" for words in expected]
    assert vars(heads.config) == {
        "hidden_size": HIDDEN,
        "vocab_size": VOCAB,
        "num_heads": 5,
        "num_layers": num_layers,
        "version": "1",
        "base_model_name_or_path": "lmsys/vicuna-7b-v1.3",
        "draft_vocab_size": None,
    }
    hidden = numbers(4, HIDDEN, seed=7)
    torch.testing.assert_close(heads(hidden), wild_logits(tensors, hidden, 5, num_layers))
    assert all(parameter.requires_grad for parameter in heads.parameters())

    heads.save_pretrained(tmp_path / "again")
    written = load_file(tmp_path / "again" / "medusa_lm_head.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("config", [None, WILD_CONFIG | {"medusa_num_heads": 5, "version": "2"}])
def test_version_2_in_the_wild(config: dict[str, Any] | None, tmp_path: Path) -> None:
    heads = MedusaHeads.from_pretrained(
        save_raw(tmp_path, wild(projections=False), config, "medusa_lm_head.safetensors")
    )
    assert (heads.config.version, heads.config.vocab_size, heads.config.hidden_size) == ("2", None, HIDDEN)
    assert torch.equal(heads.biases[0][4], wild()["4.0.linear.bias"])


@pytest.mark.parametrize("bias", [False, True])
def test_vllm_in_the_wild(bias: bool, tmp_path: Path) -> None:
    tensors = wild_vllm(bias=bias)
    config = {"model_type": "medusa", "hidden_size": HIDDEN, "vocab_size": VOCAB, "num_heads": 3}
    heads = MedusaHeads.from_pretrained(save_raw(tmp_path, tensors, config, "model.safetensors"))
    assert heads.config.version == "1"
    hidden = x = numbers(4, HIDDEN, seed=7)
    for layer in range(2):
        linear = tensors[f"blocks.1.layers.{layer}.weight"], tensors.get(f"blocks.1.layers.{layer}.bias")
        x = x + nn.functional.silu(nn.functional.linear(x, *linear))
    torch.testing.assert_close(heads(hidden)[1], x @ tensors["lm_heads.1.weight"].T)


@pytest.mark.parametrize(
    "names", [["lm_head.weight"], ["lm_heads.0.weight"], [f"lm_heads.{i}.weight" for i in range(3)]]
)
def test_vllm_heads_that_share_the_projection(names: list[str], tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in wild_vllm().items() if not name.startswith("lm_heads")}
    tensors |= {name: numbers(VOCAB, HIDDEN, seed=1) for name in names}
    config = {"model_type": "medusa", "vocab_size": VOCAB, "original_lm_head": True, "truncated_vocab_size": VOCAB}
    heads = MedusaHeads.from_pretrained(save_raw(tmp_path, tensors, config, "model.safetensors"))
    assert (heads.config.version, heads.config.vocab_size) == ("2", VOCAB)
    assert heads.projections is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [None, "vllm"])
@pytest.mark.parametrize("version", ["1", "2"])
def test_round_trip(version: str, layout: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    heads = new_heads(version, dtype=dtype)
    heads.save_pretrained(tmp_path, layout=layout)
    again = MedusaHeads.from_pretrained(tmp_path)
    assert_same(heads, again)
    hidden = states(tiny_model("llama"), 5)
    assert torch.equal(again.bind(tiny_model("llama"))(hidden), heads(hidden))


def test_version_2_to_vllm_and_back_is_the_same_to_the_bit(tmp_path: Path) -> None:
    heads = new_heads()
    heads.save_pretrained(tmp_path / "first")
    MedusaHeads.from_pretrained(tmp_path / "first").bind(tiny_model("llama")).save_pretrained(
        tmp_path / "served", layout="vllm"
    )
    MedusaHeads.from_pretrained(tmp_path / "served").save_pretrained(tmp_path / "back", layout="2")
    for name in ("medusa_lm_head.safetensors", "config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


def test_what_vllm_is_given(tmp_path: Path) -> None:
    model = tiny_model("llama")
    new_heads().save_pretrained(tmp_path / "shared", layout="vllm")
    shared = load_file(tmp_path / "shared" / "model.safetensors")
    blocks = {f"blocks.{i}.layers.{j}.{kind}" for i in range(3) for j in range(2) for kind in ("weight", "bias")}
    assert shared.keys() == blocks | {"lm_heads.0.weight"}
    assert torch.equal(shared["lm_heads.0.weight"], model.lm_head.weight)
    config = json.loads((tmp_path / "shared" / "config.json").read_text())
    hidden = model.config.hidden_size
    assert (
        config
        | {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            "hidden_size": hidden,
            "vocab_size": VOCAB,
            "truncated_vocab_size": VOCAB,
            "num_heads": 3,
            "num_hidden_layers": 2,
            "medusa_fc_bias": True,
            "original_lm_head": True,
        }
        == config
    )
    # vLLM renames every key with "num" and "heads", or "num" and "layers", in it; a second one would win.
    assert [key for key in config if "num" in key and ("heads" in key or "layers" in key)] == [
        "num_heads",
        "num_hidden_layers",
    ]

    new_heads("1").save_pretrained(tmp_path / "own", layout="vllm")
    own = load_file(tmp_path / "own" / "model.safetensors")
    assert own.keys() == blocks | {f"lm_heads.{i}.weight" for i in range(3)}
    assert json.loads((tmp_path / "own" / "config.json").read_text())["original_lm_head"] is False


def test_version_1_to_2_needs_projections_that_are_the_models(tmp_path: Path) -> None:
    with_shared_projections().save_pretrained(tmp_path / "equal", layout="2")
    again = MedusaHeads.from_pretrained(tmp_path / "equal").bind(tiny_model("llama"))
    hidden = states(tiny_model("llama"), 3)
    assert again.config.version == "2"
    torch.testing.assert_close(again(hidden), with_shared_projections()(hidden))

    heads = with_shared_projections()
    assert heads.projections is not None
    heads.projections.data[1, 5, 3] += 0.5
    with pytest.raises(ValueError, match=r"heads 2 \(by up to 0\.5\) differ from the model's output embedding"):
        heads.save_pretrained(tmp_path / "one number", layout="2")
    with pytest.raises(ValueError, match=r"heads 1 \(.*, 2 \(.*, 3 \("):
        new_heads("1").save_pretrained(tmp_path / "all", layout="2")
    unbound = MedusaHeads(with_shared_projections().config)
    with pytest.raises(ValueError, match="not bound"):
        unbound.save_pretrained(tmp_path / "unbound", layout="2")
    assert [path.name for path in tmp_path.iterdir()] == ["equal"]


@pytest.mark.parametrize("layout", ["1", "vllm"])
def test_version_2_to_a_layout_with_projections_needs_the_model(layout: Any, tmp_path: Path) -> None:
    heads = new_heads()
    heads.save_pretrained(tmp_path / "bound", layout=layout)
    if layout == "1":
        again = MedusaHeads.from_pretrained(tmp_path / "bound")
        hidden = states(tiny_model("llama"), 3)
        torch.testing.assert_close(again(hidden), heads(hidden))
    with pytest.raises(ValueError, match="not bound to a model"):
        MedusaHeads(heads.config).save_pretrained(tmp_path / "unbound", layout=layout)
    heads = MedusaHeads.for_model(new_model("llama", tie_word_embeddings=False))
    heads.output_embedding.module.bias = nn.Parameter(torch.ones(VOCAB))
    with pytest.raises(ValueError, match="has a bias"):
        heads.save_pretrained(tmp_path / "biased", layout=layout)


def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import EntryNotFoundError

    from specdec.heads import files

    new_heads().save_pretrained(tmp_path)
    asked = []

    def download(repo_id: str, filename: str, **settings: Any) -> str:
        asked.append((repo_id, filename, settings))
        if not (tmp_path / filename).exists():
            raise EntryNotFoundError(filename)
        return str(tmp_path / filename)

    monkeypatch.setattr(files, "hf_hub_download", download)
    assert_same(new_heads(), MedusaHeads.from_pretrained("someone/heads", revision="v1", token="secret"))
    assert [name for _, name, _ in asked] == ["medusa_lm_head.safetensors", "config.json", "medusa_tree.json"]
    assert all(call[::2] == ("someone/heads", {"revision": "v1", "token": "secret"}) for call in asked)


def test_precision_is_that_of_the_file_or_the_one_asked_for(tmp_path: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in wild().items()}
    save_raw(tmp_path, tensors, None, "medusa_lm_head.safetensors")
    assert MedusaHeads.from_pretrained(tmp_path).dtype == torch.float16
    assert MedusaHeads.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
    save_raw(tmp_path, tensors | {"0.0.linear.bias": torch.ones(HIDDEN)}, None, "medusa_lm_head.safetensors")
    heads = MedusaHeads.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in heads.parameters()} == {torch.float32}


def test_calibration_goes_with_the_heads(tmp_path: Path) -> None:
    heads = new_heads()
    heads.calibration = HeadCalibration([[0.5, 0.2], [0.3], [0.1]], [[0], [0, 0]], 100, {1: 0.5}, "cpu")
    for layout in ("2", "vllm"):
        heads.save_pretrained(tmp_path / layout, layout=layout)
        assert MedusaHeads.from_pretrained(tmp_path / layout).calibration == heads.calibration
    heads.calibration = None
    heads.save_pretrained(tmp_path / "2")
    assert MedusaHeads.from_pretrained(tmp_path / "2").calibration is None

    HeadCalibration([[0.5]]).save(tmp_path / "2")
    with pytest.raises(ValueError, match=r"medusa_tree\.json is of 1 heads, the checkpoint of 3"):
        MedusaHeads.from_pretrained(tmp_path / "2")


def test_nothing_else_is_overwritten(tmp_path: Path) -> None:
    model_folder, heads_folder = tmp_path / "model", tmp_path / "heads"
    tiny_model("llama").save_pretrained(model_folder)
    before = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    heads = new_heads()
    for layout in ("1", "2", "vllm"):
        with pytest.raises(ValueError, match="use another folder"):
            heads.save_pretrained(model_folder, layout=layout)
    assert before == {path.name: path.read_bytes() for path in model_folder.iterdir()}

    heads.save_pretrained(heads_folder)
    heads.save_pretrained(heads_folder)
    with pytest.raises(ValueError, match=r"holds medusa_lm_head\.safetensors already"):
        heads.save_pretrained(heads_folder, layout="vllm")
    with pytest.raises(ValueError, match="layout='tgi' is not one of '1', '2', 'vllm'"):
        heads.save_pretrained(heads_folder, layout="tgi")  # type: ignore[arg-type]
