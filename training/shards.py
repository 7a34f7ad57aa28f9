"""Resumable generation into a folder: a manifest, and one file per batch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specdec.training.records import DISTILLATION, SHARDS

OWN_PROMPTS = "own_prompts"
"""Folder inside the answers' folder with the prompts that the model wrote itself."""


def begin(folder: Path, manifest: dict[str, Any]) -> None:
    """Creates the folder, or checks that it belongs to the same distillation."""
    file = folder / DISTILLATION
    for name in (DISTILLATION, SHARDS):
        for left_over in folder.glob(f".{name}.*"):  # by a run that was killed
            left_over.unlink()
    if file.exists():
        old = json.loads(file.read_text(encoding="utf-8"))
        other = [name for name, value in manifest.items() if old.get(name) != value]
        if other:
            differences = ", ".join(f"{name} was {old.get(name)!r:.40} and is {manifest[name]!r:.40}" for name in other)
            raise ValueError(f"{folder} holds another distillation: {differences}; use another folder, or remove it")
        return
    folder.mkdir(parents=True, exist_ok=True)
    if any(path.name != OWN_PROMPTS for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and not of a distillation; use another folder")
    _write_atomically(file, json.dumps(manifest, indent=2) + "\n")


def shard_file(folder: Path, index: int) -> Path:
    """The file of a batch."""
    return folder / SHARDS.replace("*", f"{index:06d}")


def read_shard(file: Path) -> list[dict[str, Any]]:
    """The records of a batch."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def write_shard(file: Path, records: Sequence[dict[str, Any]]) -> None:
    """Writes the records of a batch: all of them, or no file."""
    _write_atomically(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _write_atomically(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


@contextmanager
def seeded(seed: int, index: int, device: torch.device) -> Iterator[None]:
    """Seeds the random numbers of one batch; restores the global state afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0] >> np.uint64(1)))
        yield


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def complete(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], ends: Sequence[int], /, **kwargs: Any
) -> list[list[int]]:
    """Continues a batch of prompts.

    Args:
        model: What has the `generate` method.
        tokenizer: Its tokenizer.
        prompts: Token ids.
        ends: Tokens that end a continuation.
        **kwargs: For `generate`.

    Returns:
        The new tokens of each prompt, up to and with the first end token.
    """
    padding = next((i for i in (tokenizer.pad_token_id, *ends) if i is not None), 0)
    width = max(map(len, prompts))
    ids = torch.tensor([[padding] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), pad_token_id=padding,
        eos_token_id=list(ends) or None, **kwargs,
    )[:, width:].tolist()  # fmt: skip
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in output]
