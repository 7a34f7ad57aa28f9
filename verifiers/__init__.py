"""Acceptance rules."""

if not __name__.startswith("specdec."):
    raise ImportError("import it as specdec.verifiers: 'verifiers' alone is not a package of this project")

from specdec.verifiers.base import Acceptance, Verifier
from specdec.verifiers.block import BlockVerifier
from specdec.verifiers.exact import ExactVerifier
from specdec.verifiers.traversal import TraversalVerifier
from specdec.verifiers.typical import TypicalVerifier

VERIFIERS: dict[str, type[Verifier]] = {
    "exact": ExactVerifier,
    "block": BlockVerifier,
    "traversal": TraversalVerifier,
    "typical": TypicalVerifier,
}
"""Verifiers by name."""

__all__ = [
    "VERIFIERS",
    "Acceptance",
    "BlockVerifier",
    "ExactVerifier",
    "TraversalVerifier",
    "TypicalVerifier",
    "Verifier",
]
