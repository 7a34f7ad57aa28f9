"""Drafters: what guesses the next tokens."""

if not __name__.startswith("specdec."):
    raise ImportError("import it as specdec.drafters: 'drafters' alone is not a package of this project")

from specdec.drafters.base import DraftContext, Drafter, Step
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.lookahead import LookaheadDrafter
from specdec.drafters.medusa import MedusaDrafter

DRAFTERS: dict[str, type[Drafter]] = {
    "auto": LookaheadDrafter,
    "lookahead": LookaheadDrafter,
    "medusa": MedusaDrafter,
}
"""Drafters by name."""

__all__ = ["DRAFTERS", "DraftContext", "DraftModelDrafter", "Drafter", "LookaheadDrafter", "MedusaDrafter", "Step"]
