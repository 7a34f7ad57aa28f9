"""SmolLM2-135M-Instruct for slow tests; they are skipped where it is not to be had."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from specdec.common.smollm2 import smollm2_path

TURNS = [
    "What is the capital of France? Answer in one sentence.",
    "Write a Python function that returns the sum of a list of numbers.",
    "Repeat this list and add two more items: apples, pears, plums, cherries.",
    "Tell a very short story about a fox and a river.",
]


@pytest.fixture(scope="session")
def smollm2_folder() -> str:
    """Where the model is: asked for before a test's own cache folder is set, so that it is converted once."""
    try:
        return str(smollm2_path())
    except (FileNotFoundError, ImportError) as error:
        pytest.skip(f"needs SmolLM2-135M-Instruct: {error}")


@cache
def loaded(folder: str, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    """The model, once per process and dtype."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()


@cache
def chat_inputs(folder: str, number: int) -> Any:
    """A prompt through the chat template."""
    from transformers import AutoTokenizer

    turns = [{"role": "user", "content": TURNS[number]}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
