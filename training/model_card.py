"""The README beside trained heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from specdec.common.loading import path_of

if TYPE_CHECKING:
    from specdec.training.results import TrainingResult

RECIPES = {
    "medusa-1": "Medusa-1: heads trained on the frozen model",
    "medusa-2": "Medusa-2, second stage: heads and LoRA adapters trained together on the data",
    "medusa-2-distill": "Medusa-2, one stage: heads and LoRA adapters, the model's output held to its own",
}
USE = """```python
import specdec
from specdec.drafters import MedusaDrafter
from specdec.heads import MedusaHeads
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({model!r})
{adapt}fast = specdec.accelerate(model, MedusaDrafter(MedusaHeads.from_pretrained({folder!r})))
```

The output is that of `model.generate`, token for token."""
ADAPT = """from peft import PeftModel  # the heads belong to the model with the adapters
model = PeftModel.from_pretrained(model, "{folder}/adapter").merge_and_unload()
"""
TRAINING = """# Medusa heads for {model}

{recipe} (arXiv 2401.10774). {shape}

## Use

{use}

## Training

| what | value |
| --- | --- |
| data | {source}: {examples:,} examples, {windows:,} windows |
| window | {window:,} tokens |
| steps | {steps:,} of {windows_per_step} windows |
| learning rate | {learning_rate:g}, {schedule} |
| time in steps | {seconds:,.0f} s |
| hardware | {hardware} |

All settings are in `training.yaml`, all figures in `figures.json`.

## Accuracy

Measured on {num_targets:,} held-out tokens. Head k predicts the k-th token after the next one.

{accuracies}

Expected tokens per target pass, heads taken as independent (`chain`: the first choice of each head only):

{expected}
"""


def model_card(result: TrainingResult, figures: Mapping[str, Any]) -> str:
    """Markdown with data, steps, accuracies, expected and measured gain.

    Args:
        result: Of a complete run.
        figures: What goes into `figures.json`.
    """
    config, evaluation = result.config, result.evaluation
    assert evaluation is not None
    names = {"model": path_of(config.model), "folder": config.output}
    is_joint = config.recipe != "medusa-1"
    expected = evaluation.tokens_per_pass
    is_on_hub = config.model.count("/") == 1 and not config.model.startswith((".", "~", "/"))
    front = ["---", "library_name: specdec", "tags: [speculative-decoding, medusa]"]
    values = {
        **config.to_dict(),
        **figures["data"],
        **figures["record"],
        "recipe": RECIPES[config.recipe],
        "shape": _shape(result),
        "use": USE.format(adapt=ADAPT.format(**names) if is_joint else "", **names),
        "steps": result.steps,
        "hardware": _hardware(figures["hardware"]),
        "num_targets": evaluation.num_targets,
        "accuracies": _accuracies(result),
        "expected": _table(list(expected), [[f"{value:.2f}" for value in expected.values()]]),
    }
    text = TRAINING.format(**values)
    parts = ["\n".join([*front, *([f"base_model: {config.model}"] if is_on_hub else []), "---"]), text.rstrip()]
    if is_joint:
        parts += ["## The model's own output", _own_output(result)]
    parts += ["## Measured speed-up", _speedup(result.speedup)]
    return "\n\n".join(parts) + "\n"


def _shape(result: TrainingResult) -> str:
    heads = result.heads.config
    text = f"Heads: {heads.num_heads}; residual blocks per head: {heads.num_layers}; version {heads.version}."
    if heads.draft_vocab_size is None:
        return text
    return f"{text} They name the {heads.draft_vocab_size:,} most frequent tokens of {heads.vocab_size:,}."


def _hardware(machine: Mapping[str, Any]) -> str:
    return ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['threads']} thread(s)"


def _accuracies(result: TrainingResult) -> str:
    evaluation = result.evaluation
    assert evaluation is not None
    columns = [evaluation.top(n) for n in (1, 2, 5, 10)]
    rows = [
        [str(k + 1), f"{loss:.3f}", *(f"{column[k]:.1%}" for column in columns)]
        for k, loss in enumerate(evaluation.losses)
    ]
    return _table(["head", "loss", "top-1", "top-2", "top-5", "top-10"], rows)


def _own_output(result: TrainingResult) -> str:
    assert result.evaluation is not None and result.before is not None
    columns = [result.before, result.evaluation.to_dict()]
    rows = [("perplexity", "perplexity", ".3f"), ("top-1", "own_accuracy", ".1%"),
            ("KL from the original, nats per token", "divergence", ".4f")]  # fmt: skip
    return _table(
        ["", "before", "after"], [[name, *(format(c[key], form) for c in columns)] for name, key, form in rows]
    )


def _speedup(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return (
            "Not measured; `specdec train-medusa --measure-prompts 8`, repeated with the same settings, fills this in."
        )
    rows = [
        [row["method"], f"{row['tokens_per_second']:.1f}", f"{row['speedup']:.2f}x", f"{row['tokens_per_pass']:.2f}",
         f"{row['num_identical']} of {row['num_runs']}"]
        for row in measured["methods"]
    ]  # fmt: skip
    return (
        f"{measured['num_prompts']} held-out prompts, {measured['max_new_tokens']} tokens, greedy, batch 1, "
        f"{_hardware(measured['hardware'])}; runs interleaved, medians.\n\n"
        + _table(["method", "tokens/s", "speed-up", "tokens per pass", "identical outputs"], rows)
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])
