"""What holds with every supported version of transformers: trees, the cache handed over, no deprecated name."""

from __future__ import annotations

import logging
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import specdec
from specdec.benchmark.roofline import step_costs
from specdec.budget import Budget
from specdec.compat import CACHE, TESTED
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.passes.capability import probe
from tests.conformance import RandomTreeDrafter, assert_identical, reference
from tests.tiny_models import LLAMA_LIKE, MODELS, new_model, prompts, tiny_model

ROOT = Path(__file__).resolve().parents[2]
SINGLE, PADDED = prompts(9), prompts(4, 9, 6)
ORDINARY = ("llama", "qwen3", "gemma3-mixed-windows", "gpt2", "mixtral")
"""Models whose trees every supported version of transformers must take."""


def ordinary_model(name: str) -> Any:
    if name in MODELS:
        return tiny_model(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tf.MixtralForCausalLM(tf.MixtralConfig(**LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2)).eval()


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_models_take_trees(name: str) -> None:
    model = ordinary_model(name)
    assert probe(model).mode == "tree", str(probe(model))
    for inputs in (SINGLE, PADDED):
        for do_sample in (False, True):
            kwargs = {"max_new_tokens": 20, "do_sample": do_sample, "eos_token_id": [2, 5, 9]}
            report = assert_identical(model, RandomTreeDrafter, inputs, **kwargs)
            assert (report.capability, report.fallback) == ("tree", None)
            assert report.num_accepted_tokens > 0


@contextmanager
def deprecations() -> Iterator[list[str]]:
    """Collects what transformers warns and logs inside about deprecated names, also what it has logged before."""
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger, collector = logging.getLogger("transformers"), Collector()
    level, once = logger.level, getattr(logging.Logger, "warning_once", None)
    if hasattr(once, "cache_clear"):
        once.cache_clear()
    logger.addHandler(collector)
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        logger.removeHandler(collector)
        logger.setLevel(level)
    found += [str(warning.message) for warning in caught]
    found[:] = [text for text in found if "deprecat" in text.lower()]


def calls(model: Any, inputs: dict[str, Tensor]) -> None:
    """Every way in which the package hands a cache to a model or takes one from it."""
    answers = reference(model, inputs, max_new_tokens=12).answers
    for drafter in (RandomTreeDrafter(answers), DraftModelDrafter(new_model("llama", seed=1))):
        for mode in ("auto", "chain"):
            fast = specdec.accelerate(model, drafter, capability=mode, strict=True, budget=Budget(8, fixed=True))
            fast.generate(**inputs, max_new_tokens=12)
    fast = specdec.accelerate(model, RandomTreeDrafter(answers), strict=True)
    cache = tf.DynamicCache(config=model.config)
    out = fast.generate(**inputs, max_new_tokens=12, return_dict_in_generate=True, **{CACHE: cache})
    assert out[CACHE] is cache
    with pytest.warns(specdec.generation.FallbackWarning):
        specdec.accelerate(model, capability="plain").generate(**inputs, max_new_tokens=4)
    step_costs(model)


@pytest.mark.parametrize("inputs", [SINGLE, PADDED], ids=["single", "padded"])
def test_no_name_that_transformers_has_deprecated_is_used(inputs: dict[str, Tensor]) -> None:
    model = new_model("llama")
    with deprecations() as found:
        calls(model, inputs)
    assert found == []


def test_deprecations_are_seen() -> None:
    model = tiny_model()
    with deprecations() as found:
        out = model(**SINGLE, past_key_values=tf.DynamicCache(config=model.config), use_cache=True)
        assert out.past_key_values is not None
    assert bool(found) == (CACHE != "past_key_values")


def test_tested_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"transformers>={TESTED[0]},<6" in project["dependencies"]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert any(pin.startswith(f"transformers=={TESTED[1]}.") for pin in pins)
