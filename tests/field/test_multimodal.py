"""Models that see: pictures belong to the prefill, and what follows is text."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf

import specdec
from specdec.budget import Budget
from specdec.generation import check_ids
from tests.conformance import RandomTreeDrafter, assert_identical, reference
from tests.tiny_models import LLAMA_LIKE, PAD

IMAGE = 5
ODD = 120


@cache
def llava() -> Any:
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        ),
        text_config=tf.LlamaConfig(**LLAMA_LIKE),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        pad_token_id=PAD,
    )
    torch.manual_seed(0)
    return tf.LlavaForConditionalGeneration(config).eval()


@cache
def gemma3() -> Any:
    """The picture's token has no embedding of its own, and sees the whole picture."""
    text = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "num_hidden_layers": 3}
    config = tf.Gemma3Config(
        text_config=tf.Gemma3TextConfig(**LLAMA_LIKE | text),
        vision_config=tf.SiglipVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        ),
        image_token_id=ODD,
        boi_token_id=ODD + 1,
        eoi_token_id=ODD + 2,
        mm_tokens_per_image=4,
        pad_token_id=PAD,
    )
    torch.manual_seed(0)
    return tf.Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("drafter", [RandomTreeDrafter, "lookahead", "auto"])
@pytest.mark.parametrize("has_types", [False, True])
def test_token_ids_beyond_the_embedding(batch: int, do_sample: bool, drafter: Any, has_types: bool) -> None:
    inputs = pictured(batch)
    is_image = inputs["input_ids"] == IMAGE
    inputs["input_ids"] = inputs["input_ids"].masked_fill(is_image, ODD)
    if has_types:
        inputs["token_type_ids"] = is_image.long()
    report = assert_identical(gemma3(), drafter, inputs, max_new_tokens=24, do_sample=do_sample)
    assert report.fallback is None
    check_ids(gemma3(), inputs["input_ids"])


def pictured(batch: int) -> dict[str, Any]:
    """Prompts of a picture (four patches) and text of different length, left-padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(6, 97, (batch, 12), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, :row] = 0
        ids[row, :row] = PAD
        ids[row, row + 1 : row + 5] = IMAGE
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn((batch, 3, 8, 8), generator=generator),
    }


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("drafter", [RandomTreeDrafter, None, "lookahead"])
def test_pictures_and_then_drafts(batch: int, do_sample: bool, drafter: Any) -> None:
    report = assert_identical(llava(), drafter, pictured(batch), max_new_tokens=24, do_sample=do_sample)
    assert report.fallback is None
    assert drafter is not RandomTreeDrafter or report.num_accepted_tokens > 0


def test_several_sequences_per_picture() -> None:
    kwargs = {"max_new_tokens": 16, "do_sample": True, "num_return_sequences": 2}
    assert_identical(llava(), None, pictured(2), **kwargs)


def test_pictures_on_chains_and_with_token_types() -> None:
    inputs = pictured(2)
    report = assert_identical(llava(), RandomTreeDrafter, inputs, max_new_tokens=16, capability="chain")
    assert report.fallback is None
    inputs = pictured(1)
    model = llava()
    expected = reference(model, inputs, max_new_tokens=16)
    fast = specdec.accelerate(model, RandomTreeDrafter(expected.answers), budget=Budget(64, fixed=True))
    again = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    assert fast.generate(**again, max_new_tokens=16).tolist() == model.generate(**again, max_new_tokens=16).tolist()
    assert fast.generate(**inputs, max_new_tokens=16).tolist() == expected.ids.tolist()
