"""Drafters: what guesses the next tokens."""

if not __name__.startswith("specdec."):
    raise ImportError("import it as specdec.drafters: 'drafters' alone is not a package of this project")

from specdec.drafters.auto import AutoDrafter
from specdec.drafters.base import DraftContext, Drafter, Step
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.eagle3 import Eagle3Drafter
from specdec.drafters.lookahead import LookaheadDrafter
from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.merged import MergedDrafter
from specdec.drafters.recycling import RecyclingDrafter
from specdec.drafters.spec_reason import SpecReasonDrafter

DRAFTERS: dict[str, type[Drafter]] = {
    "auto": AutoDrafter,
    "lookahead": LookaheadDrafter,
    "medusa": MedusaDrafter,
    "eagle3": Eagle3Drafter,
    "recycling": RecyclingDrafter,
    "draft-model": DraftModelDrafter,
    "spec-reason": SpecReasonDrafter,
}
"""Drafters by name."""

__all__ = [
    "DRAFTERS",
    "AutoDrafter",
    "DraftContext",
    "DraftModelDrafter",
    "Drafter",
    "Eagle3Drafter",
    "LookaheadDrafter",
    "MedusaDrafter",
    "MergedDrafter",
    "RecyclingDrafter",
    "SpecReasonDrafter",
    "Step",
]
