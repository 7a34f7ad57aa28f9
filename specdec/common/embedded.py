"""The two small models that come with the package, and prompts they have not seen in training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

NAMES = ("target", "draft")


@dataclass(frozen=True)
class Prompt:
    """A prompt by name.

    Args:
        id: Where it comes from.
        text: What is to be completed.
    """

    id: str
    text: str


def embedded_path(name: str = "target") -> Path:
    """Folder of an embedded model, in transformers' format.

    Args:
        name: `"target"` or `"draft"`.

    Raises:
        ValueError: There is no model of this name.
        FileNotFoundError: The models are missing from this installation.
    """
    if name not in NAMES:
        raise ValueError(f"name={name!r} is not an embedded model; use one of {', '.join(map(repr, NAMES))}")
    return _asset(name)


def load_embedded(name: str = "target") -> tuple[Any, Any]:
    """Loads an embedded model in float32 on the CPU.

    Args:
        name: `"target"` or `"draft"`. Both have the same tokenizer.

    Returns:
        The model, ready for inference, and its tokenizer.

    Raises:
        ValueError: There is no model of this name.
        FileNotFoundError: The models are missing from this installation.
    """
    path = embedded_path(name)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path)


def heldout_prompts(count: int | None = None) -> list[Prompt]:
    """Beginnings of Python functions and classes from files that the embedded models were not trained on.

    Args:
        count: So many at most, spread over all files; None for all.

    Raises:
        FileNotFoundError: The prompts are missing from this installation.
    """
    lines = _asset("heldout.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [Prompt(record["id"], record["prompt"]) for record in map(json.loads, lines)]
    if count is None or count >= len(prompts):
        return prompts
    return [prompts[i * len(prompts) // count] for i in range(count)]


def _asset(name: str) -> Path:
    path = Path(str(files("specdec").joinpath("assets", "embedded", name)))
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing from this installation; make it with examples/embedded/train.py, "
            "or name another model with --model"
        )
    return path
