"""Checkpoints of EAGLE-3 heads, and the head itself against speculators' model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from specdec.heads import Eagle3Head
from tests.conformance import random_eagle3
from tests.tiny_models import new_model, tiny_model

VARIANTS: list[dict[str, Any]] = [
    {},
    {"norm_before_residual": True, "fc_norm": True, "norm_output": True},
    {"norm_before_fc": True},
    {"qk_norm": True},
]


def variant(head: Eagle3Head, **changes: Any) -> Eagle3Head:
    """A head of other variants, its norms away from one."""
    other = Eagle3Head(replace(head.config, **changes))
    other.load_state_dict(head.state_dict(), strict=False)
    for part in other.modules():
        if type(part).__name__.endswith("RMSNorm"):
            nn.init.uniform_(part.weight, 0.5, 1.5)
    return other


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("layout", ["speculators", "eagle"])
def test_a_head_is_loaded_as_it_was_saved(tmp_path: Path, layout: str, changes: dict[str, Any]) -> None:
    head = variant(random_eagle3(tiny_model("llama"), range(3, 60)), **changes)
    head.save_pretrained(tmp_path, layout)
    loaded = Eagle3Head.from_pretrained(tmp_path)
    assert loaded.config.target_layers == head.config.target_layers
    assert {k: v.tolist() for k, v in loaded.state_dict().items()} == {
        k: v.tolist() for k, v in head.state_dict().items()
    }
    for name in ("norm_before_residual", "fc_norm", "norm_before_fc", "norm_output", "qk_norm", "draft_vocab_size"):
        assert getattr(loaded.config, name) == getattr(head.config, name)
    assert torch.equal(loaded.rotary.inv_freq, head.rotary.inv_freq)


def test_offsets_name_the_targets_tokens(tmp_path: Path) -> None:
    random_eagle3(tiny_model("llama"), [3, 7, 90]).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["d2t"].tolist() == [3, 6, 88]
    assert stored["t2d"].nonzero()[:, 0].tolist() == [3, 7, 90]
    assert Eagle3Head.from_pretrained(tmp_path).draft_tokens.tolist() == [3, 7, 90]


def test_bad_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no EAGLE-3 head in"):
        Eagle3Head.from_pretrained(tmp_path)
    random_eagle3(tiny_model("llama"), range(3, 60)).save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    stored, described = load_file(weights), json.loads(config.read_text())

    def reads_as(match: str, tensors: dict[str, Tensor] | None = None, **changed: Any) -> None:
        save_file(stored if tensors is None else tensors, weights)
        config.write_text(json.dumps({**described, **changed}))
        with pytest.raises(ValueError, match=match):
            Eagle3Head.from_pretrained(tmp_path)

    without = {name: tensor for name, tensor in stored.items() if name != "norm.weight"}
    reads_as("missing tensors: norm.weight", without)
    reads_as("tensors without a place: extra.weight", {**stored, "extra.weight": torch.zeros(2)})
    reads_as(r"norm.weight is \[3\], config.json asks for \[32\]", {**stored, "norm.weight": torch.zeros(3)})
    reads_as("no tensor d2t says", {name: tensor for name, tensor in stored.items() if name != "d2t"})
    reads_as(
        "d2t names tokens 0 to 200 of 97",
        {**stored, "d2t": stored["d2t"] * 0 + torch.cat([torch.zeros(56), torch.tensor([144.0])]).long()},
    )
    reads_as("config.json says peagle", speculators_model_type="peagle", architectures=["PEagle"])
    reads_as("config.json names the layers", eagle_aux_hidden_state_layer_ids=[1])
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read as tensors only"):
        Eagle3Head.from_pretrained(tmp_path)


def test_a_head_for_another_model_is_refused() -> None:
    head = random_eagle3(tiny_model("llama"))
    other = new_model("llama", hidden_size=64)
    with pytest.raises(ValueError, match="target with hidden_size=32, and LlamaForCausalLM has 64"):
        head.bind(other)


def test_layers_that_no_config_names_are_the_usual_ones(tmp_path: Path) -> None:
    head = random_eagle3(tiny_model("llama"))
    head.config = replace(head.config, target_layers=None)
    head.save_pretrained(tmp_path)
    loaded = Eagle3Head.from_pretrained(tmp_path)
    assert loaded.config.target_layers is None
    assert loaded.bind(new_model("llama", num_hidden_layers=9)).config.target_layers == (2, 4, 6)


@torch.no_grad()
@pytest.mark.parametrize("changes", VARIANTS[:2])
def test_levels_are_those_of_speculators(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Three levels, each fed with the last one's states, against speculators' own class (from PyPI)."""
    pytest.importorskip("speculators", reason="pip install speculators, in an environment of its own")
    from speculators.models.eagle3 import Eagle3SpeculatorConfig  # type: ignore[import-not-found]
    from speculators.models.eagle3.core import Eagle3DraftModel  # type: ignore[import-not-found]

    model = tiny_model("llama")
    head = variant(random_eagle3(model, range(3, 60)), **changes).bind(model)
    head.save_pretrained(tmp_path)
    left_out = ("speculators_config", "architectures", "speculators_model_type")
    config = {k: v for k, v in json.loads((tmp_path / "config.json").read_text()).items() if k not in left_out}
    theirs = Eagle3DraftModel(Eagle3SpeculatorConfig(**config))
    theirs.config.transformer_layer_config._attn_implementation = "eager"
    stored = {**load_file(tmp_path / "model.safetensors"), "embed_tokens.weight": model.get_input_embeddings().weight}
    assert not theirs.load_state_dict(stored, strict=False).unexpected_keys
    seen: list[Tensor] = []
    theirs.lm_head.register_forward_hook(lambda part, args, out: seen.append(out))
    ids, states, width = torch.randint(3, 60, (1, 10)), torch.randn(1, 9, 96), 9
    theirs(
        states, ids[:, 1:], torch.zeros(1, width, dtype=torch.long), position_ids=torch.arange(width)[None], ttt_steps=3
    )
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups = head.heads // head.kv_heads
        keys.append(key.repeat_interleave(groups, 1))
        values.append(value.repeat_interleave(groups, 1))
        query = query * head.head_dim**-0.5
        hidden = ~torch.ones(width, width, dtype=torch.bool).tril()
        parts = [(query @ keys[0].transpose(-1, -2)).masked_fill(hidden, float("-inf"))]
        weights = torch.cat([*parts, *((query * key).sum(-1, keepdim=True) for key in keys[1:])], -1).softmax(-1)
        own = [weights[..., width + i, None] * value for i, value in enumerate(values[1:])]
        return torch.stack([weights[..., :width] @ values[0], *own]).sum(0)

    state = head.fuse(states)
    for level in range(3):
        tokens = torch.cat([ids[:, 1 + level :], ids.new_zeros(1, level)], 1)
        state, normed = head(head.embed(tokens), state, torch.arange(width)[None] + level, attend)
        assert torch.allclose(head.lm_head(normed)[:, : width - level], seen[level][:, : width - level], atol=1e-5)
