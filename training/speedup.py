"""What trained heads gain on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from specdec.common.provenance import hardware
from specdec.heads import MedusaHeads

REPEATS = 2
TEXT_PROMPT_TOKENS = 48
"""Tokens taken as the prompt of an example that is supervised from its start."""


def prompt_of(example: Any) -> list[int]:
    """The tokens before the first supervised one; the beginning of the text if there is none."""
    ids, supervised = list(example["input_ids"]), list(example["supervised"])
    first = supervised.index(True) if any(supervised) else 0
    return ids[:first] if first > 1 else ids[:TEXT_PROMPT_TOKENS]


def measure_speedup(
    target: Any, heads: MedusaHeads, examples: Sequence[Any], num_prompts: int, max_new_tokens: int
) -> dict[str, Any]:
    """Generates greedily with and without the heads, in turn, on held-out prompts.

    Args:
        target: The model that the heads are bound to.
        heads: With their accuracies.
        examples: Held-out ones; one more than is measured is used for the warm-up, if there is one.
        num_prompts: How many are measured.
        max_new_tokens: Longest completion.

    Returns:
        Tokens per second, speed-up over HF's `generate`, and tokens per pass, by method.
    """
    from specdec.benchmark.measuring import EncodedPrompt, Method, Settings, run_interleaved
    from specdec.benchmark.methods import HF_GENERATE, OFF, Contender
    from specdec.drafters.medusa import MedusaDrafter

    count = min(num_prompts + 1, len(examples))
    encoded = [
        EncodedPrompt(f"held-out {i}", torch.tensor([prompt_of(examples[i])], device=target.device))
        for i in range(count)
    ]
    methods = [
        Method(HF_GENERATE, lambda: target),
        Contender(OFF, lambda: None).method(target),
        Contender("specdec medusa", lambda: MedusaDrafter(heads)).method(target),
    ]
    settings = Settings.of(max_new_tokens)
    measured = run_interleaved(methods, encoded[:num_prompts], target, settings, encoded[-1], REPEATS)
    return {
        "hardware": hardware(),
        "num_prompts": len(encoded[:num_prompts]),
        "max_new_tokens": max_new_tokens,
        "methods": [asdict(row) for row in measured.rows()],
    }
