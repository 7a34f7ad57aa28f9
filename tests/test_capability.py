"""The probe finds out how a model can be run ahead, and any answer is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import specdec
from specdec.compat import CACHE
from specdec.generation import FallbackWarning
from specdec.passes import capability
from specdec.passes.capability import Capability, probe
from specdec.passes.masks import MaskFormat
from tests.conformance import Answers, OracleDrafter, RandomTreeDrafter, assert_identical
from tests.tiny_models import BOS, EOS, MODELS, PAD, VOCAB, WINDOW, new_model, prompts, tiny_model

SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
SINGLE, PADDED = prompts(9), prompts(4, 9, 6)


def made(model_class: Any, config: Any, seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).eval()


def mamba() -> Any:
    config = tf.MambaConfig(
        vocab_size=VOCAB, hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.4, **SPECIAL
    )
    return made(tf.MambaForCausalLM, config)


def bloom() -> Any:
    config = tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.4, **SPECIAL)
    return made(tf.BloomForCausalLM, config)


def chain_oracle(answers: Answers) -> OracleDrafter:
    return OracleDrafter(answers, decoys=False)


@pytest.mark.parametrize("name", MODELS)
def test_models_with_plain_attention_take_trees(name: str) -> None:
    found = probe(tiny_model(name))
    assert found.mode == "tree"
    assert found.mask_format is not None
    assert str(found) == "tree: a branching tree gives the logits of plain decoding"


def test_masks_have_the_form_a_model_takes() -> None:
    formats = {name: probe(tiny_model(name)).mask_format for name in MODELS}
    assert formats["llama"] == MaskFormat()
    assert formats["mistral-window"] == MaskFormat(layer_types=("sliding_attention",), window=WINDOW)
    assert formats["gemma3-mixed-windows"] == MaskFormat(
        by_layer_type=True, layer_types=("sliding_attention", "full_attention"), window=WINDOW
    )
    chunked = formats["llama4-chunks"]
    assert chunked is not None
    assert chunked.by_layer_type and chunked.chunk == WINDOW


@pytest.mark.parametrize("name", ["llama", "gemma3-mixed-windows"])
def test_eager_attention_takes_additive_masks(name: str) -> None:
    model = new_model(name)
    model.set_attn_implementation("eager")
    found = probe(model)
    assert found.mode == "tree"
    assert found.mask_format is not None and found.mask_format.additive
    for inputs in (SINGLE, PADDED):
        report = assert_identical(model, RandomTreeDrafter, inputs, max_new_tokens=20, do_sample=True)
        assert report.capability == "tree"


@pytest.mark.parametrize("make", [mamba, bloom])
def test_models_that_cannot_be_shown_a_tree_are_exact_all_the_same(make: Any) -> None:
    model = make()
    found = probe(model)
    assert found.mode != "tree"
    assert found.reason
    for inputs in (SINGLE, PADDED):
        for do_sample in (False, True):
            kwargs = {"max_new_tokens": 20, "do_sample": do_sample}
            if found.mode == "plain":
                with pytest.warns(FallbackWarning):
                    report = assert_identical(model, chain_oracle, inputs, **kwargs)
                assert report.fallback
            else:
                report = assert_identical(model, chain_oracle, inputs, **kwargs)
                assert report.num_accepted_tokens > 0
            assert report.capability == found.mode


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mistral-window", "gemma3-mixed-windows"])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("inputs", [SINGLE, PADDED], ids=["single", "padded"])
def test_chains_are_exact(name: str, inputs: dict[str, Tensor], do_sample: bool) -> None:
    kwargs = {"max_new_tokens": 24, "do_sample": do_sample, "eos_token_id": [2, 5, 9]}
    for drafter in (RandomTreeDrafter, chain_oracle):
        report = assert_identical(tiny_model(name), drafter, inputs, capability="chain", **kwargs)
        assert report.capability == "chain"
    assert report.num_accepted_tokens > 0


def test_chain_leaves_the_cache_as_plain_decoding_does() -> None:
    model = tiny_model()
    kwargs = {"max_new_tokens": 16, "eos_token_id": None, "return_dict_in_generate": True}
    expected = model.generate(**SINGLE, **kwargs)
    answers = expected.sequences[:, 9:].tolist()
    fast = specdec.accelerate(model, OracleDrafter(answers, decoys=False), capability="chain", strict=True)
    got = fast.generate(**SINGLE, **kwargs)
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert got[CACHE].get_seq_length() == expected[CACHE].get_seq_length()
    for mine, theirs in zip(got[CACHE].layers, expected[CACHE].layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-5, rtol=1e-4)


def test_mode_can_be_demanded() -> None:
    model = tiny_model()
    for mode in ("tree", "chain", "plain"):
        assert probe(model, mode).mode == mode
        assert probe(model, mode).reason == "demanded by the caller"
    with pytest.warns(FallbackWarning, match="demanded by the caller"):
        report = assert_identical(model, OracleDrafter, PADDED, max_new_tokens=8, capability="plain")
    assert report.capability == "plain"
    assert_identical(model, OracleDrafter, PADDED, max_new_tokens=8, capability="tree")
    with pytest.raises(ValueError, match=r"capability='tree' cannot be used with MambaForCausalLM: it has .* layers"):
        probe(mamba(), "tree")
    with pytest.raises(ValueError, match="capability='forest' is not known; use 'auto' or one of 'tree', 'chain'"):
        probe(model, "forest")


def test_answer_is_kept_per_model_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tried = new_model("llama"), []
    right = capability._probe
    monkeypatch.setattr(capability, "_probe", lambda model, names: tried.append(model.dtype) or right(model, names))
    fast = specdec.accelerate(model, None)
    for _ in range(2):
        assert fast.capability.mode == "tree"
        fast.generate(**SINGLE, max_new_tokens=3)
    assert tried == [torch.float32]
    fast.to(torch.float64)
    assert fast.capability.mode == "tree"
    assert tried == [torch.float32, torch.float64]


def test_low_precision_passes_the_probe() -> None:
    assert probe(new_model("llama").to(torch.bfloat16)).mode == "tree"


class IgnoresPositions(tf.LlamaForCausalLM):
    """Makes its own positions of the length of the cache, as some models of remote code do."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, **kwargs)


