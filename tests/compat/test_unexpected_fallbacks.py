"""A model that should take drafts and does not is reported with versions and remedy; other fallbacks are as before."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers as tf

import specdec
from specdec import fallback, generation
from specdec.compat import TESTED
from specdec.fallback import FallbackWarning, UnexpectedFallbackWarning, takes_drafts
from specdec.passes import capability
from specdec.passes.capability import Capability
from specdec.target import CacheNotFilledError
from tests.tiny_models import BOS, EOS, PAD, VOCAB, new_model, prompts, tiny_model

SINGLE = prompts(9)
REMEDY = (
    rf"LlamaForCausalLM has attention layers only and should take drafts.*torch {torch.__version__.split('+')[0]}"
    rf".*transformers {tf.__version__}.*Install transformers {TESTED[0]} to {TESTED[1]}.*capability='plain'"
)


def mamba() -> Any:
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    config = tf.MambaConfig(vocab_size=VOCAB, hidden_size=32, state_size=4, num_hidden_layers=2, **special)
    return tf.MambaForCausalLM(config).eval()


def no_cache_is_seen(monkeypatch: pytest.MonkeyPatch) -> str:
    for module in (fallback, capability):
        monkeypatch.setattr(module, "CACHE", "renamed")
    return "keeps no kv cache"


def probe_fails(monkeypatch: pytest.MonkeyPatch) -> str:
    def failing(*_: Any) -> Capability:
        raise AttributeError("'DynamicCache' object has no attribute 'moved'")

    monkeypatch.setattr(capability, "_compare", failing)
    return "the probe failed: AttributeError: .* no attribute 'moved'"


def cache_is_not_filled(monkeypatch: pytest.MonkeyPatch) -> str:
    def failing(*_: Any) -> None:
        raise CacheNotFilledError("the model does not use the kv cache it is given")

    monkeypatch.setattr(generation.Speculation, "_speculate", failing)
    return "does not use the kv cache"


@pytest.mark.parametrize("broken", [no_cache_is_seen, probe_fails, cache_is_not_filled])
def test_warns_once_with_versions_and_remedy(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model("llama")
    expected = model.generate(**SINGLE, max_new_tokens=8)
    reason = broken(monkeypatch)
    fast = specdec.accelerate(model, "lookahead")
    with pytest.warns(UnexpectedFallbackWarning, match=rf"(?s){reason}.*{REMEDY}"):
        got = fast.generate(**SINGLE, max_new_tokens=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        again = fast.generate(**SINGLE, max_new_tokens=8)
    assert got.tolist() == again.tolist() == expected.tolist()
    assert fast.report.capability == "plain"


@pytest.mark.parametrize("case", ["recurrent layers", "demanded", "beams", "no cache wanted"])
def test_expected_reasons_warn_as_before(case: str) -> None:
    model = mamba() if case == "recurrent layers" else tiny_model()
    kwargs = {"beams": {"num_beams": 2}, "no cache wanted": {"use_cache": False}}.get(case, {})
    fast = specdec.accelerate(model, "lookahead", capability="plain" if case == "demanded" else "auto")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast.generate(**SINGLE, max_new_tokens=4, **kwargs)
    assert [w.category for w in caught if issubclass(w.category, FallbackWarning)] == [FallbackWarning]


def test_which_models_should_take_drafts() -> None:
    assert all(takes_drafts(tiny_model(name)) for name in ("llama", "gpt2", "gemma3-mixed-windows", "llama4-chunks"))
    assert not takes_drafts(mamba())
