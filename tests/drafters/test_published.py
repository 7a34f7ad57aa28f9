"""What a checkpoint is, is told from its config and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import specdec
from specdec.drafters import DraftModelDrafter, Eagle3Drafter, MedusaDrafter
from specdec.drafters.published import published_drafter
from tests.conformance import random_eagle3, random_heads, reference
from tests.tiny_models import prompts, tiny_model


def saved(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_each_kind_is_told_and_used(tmp_path: Path) -> None:
    model = tiny_model("llama")
    random_heads(model).save_pretrained(tmp_path / "medusa")
    random_heads(model).save_pretrained(tmp_path / "vllm", layout="vllm")
    random_eagle3(model).save_pretrained(tmp_path / "eagle", layout="eagle")
    random_eagle3(model).save_pretrained(tmp_path / "speculators")
    model.save_pretrained(tmp_path / "model")
    kinds = {"medusa": MedusaDrafter, "vllm": MedusaDrafter, "eagle": Eagle3Drafter, "speculators": Eagle3Drafter}
    inputs = prompts(9)
    expected = reference(model, inputs, max_new_tokens=8, do_sample=False)
    for name, kind in {**kinds, "model": DraftModelDrafter}.items():
        fast = specdec.accelerate(model, str(tmp_path / name), strict=True)
        assert isinstance(fast.drafter, kind)
        assert fast.generate(**inputs, max_new_tokens=8, do_sample=False).tolist() == expected.ids.tolist()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["EagleLlamaForCausalLM"], "model_type": "eagle"}, "holds EAGLE-1 or EAGLE-2"),
        ({"speculators_model_type": "peagle"}, "holds P-EAGLE"),
        ({"architectures": ["DFlashDraftModel"], "dflash_config": {}}, "holds DFlash"),
        ({"architectures": ["BertModel"]}, "holds BertModel; a drafter is made of"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_name(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        published_drafter(saved(tmp_path / "x", config))


def test_a_name_that_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"drafter='lookahaed' is not known; use one of 'auto', .*folder or hub name"):
        specdec.accelerate(tiny_model("llama"), "lookahaed")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        published_drafter(str(tmp_path))
