"""Training of draft heads, and of the target model together with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specdec.common.lazy import lazy_names

if not __name__.startswith("specdec."):
    raise ImportError("import it as specdec.training: 'training' alone is not a package of this project")

if TYPE_CHECKING:
    from specdec.training.config import MedusaTrainingConfig
    from specdec.training.distillation import DistillationReport, distill
    from specdec.training.examples import Example, load_examples, show_example, split
    from specdec.training.medusa import train
    from specdec.training.own_prompts import write_prompts
    from specdec.training.packing import pack
    from specdec.training.prompts import DistillationPrompt, load_prompts
    from specdec.training.results import TrainingResult

__all__ = [
    "DistillationPrompt",
    "DistillationReport",
    "Example",
    "MedusaTrainingConfig",
    "TrainingResult",
    "distill",
    "load_examples",
    "load_prompts",
    "pack",
    "show_example",
    "split",
    "train",
    "write_prompts",
]

_HOMES = {
    "DistillationPrompt": "specdec.training.prompts",
    "DistillationReport": "specdec.training.distillation",
    "Example": "specdec.training.examples",
    "MedusaTrainingConfig": "specdec.training.config",
    "TrainingResult": "specdec.training.results",
    "distill": "specdec.training.distillation",
    "load_examples": "specdec.training.examples",
    "load_prompts": "specdec.training.prompts",
    "pack": "specdec.training.packing",
    "show_example": "specdec.training.examples",
    "split": "specdec.training.examples",
    "train": "specdec.training.medusa",
    "write_prompts": "specdec.training.own_prompts",
}
"""Names are looked up on first use: the command line reads the settings without waiting for torch."""

__getattr__, __dir__ = lazy_names(globals(), _HOMES)
