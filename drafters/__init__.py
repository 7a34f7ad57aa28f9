"""Drafters: what guesses the next tokens."""

if not __name__.startswith("specdec."):
    raise ImportError("import it as specdec.drafters: 'drafters' alone is not a package of this project")

from specdec.drafters.base import DraftContext, Drafter, Step
from specdec.drafters.lookahead import LookaheadDrafter

DRAFTERS: dict[str, type[Drafter]] = {"auto": LookaheadDrafter, "lookahead": LookaheadDrafter}
"""Drafters by name."""

__all__ = ["DRAFTERS", "DraftContext", "Drafter", "LookaheadDrafter", "Step"]
