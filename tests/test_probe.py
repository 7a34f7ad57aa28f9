"""The probe judges by structure and by the model's own rounding noise: right trees pass, planted faults do not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from specdec import capability, capability_store, probing
from specdec.capability import probe
from specdec.kv_cache import TreeCache
from specdec.masks import MaskFormat
from specdec.rounding import allowed, differ, distance, noise_of, typical_noise
from specdec.target import TreeTarget
from specdec.tree import TokenTree
from tests.tiny_models import new_model


def deep_model(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """Thirty layers of random weights, whose rounding adds up as that of a trained model does."""
    values = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.12}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tf.LlamaForCausalLM(tf.LlamaConfig(**{**values, **heads, **changes})).eval().to(dtype)


# --- faults -----------------------------------------------------------------------------------------------------------


def shift_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    run = TreeTarget.run_pass
    monkeypatch.setattr(TreeTarget, "run_pass", lambda self, tokens, mask, at: run(self, tokens, mask, at + 1))


def positions_by_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    run = TreeTarget.run_pass

    def by_slot(self: Any, tokens: Tensor, mask: Any, positions: Tensor) -> Tensor:
        return run(self, tokens, mask, positions[:, :1] + torch.arange(tokens.shape[1]))

    monkeypatch.setattr(TreeTarget, "run_pass", by_slot)


def wrong_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = TreeTarget.forward

    def mistaken(self: Any, tree: TokenTree) -> Tensor:
        parents = tree.parents.clone()
        if parents.shape[1] > 3:
            parents[:, 3] = 1  # has the same depth as the right one
        return forward(self, TokenTree(tree.tokens, parents))

    monkeypatch.setattr(TreeTarget, "forward", mistaken)


def causal_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    build = MaskFormat.build

    def causal(self: Any, tree: TokenTree, *args: Any) -> Any:
        chain = torch.arange(-1, tree.num_nodes - 1).expand_as(tree.parents)
        return build(self, TokenTree(tree.tokens, chain), *args)

    monkeypatch.setattr(MaskFormat, "build", causal)


def hide_one_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    build = MaskFormat.build

    def hidden(self: Any, *args: Any) -> Any:
        mask = build(self, *args).clone()
        mask[..., 5] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return mask

    monkeypatch.setattr(MaskFormat, "build", hidden)


def keep_a_rejected_node(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = TreeCache.commit

    def careless(self: Any, paths: Sequence[Sequence[int]]) -> None:
        commit(self, [[0, 1] if list(path) == [0] else path for path in paths])

    monkeypatch.setattr(TreeCache, "commit", careless)


FAULTS = [shift_positions, positions_by_slot, wrong_parent, causal_mask, hide_one_slot, keep_a_rejected_node]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_deep_model_takes_trees(dtype: torch.dtype, attention: str) -> None:
    model = deep_model(dtype)
    model.set_attn_implementation(attention)
    found = probe(model)
    assert found.mode == "tree", found.reason
    assert found.rounding is not None and (found.rounding > 0 or dtype == torch.float32)
    assert noise_of(model, dtype) >= typical_noise(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_faults_are_caught(fault: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    found = probe(deep_model(dtype))
    assert found.mode != "tree"
    assert "differ" in found.reason or "depend" in found.reason


def test_windows_and_a_large_vocabulary_in_half_precision() -> None:
    config = tf.Gemma3TextConfig(
        vocab_size=20_000, hidden_size=64, intermediate_size=128, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, sliding_window=16, initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.Gemma3ForCausalLM(config).eval().to(torch.bfloat16)
    assert probe(model).mode == "tree", probe(model).reason


# --- passes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_takes_at_most_eight_passes(dtype: torch.dtype) -> None:
    model, passes = deep_model(dtype), []
    model.register_forward_pre_hook(lambda *args: passes.append(1))
    assert probe(model).mode == "tree"
    assert 0 < len(passes) <= 8


def test_random_numbers_are_left_alone_in_training_mode() -> None:
    model = new_model("gpt2").train()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    probe(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_lack_of_memory_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model("llama")

    def starved(*args: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(probing.Trial, "run_reference", starved)
        assert probe(model).mode == "plain"
        assert "tried again" in probe(model).reason
    assert probe(model).mode == "tree"


def test_a_doubt_is_settled_by_a_second_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    compare = capability._compare

    def watched(trial: Any, names: Any) -> Any:
        seeds.append(trial.seed)
        found, _ = compare(trial, names)
        return found, len(seeds) == 1

    monkeypatch.setattr(capability, "_compare", watched)
    assert probe(new_model("llama")).mode == "tree"
    assert seeds == [0, 1]


# --- the rule ---------------------------------------------------------------------------------------------------------


def test_what_counts_as_rounding() -> None:
    torch.manual_seed(0)
    right = torch.randn(3, 4, 100)
    assert distance(right, right) == 0.0
    assert not differ(right + 1e-6 * torch.randn_like(right), right)
    wrong = right.clone()
    wrong[1, 2] += 0.2  # one position of many
    assert differ(wrong, right)
    assert 0.15 < distance(wrong, right) < 0.25
    assert differ(wrong, right, torch.bfloat16) and not differ(wrong, right, torch.bfloat16, noise=0.1)
    noisy = right + 0.02 * torch.randn_like(right)
    assert differ(noisy, right) and not differ(noisy, right, torch.bfloat16)
    for value in (float("nan"), float("inf")):
        broken = right.clone()
        broken[0, 0, 0] = value
        assert differ(broken, right, torch.bfloat16, noise=1.0)
    masked = right.clone()
    masked[..., 3] = -torch.inf
    assert not differ(masked, masked.clone())
    assert differ(torch.tensor([1, 2]), torch.tensor([1, 3]))
    assert allowed(torch.float32, 0.0) < allowed(torch.float16) < allowed(torch.bfloat16)


# --- kept on disk -----------------------------------------------------------------------------------------------------


def forget() -> None:
    capability._KNOWN.clear()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.setattr(capability_store, "LEAST_PARAMETERS", 0)
    return tmp_path / "capability"


def test_the_answer_is_kept_for_other_processes(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep_model()
    found, noise = probe(model), noise_of(model, torch.bfloat16)
    assert len(list(store.iterdir())) == 1
    forget()
    monkeypatch.setattr(capability, "_probe", lambda *args: pytest.fail("was probed again"))
    again = deep_model()
    assert probe(again) == found
    assert noise_of(again, torch.bfloat16) == noise > 0


def test_another_model_dtype_or_attention_has_an_answer_of_its_own(store: Path) -> None:
    probe(deep_model())
    probe(deep_model(torch.float32))
    probe(deep_model(num_hidden_layers=2))
    eager = deep_model()
    eager.set_attn_implementation("eager")
    probe(eager)
    assert len(list(store.iterdir())) == 4


def test_a_broken_file_counts_as_none(store: Path) -> None:
    found = probe(deep_model())
    file = next(store.iterdir())
    for text in ("", "[]", "{}", json.dumps({"noise": 1}), file.read_text().replace('"tree"', '"forest"')):
        file.write_text(text)
        forget()
        assert probe(deep_model()) == found


def test_models_that_their_config_does_not_tell_are_not_kept(store: Path) -> None:
    class Own(tf.LlamaForCausalLM):
        pass

    config = deep_model().config
    probe(Own(config).eval())
    hooked = deep_model()
    hooked.model.layers[0].register_forward_hook(lambda *args: None)
    probe(hooked)
    assert not store.exists()
    capability_store.LEAST_PARAMETERS = 10**9  # restored by the fixture
    probe(deep_model())
    assert not store.exists()


def test_a_folder_that_cannot_be_written_is_no_error(store: Path) -> None:
    store.parent.joinpath("capability").write_text("a file, not a folder")
    assert probe(deep_model()).mode == "tree"
