"""Acceptance rules."""

if not __name__.startswith("specdec."):
    raise ImportError("import it as specdec.verifiers: 'verifiers' alone is not a package of this project")

from specdec.verifiers.base import Acceptance, Verifier
from specdec.verifiers.block import BlockVerifier
from specdec.verifiers.exact import ExactVerifier
from specdec.verifiers.judges import JUDGES, Judge, JudgedStep
from specdec.verifiers.step import StepVerifier, quantile_threshold
from specdec.verifiers.traversal import TraversalVerifier
from specdec.verifiers.typical import TypicalVerifier

VERIFIERS: dict[str, type[Verifier]] = {
    "exact": ExactVerifier,
    "block": BlockVerifier,
    "traversal": TraversalVerifier,
    "typical": TypicalVerifier,
    "step": StepVerifier,
}
"""Verifiers by name."""

__all__ = [
    "JUDGES",
    "VERIFIERS",
    "Acceptance",
    "BlockVerifier",
    "ExactVerifier",
    "Judge",
    "JudgedStep",
    "StepVerifier",
    "TraversalVerifier",
    "TypicalVerifier",
    "Verifier",
    "quantile_threshold",
]
