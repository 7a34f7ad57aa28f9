"""Writes trained models, their cards and the held-out prompts to the folder that the package ships."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import OTHER_DRAFT, Document, stream_file
from trainer import RECORD, RECORD_FILE, mean_loss
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PROMPT_TOKENS = 120
# What a prompt's function still holds after the cut, so that there is something to complete.
REST_TOKENS = 80
PROMPTS_A_FILE = 2

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [code, python, speculative-decoding]
---
# specdec embedded {which}

A Llama model of {parameters:,} parameters for trying and testing speculative decoding without a download.
It continues Python code in the manner of the standard library; it is not fit for any other use.

| | |
|---|---|
| data | source of the Python {python} standard library with its tests (licence PSF-2.0), {train_tokens:,} tokens |
| shape | hidden {hidden}, {layers} layers, {heads} heads, {kv_heads} key-value heads, vocabulary {vocab} |
| training | {steps:,} steps, {tokens:,} tokens: {phases} |
| {train_label} | {train_loss:.3f} nats a token, mean of the last 100 steps |
| held-out loss | {held_out_loss:.3f} nats a token, perplexity {perplexity:.2f}, on {held_out_tokens:,} other tokens |

The weights are stored in bfloat16 and load as float32, which a CPU computes faster.

To train it again, from the root of the repository, with the same Python version:

```bash
python examples/embedded/train.py corpus
python examples/embedded/train.py tokenizer{model}
{commands}
python examples/embedded/train.py export{model}
```
"""


def cut_prompts(
    documents: list[Document], tokenizer: PreTrainedTokenizerFast, per_file: int = PROMPTS_A_FILE
) -> list[dict[str, str]]:
    """The first tokens of functions and classes, cut in the middle of the body.

    Returns:
        `{"id": path:line, "prompt": text}`, at most `per_file` of a file; the same on every run.
    """
    prompts: list[dict[str, str]] = []
    for document in documents:
        starts = _long_definitions(document.text, tokenizer)
        ranked = sorted(starts, key=lambda line: hashlib.sha256(f"{document.path}:{line}".encode()).digest())
        prompts += [
            {"id": f"{document.path}:{line}", "prompt": _cut(starts[line], tokenizer)}
            for line in sorted(ranked[:per_file])
        ]
    return prompts


