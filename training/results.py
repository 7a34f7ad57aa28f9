"""What a training run writes: heads with their accuracies, adapters, figures, a model card."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from specdec.common.provenance import circumstances, hardware, write_json
from specdec.heads import MedusaHeads
from specdec.training.config import MedusaTrainingConfig
from specdec.training.data import TrainingData
from specdec.training.evaluation import Evaluation
from specdec.training.model_card import model_card
from specdec.training.recipes import ADAPTER_FOLDER, HeadsAndAdapters, Recipe

FIGURES_FILE = "figures.json"
REPEATS = 2
TEXT_PROMPT_TOKENS = 48
"""Length of the prompt of a held-out example that is supervised from its start."""


@dataclass
class TrainingResult:
    """What `train` returns.

    Args:
        config: Of the run, resolved.
        steps: Completed steps.
        is_complete: False when a signal stopped the run.
        heads: The heads as trained so far.
        evaluation: On held-out windows, at the end; None if the run is not complete.
        before: The evaluation before the first step, as a dictionary; of Medusa-2 only.
        speedup: Of generation, by method, if it was measured.
        stopped_by: The signal.
    """

    config: MedusaTrainingConfig
    steps: int
    is_complete: bool
    heads: MedusaHeads
    evaluation: Evaluation | None
    before: dict[str, Any] | None = None
    speedup: dict[str, Any] | None = None
    stopped_by: signal.Signals | None = None


def save_result(result: TrainingResult, recipe: Recipe, data: TrainingData, record: dict[str, Any]) -> None:
    """Writes everything into the output folder, and measures the speed-up if the config says so.

    Args:
        result: Of the run; its `speedup` is filled in.
        recipe: The module that was trained.
        data: What was trained on.
        record: Further figures for `figures.json` and the card.
    """
    assert result.evaluation is not None
    config, heads, folder = result.config, result.heads, Path(result.config.output)
    heads.calibration = result.evaluation.calibration()
    heads.save_pretrained(folder)
    target = recipe.target.eval()
    if isinstance(recipe, HeadsAndAdapters):
        target.save_pretrained(folder / ADAPTER_FOLDER)
    if config.measure_prompts:
        if isinstance(recipe, HeadsAndAdapters) and not getattr(target.get_base_model(), "is_quantized", False):
            target = target.merge_and_unload()
        heads.bind(target)
        examples = data.eval_examples
        result.speedup = measure_speedup(target, heads, examples, config.measure_prompts, config.measure_tokens)
    figures = {
        **circumstances(),
        "config": config.to_dict(),
        "steps": result.steps,
        "data": {"source": data.source, "examples": data.num_examples, "windows": len(data.train)},
        "evaluation": result.evaluation.to_dict(),
        "before": result.before,
        "speedup": result.speedup,
        "record": record,
    }
    write_json(folder / FIGURES_FILE, figures)
    (folder / "README.md").write_text(model_card(result, figures), encoding="utf-8")


def measure_speedup(
    target: Any, heads: MedusaHeads, examples: Sequence[Any], num_prompts: int, max_new_tokens: int
) -> dict[str, Any]:
    """Generates greedily with and without the heads, in turn, on held-out prompts.

    Args:
        target: The model that the heads are bound to.
        heads: With their accuracies.
        examples: Held-out ones; the one after those measured is for the warm-up.
        num_prompts: How many are measured.
        max_new_tokens: Longest completion.

    Returns:
        Tokens per second, speed-up over HF's `generate`, and tokens per pass, by method.
    """
    from specdec.api import accelerate
    from specdec.benchmark.measuring import EncodedPrompt, Method, Settings, run_interleaved
    from specdec.drafters.medusa import MedusaDrafter

    prompts = []
    for i in range(min(num_prompts + 1, len(examples))):
        ids, supervised = list(examples[i]["input_ids"]), list(examples[i]["supervised"])
        first = supervised.index(True)
        ids = ids[:first] if first > 1 else ids[:TEXT_PROMPT_TOKENS]
        prompts.append(EncodedPrompt(f"held-out {i}", torch.tensor([ids], device=target.device)))
    methods = [
        Method("HF generate", lambda: target),
        Method("specdec off", lambda: accelerate(target, None)),
        Method("specdec medusa", lambda: accelerate(target, MedusaDrafter(heads))),
    ]
    settings = Settings.of(max_new_tokens)
    measured = run_interleaved(methods, prompts[:num_prompts], target, settings, prompts[-1], REPEATS)
    return {
        "hardware": hardware(),
        "num_prompts": len(prompts[:num_prompts]),
        "max_new_tokens": max_new_tokens,
        "methods": [asdict(row) for row in measured.rows()],
    }
