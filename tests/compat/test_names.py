"""Names of transformers that moved or may move: each is in one module, and has a fallback."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from transformers.generation import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from specdec import compat
from specdec.kv_cache import TreeCache
from specdec.passes.capability import probe
from tests.conformance import RandomTreeDrafter, assert_identical, reference
from tests.tiny_models import EOS, MODELS, PAD, WINDOW, new_model, prompts, tiny_model

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("specdec", "drafters", "heads", "training", "verifiers", "examples", "benchmarks")
PRIVATE = (
    r"past_key_values|layer_class_to_replicate|GENERATION_MODES_MAPPING|get_layer_types_and_kwargs"
    r"|cache_utils import .*DummyLayer|\._prefill\b|\._update_model_kwargs_for_generation|\._sample\b"
    r"|_pad_token_tensor|_eos_token_tensor|_is_user_defined|_is_stateful|_supports_default_dynamic_cache"
    r"|from transformers[\w.]* import _"
)


def test_names_that_move_are_used_in_one_module_only() -> None:
    sources = sorted({path.resolve() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")})
    assert len(sources) > 150
    found = {path.name for path in sources if re.search(PRIVATE, path.read_text(encoding="utf-8"))}
    assert found == {"compat.py"}


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_those_of_the_models_own_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MODELS[name]()[1]
    known = compat.cache_layers(config)
    layers = tf.DynamicCache(config=config).layers
    assert len(known) == len(layers)
    for (kind, settings), layer in zip(known, layers, strict=True):
        assert (kind != "full_attention") == isinstance(layer, tf.cache_utils.DynamicSlidingWindowLayer)
        assert kind == "full_attention" or settings["sliding_window"] == layer.sliding_window == WINDOW
    monkeypatch.delattr(compat.caches, "get_layer_types_and_kwargs")
    windows = [(kind, settings["sliding_window"]) for kind, settings in known if kind != "full_attention"]
    unaided = compat.cache_layers(config)
    assert [kind for kind, _ in unaided] == [kind for kind, _ in known]
    assert [(kind, s["sliding_window"]) for kind, s in unaided if kind != "full_attention"] == windows


def test_layers_of_earlier_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 5.19 all layers share their settings; before 5.23 layers without attention have names of their own."""
    earlier = ["sliding_attention", "moe", "mlp"], {"sliding_window": 8}
    monkeypatch.setattr(compat.caches, "get_layer_types_and_kwargs", lambda config: earlier)
    layers = compat.cache_layers(SimpleNamespace())
    assert [kind for kind, _ in layers] == ["sliding_attention", "dummy", "dummy"]
    assert layers[0][1]["sliding_window"] == 8


def test_cache_with_a_layer_that_holds_nothing() -> None:
    """Behind another layer, as models have it; transformers reads its own length from the first one."""
    cache = TreeCache(["full_attention", "dummy"], capacity=4)
    keys = torch.zeros((1, 2, 3, 8))
    cache.update(keys, keys, 0)
    cache.end_prefill(1)
    assert cache.get_seq_length() == 3
    assert isinstance(cache.layers[1], compat.DummyLayer)
    assert cache.row(0)[1] is None


@pytest.mark.parametrize("inputs", [prompts(9), prompts(4, 9, 6)], ids=["single", "padded"])
def test_prompt_and_next_token_without_the_private_methods(inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model("llama")
    expected = reference(model, inputs, max_new_tokens=16)
    monkeypatch.delattr(GenerationMixin, "_prefill")
    monkeypatch.delattr(GenerationMixin, "_update_model_kwargs_for_generation")
    found = probe(model)
    assert found.mode == "tree", found
    report = assert_identical(model, RandomTreeDrafter, inputs, expected=expected, max_new_tokens=16)
    assert report.fallback is None


@pytest.mark.parametrize("whole", [False, True], ids=["new-tokens", "all-tokens"])
def test_prompt_behind_a_cache_without_the_private_method(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_model(), prompts(9)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        cache = tf.DynamicCache(config=model.config)
        model(input_ids=ids[:, :5], attention_mask=mask[:, :5], use_cache=True, **{compat.CACHE: cache})
        monkeypatch.delattr(GenerationMixin, "_prefill")
        kwargs = {"attention_mask": mask, "use_cache": True, compat.CACHE: cache}
        out = compat.prefill(model, ids if whole else ids[:, 5:], model.generation_config, kwargs)
    torch.testing.assert_close(out.logits[:, -1], expected[:, -1], atol=1e-4, rtol=1e-4)
    assert cache.get_seq_length() == 9


def test_decoding_method(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    assert compat.decoding_method(model, GenerationMode.BEAM_SEARCH) is type(model)._beam_search
    assert compat.decoding_method(model, GenerationMode.SAMPLE) is type(model)._sample
    monkeypatch.delattr(compat.generation_utils, "GENERATION_MODES_MAPPING")
    assert compat.decoding_method(model, GenerationMode.BEAM_SEARCH) is type(model)._beam_search
    assert compat.decoding_method(model, GenerationMode.SAMPLE) is type(model)._sample


def test_special_tokens_with_and_without_the_prepared_tensors() -> None:
    config: Any = tf.GenerationConfig(pad_token_id=PAD, eos_token_id=[EOS, 7])
    assert (compat.pad_token(config), compat.eos_tokens(config)) == (PAD, [EOS, 7])
    config._pad_token_tensor, config._eos_token_tensor = torch.tensor(5), torch.tensor([6])
    assert (compat.pad_token(config), compat.eos_tokens(config)) == (5, [6])
    config = tf.GenerationConfig()
    assert (compat.pad_token(config), compat.eos_tokens(config)) == (0, [])


def test_layers_are_added_as_a_first_forward_would() -> None:
    cache: Any = tf.DynamicCache()
    compat.add_layers(cache, 2)
    assert [type(layer) for layer in cache.layers] == [tf.cache_utils.DynamicLayer] * 2
    cache = SimpleNamespace(layers=[])
    compat.add_layers(cache, 2)
    assert [type(layer) for layer in cache.layers] == [tf.cache_utils.DynamicLayer] * 2
    cache = tf.DynamicCache(config=tiny_model().config)
    compat.add_layers(cache, 5)
    assert len(cache.layers) == 2


def test_whose_cache_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cache: Any = tf.DynamicCache()
    assert not compat.is_handed_in(None)
    assert not compat.is_handed_in(cache)
    monkeypatch.setattr(compat, "_MARKS_CACHES", False)
    assert compat.is_handed_in(cache)
    cache._is_user_defined = False
    assert not compat.is_handed_in(cache)
