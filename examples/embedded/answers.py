"""The target's own answers, as training text: a draft model is asked to continue these, not what people wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from rich.progress import track
from transformers import PreTrainedTokenizerFast, set_seed

BATCH = 64


def prompt_ids(prompts: Sequence[str], tokenizer: PreTrainedTokenizerFast, length: int) -> np.ndarray:
    """The last `length` tokens of every prompt that has as many, `[prompts, length]`: batches need no padding."""
    encoded = [tokenizer.backend_tokenizer.encode(prompt).ids[-length:] for prompt in prompts]
    return np.array([ids for ids in encoded if len(ids) == length], np.int64).reshape(-1, length)


def answer(model: Any, prompts: np.ndarray, tokens: int, seed: int = 0) -> np.ndarray:
    """Lets the model continue prompts, every other batch greedily and the others sampled at temperature 1.

    Returns:
        One stream of token ids: prompt, answer and an end-of-text token each.
    """
    return np.concatenate(list(_streams(model, prompts, tokens, seed)))


@torch.inference_mode()
def _streams(model: Any, prompts: np.ndarray, tokens: int, seed: int) -> Iterator[np.ndarray]:
    eos = int(model.generation_config.eos_token_id)
    for number, start in enumerate(track(range(0, len(prompts), BATCH), "answers")):
        set_seed(seed + number)
        ids = torch.from_numpy(prompts[start : start + BATCH]).to(model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=bool(number % 2),
            temperature=1.0,
            top_k=0,
        )
        for row in output.cpu().numpy():
            ended = np.flatnonzero(row[ids.shape[1] :] == eos)
            text = row[: ids.shape[1] + ended[0]] if len(ended) else row
            yield np.append(text, eos).astype(np.uint16)
