"""Writes the trained pair as transformers model folders, with cards."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "embedded"))
from export import write_model

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [reasoning, speculative-decoding]
---
# specdec reasoning test bed: {which}

A Llama model of {parameters:,} parameters that {does}. The task is synthetic arithmetic (see `../README.md`);
the model is fit for nothing else.

| | |
|---|---|
| data | generated chains, {tokens:,} tokens with padding; {rows} rows of {window} a step |
| shape | hidden {hidden}, {layers} layers, {heads} heads, vocabulary {vocab} |
| training | {steps:,} steps, Muon {muon_lr} and AdamW {adam_lr}, linear decay over the last {decay:,} tokens |
| held-out problems solved | {share:.1%} of {count}, greedy |

The weights are stored in bfloat16 and load as float32, which a CPU computes faster.
"""
DOES = {"target": "solves the problems", "draft": "drafts steps for the target"}


def write(
    which: str,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    state: dict[str, Any],
    share: float,
    count: int,
    out: Path,
) -> None:
    """Writes weights, tokenizer and card of a checkpoint's `state` to `out`."""
    config, phase = model.config, state["phases"][-1]
    card = CARD.format(
        which=which,
        does=DOES[which],
        parameters=model.num_parameters(),
        tokens=state["tokens"],
        rows=phase["batch"],
        window=phase["window"],
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        vocab=config.vocab_size,
        steps=state["step"],
        muon_lr=phase["muon_lr"],
        adam_lr=phase["adam_lr"],
        decay=phase["decay_tokens"],
        share=share,
        count=count,
    )
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as partial:
        write_model(model, tokenizer, Path(partial))
        (Path(partial) / "README.md").write_text(card)
        for file in Path(partial).iterdir():
            os.replace(file, out / file.name)  # a reader finds the old file or the new one, never a half