def _long_definitions(text: str, tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    """Source of the functions and classes long enough to be cut, by first line (decorators included)."""
    lines = text.splitlines(keepends=True)
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            source = "".join(lines[first - 1 : node.end_lineno])
            if len(tokenizer.backend_tokenizer.encode(source).ids) >= PROMPT_TOKENS + REST_TOKENS:
                found[first] = source
    return found


def _cut(source: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """The first tokens of `source`, ending where a piece of the pre-tokenizer ends.

    A cut inside a piece would encode to other tokens than those the model saw there in training.
    """
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(source)
    ends = [end for _, (_, end) in pieces]
    limit = tokenizer.backend_tokenizer.encode(source).offsets[PROMPT_TOKENS - 1][1]
    return source[: max(end for end in ends if end <= limit)]


def write_prompts(prompts: list[dict[str, str]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts), encoding="utf-8")


def export_model(
    which: str,
    work: Path,
    out: Path,
    tokenizer: PreTrainedTokenizerFast,
    held_out: np.ndarray,
    only_if_better: bool = False,
    window: int = 256,
) -> str:
    """Writes the checkpoint `work/which` as a transformers model directory; returns a line that says so."""
    state = torch.load(work / which / "checkpoint.pt", weights_only=True, map_location="cpu")
    model = LlamaForCausalLM(LlamaConfig.from_dict(state["config"]))
    model.load_state_dict(state["model"])
    loss = mean_loss(model.bfloat16().float(), held_out, window)
    if only_if_better and (out / "model.safetensors").exists():
        exported = mean_loss(LlamaForCausalLM.from_pretrained(out, dtype=torch.float32), held_out, window)
        if exported <= loss:
            return f"{which}: kept, its held-out loss is {exported:.4f}, the checkpoint's {loss:.4f}"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as partial:
        write_model(model, tokenizer, Path(partial))
        train_tokens = len(np.load(stream_file("train", which, work), mmap_mode="r"))
        record = json.dumps({name: state[name] for name in RECORD}, indent=1)
        (Path(partial) / RECORD_FILE).write_text(record + "\n")
        (Path(partial) / "README.md").write_text(_card(which, model, state, work, held_out, train_tokens, loss))
        for file in Path(partial).iterdir():
            os.replace(file, out / file.name)  # a reader finds the old file or the new one, never a half
    return f"{which}: {state['tokens']:,} tokens, held-out loss {loss:.4f}, written to {out}"


def write_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers loads in the dtype named here, whatever the file stores
    _edit(folder / "config.json", {"dtype": "float32"})
    # the name that every version of transformers knows
    _edit(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        ("is_local", "local_files_only"),
    )
    (folder / "model.safetensors").chmod(0o644)


def _edit(path: Path, values: dict[str, str], dropped: tuple[str, ...] = ()) -> None:
    content = {key: value for key, value in json.loads(path.read_text()).items() if key not in dropped}
    path.write_text(json.dumps(content | values, indent=2, sort_keys=True) + "\n")


def _card(
    which: str,
    model: LlamaForCausalLM,
    state: dict[str, Any],
    work: Path,
    held_out: np.ndarray,
    train_tokens: int,
    loss: float,
) -> str:
    config = model.config
    return CARD.format(
        which=which,
        parameters=model.num_parameters(),
        python=json.loads((work / "corpus.json").read_text())["python"],
        train_tokens=train_tokens,
        model=f" {which}" if which == OTHER_DRAFT else "",
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        vocab=config.vocab_size,
        steps=state["step"],
        tokens=state["tokens"],
        phases=_phases(state),
        commands="\n".join(_commands(which, state)),
        train_label="KL divergence from the target" if state["phases"][-1].get("teacher") else "training loss",
        train_loss=float(np.mean(state["losses"][-100:])),
        held_out_loss=loss,
        perplexity=math.exp(loss),
        held_out_tokens=len(held_out),
    )


def _phases(state: dict[str, Any]) -> str:
    return "; ".join(f"{p['batch']} windows of {p['window']} from step {p['from_step']}" for p in state["phases"])


def _commands(which: str, state: dict[str, Any]) -> list[str]:
    """One training command a phase; resuming with the next one gives the weights of this run again."""
    ends = [phase["from_tokens"] for phase in state["phases"][1:]] + [state["tokens"]]
    commands = []
    for phase, end in zip(state["phases"], ends, strict=True):
        # A phase left before its decay had a constant rate: no decay, but the same steps.
        decay = phase["decay_tokens"] if end > phase["tokens"] - phase["decay_tokens"] else 0
        if phase["optimizers_from"] == phase["from_step"] > 0:
            commands.append(f"python examples/embedded/train.py export {which}")
            start = f" --start-from specdec/assets/embedded/{which}"
        else:
            start = ""
        layers = f" --layers {phase['layers']}" if phase.get("layers") else ""
        if phase.get("answers"):
            commands.append("python examples/embedded/train.py answers")
            layers += f" --answers {phase['answers']}"
        teacher = f" --teacher {phase['teacher']}" if phase.get("teacher") else ""
        commands.append(
            f"python examples/embedded/train.py train {which} --tokens {end} --decay-tokens {decay}"
            f" --batch {phase['batch']} --window {phase['window']}"
            f" --muon-lr {phase['muon_lr']} --adam-lr {phase['adam_lr']}"
            f"{layers}{teacher}{' --bf16' * phase['bf16']}{' --compile' * phase['compiled']}{start}"
        )
    return commands
