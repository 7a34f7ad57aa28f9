"""The README beside trained heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.training.results import TrainingResult

RECIPES = {
    "medusa-1": "Medusa-1: heads trained on the frozen model",
    "medusa-2": "Medusa-2, second stage: heads and LoRA adapters trained together on the data",
    "medusa-2-distill": "Medusa-2, one stage: heads and LoRA adapters, the model's output held to its own",
}
USE_HEADS = """```python
import specdec
from specdec.drafters import MedusaDrafter
from specdec.heads import MedusaHeads
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({model!r})
fast = specdec.accelerate(model, MedusaDrafter(MedusaHeads.from_pretrained({folder!r})))
```

The output is that of `model.generate`, token for token.
"""
USE_ADAPTER = """The heads belong to the model with the adapters in the folder `adapter`; merge them first:

```python
import specdec
from peft import PeftModel
from specdec.drafters import MedusaDrafter
from specdec.heads import MedusaHeads
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({model!r})
model = PeftModel.from_pretrained(model, "{folder}/adapter").merge_and_unload()
fast = specdec.accelerate(model, MedusaDrafter(MedusaHeads.from_pretrained({folder!r})))
```

Without `merge_and_unload()` the adapters stay apart, which a quantised model needs; that is a little slower. The
output is that of `model.generate` with the adapters, token for token.
"""


def model_card(result: TrainingResult, figures: Mapping[str, Any]) -> str:
    """Markdown with data, steps, accuracies, expected and measured gain.

    Args:
        result: Of a complete run.
        figures: What goes into `figures.json`.
    """
    config, evaluation = result.config, result.evaluation
    assert evaluation is not None
    is_joint = config.recipe != "medusa-1"
    names = {"model": _model_name(config.model), "folder": config.output}
    data, record = figures["data"], figures["record"]
    parts = [
        _front_matter(config.model),
        f"# Medusa heads for {config.model}",
        f"{RECIPES[config.recipe]} (arXiv 2401.10774). {_shape(result)}",
        "## Use",
        (USE_ADAPTER if is_joint else USE_HEADS).format(**names).rstrip(),
        "## Training",
        _table(
            ("what", "value"),
            [
                ("data", f"{data['source']}: {data['examples']:,} examples, {data['windows']:,} windows"),
                ("window", f"{config.window:,} tokens"),
                ("steps", f"{result.steps:,} of {record['windows_per_step']} windows"),
                ("learning rate", f"{config.learning_rate:g}, {config.schedule}"),
                ("time in steps", f"{record['seconds']:,.0f} s"),
                ("hardware", _hardware(figures["hardware"])),
            ],
        ),
        "All settings are in `training.yaml`, all figures in `figures.json`.",
        "## Accuracy",
        f"Measured on {evaluation.num_targets:,} held-out tokens. Head k predicts the k-th token after the next one.",
        _accuracies(result),
        "Expected tokens per target pass, heads taken as independent (`chain`: the first choice of each head only):",
        _table(tuple(evaluation.tokens_per_pass), [tuple(f"{v:.2f}" for v in evaluation.tokens_per_pass.values())]),
    ]
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


def _model_name(model: str) -> str:
    from specdec.common.loading import path_of

    return path_of(model)


def _front_matter(model: str) -> str:
    lines = ["---", "library_name: specdec", "tags: [speculative-decoding, medusa]"]
    if model.count("/") == 1 and not model.startswith((".", "~", "/")):
        lines.append(f"base_model: {model}")
    return "\n".join([*lines, "---"])


def _hardware(machine: Mapping[str, Any]) -> str:
    return ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['threads']} thread(s)"


def _accuracies(result: TrainingResult) -> str:
    evaluation = result.evaluation
    assert evaluation is not None
    columns = [evaluation.top(n) for n in (1, 2, 5, 10)]
    rows = [
        (str(k + 1), f"{loss:.3f}", *(f"{column[k]:.1%}" for column in columns))
        for k, loss in enumerate(evaluation.losses)
    ]
    return _table(("head", "loss", "top-1", "top-2", "top-5", "top-10"), rows)


def _own_output(result: TrainingResult) -> str:
    after, before = result.evaluation, result.before
    assert after is not None and before is not None
    return _table(
        ("", "before", "after"),
        [
            ("perplexity", f"{before['perplexity']:.3f}", f"{after.perplexity:.3f}"),
            ("top-1", f"{before['own_accuracy']:.1%}", f"{after.own_accuracy:.1%}"),
            ("KL from the original, nats per token", f"{before['divergence']:.4f}", f"{after.divergence:.4f}"),
        ],
    )


def _speedup(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return (
            "Not measured; `specdec train-medusa --measure-prompts 8`, repeated with the same settings, fills this in."
        )
    rows = [
        (
            row["method"],
            f"{row['tokens_per_second']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['tokens_per_pass']:.2f}",
            f"{row['num_identical']} of {row['num_runs']}",
        )
        for row in measured["methods"]
    ]
    intro = (
        f"{measured['num_prompts']} held-out prompts, {measured['max_new_tokens']} tokens, greedy, batch 1, "
        f"{_hardware(measured['hardware'])}; runs interleaved, medians."
    )
    return intro + "\n\n" + _table(("method", "tokens/s", "speed-up", "tokens per pass", "identical outputs"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
