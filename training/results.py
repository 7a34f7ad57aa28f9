"""What a training run leaves behind: heads with their accuracies, adapters, settings, figures, a model card."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType

from specdec.common.provenance import circumstances, write_json
from specdec.heads import MedusaHeads
from specdec.training.config import MedusaTrainingConfig
from specdec.training.data import TrainingData
from specdec.training.evaluation import Evaluation
from specdec.training.model_card import model_card
from specdec.training.recipes import HeadsAndAdapters, Recipe
from specdec.training.speedup import measure_speedup

FIGURES_FILE = "figures.json"


@dataclass
class TrainingResult:
    """What `train` returns.

    Args:
        config: As it was carried out.
        steps: Steps done.
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


def save_result(
    result: TrainingResult,
    recipe: Recipe,
    trained: Any,
    accelerator: Any,
    tokenizer: Any,
    data: TrainingData,
    record: dict[str, Any],
) -> TrainingResult:
    """Writes everything into the output folder, from the main process.

    Args:
        result: Of the run.
        recipe: The module that was trained.
        trained: The same as accelerate prepared it.
        accelerator: Of the run.
        tokenizer: The target's.
        data: What was trained on.
        record: Further figures for `figures.json` and the card.
    """
    assert result.evaluation is not None
    folder = Path(result.config.output)
    heads = _save_weights(recipe, trained, accelerator, folder, result.evaluation)
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        return result
    result.heads = heads
    if result.config.measure_prompts:
        target = _plain_target(recipe)
        result.speedup = measure_speedup(
            target, heads.bind(target), data.eval_examples, result.config.measure_prompts, result.config.measure_tokens
        )
    figures = {
        **circumstances(),
        "config": result.config.to_dict(),
        "steps": result.steps,
        "data": {"source": data.source, "examples": data.num_examples, "windows": len(data.train)},
        "evaluation": result.evaluation.to_dict(),
        "before": result.before,
        "speedup": result.speedup,
        "record": record,
    }
    write_json(folder / FIGURES_FILE, figures)
    (folder / "README.md").write_text(model_card(result, figures), encoding="utf-8")
    accelerator.wait_for_everyone()
    return result


def _save_weights(recipe: Recipe, trained: Any, accelerator: Any, folder: Path, evaluation: Evaluation) -> MedusaHeads:
    """Saves heads and adapters; returns the heads with all their parameters in this process."""
    heads, state = recipe.heads, None
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        state = accelerator.get_state_dict(trained)  # a part of it is in each process
    if not accelerator.is_main_process:
        return heads
    if state is not None:
        whole = MedusaHeads(heads.config)
        prefix = "heads."
        whole.load_state_dict({k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)})
        heads = whole
    heads.calibration = evaluation.calibration()
    heads.save_pretrained(folder)
    if isinstance(recipe, HeadsAndAdapters):
        prefix = "target."
        part = state and {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        recipe.save_adapter(folder, part)
    return heads


def _plain_target(recipe: Recipe) -> Any:
    """The target as it is used with the heads, adapters merged where they can be."""
    if not isinstance(recipe, HeadsAndAdapters):
        return recipe.target.eval()
    target = recipe.target.eval()
    return target if getattr(target.get_base_model(), "is_quantized", False) else target.merge_and_unload()