class IgnoresMasks(tf.LlamaForCausalLM):
    """Attends to everything before, whatever the mask says."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=None, **kwargs)


class Broken(tf.LlamaForCausalLM):
    """Takes one token at a time only."""

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        if kwargs.get(CACHE) is not None and kwargs[CACHE].get_seq_length() and input_ids.shape[1] > 1:
            raise NotImplementedError("one token at a time")
        return super().forward(input_ids=input_ids, **kwargs)


@pytest.mark.parametrize("model_class", [IgnoresPositions, IgnoresMasks, Broken])
def test_models_that_do_something_else_are_found_out(model_class: Any) -> None:
    model = made(model_class, tiny_model().config)
    found = probe(model)
    assert found.mode != "tree"
    if model_class is Broken:
        assert found.mode == "plain"
        assert "one token at a time" in found.reason
    fast = specdec.accelerate(model, "lookahead", strict=True)
    expected = model.generate(**SINGLE, max_new_tokens=16)
    if found.mode == "plain":
        with pytest.warns(FallbackWarning):
            assert fast.generate(**SINGLE, max_new_tokens=16).tolist() == expected.tolist()
    else:
        assert fast.generate(**SINGLE, max_new_tokens=16).tolist() == expected.tolist()


def test_probe_leaves_model_and_generator_as_they_were() -> None:
    model = new_model("llama")
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.7
    model.generation_config.repetition_penalty = 1.2
    before = model.generation_config.to_dict(), model.config.to_dict(), set(model.__dict__)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert probe(model).mode == "tree"
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.generation_config.to_dict(), model.config.to_dict(), set(model.__dict__)) == before


def test_probe_of_a_model_with_unusual_defaults() -> None:
    model = new_model("llama")
    model.generation_config.num_beams = 3
    model.generation_config.cache_implementation = "static"
    model.generation_config.return_dict_in_generate = True
    model.generation_config.max_length = 4
    model.generation_config.min_length = 30
    assert isinstance(probe(model), Capability)
    assert probe(model).mode == "tree", probe(model).reason


def test_capability_is_shown_by_the_stand_in() -> None:
    fast = specdec.accelerate(tiny_model(), "lookahead")
    assert fast.capability == probe(tiny_model())
    assert specdec.accelerate(tiny_model(), "lookahead", capability="chain").capability.mode == "chain"
