"""Acceptance rules."""

if not __name__.startswith("specdec."):
    raise ImportError("import it as specdec.verifiers: 'verifiers' alone is not a package of this project")

from specdec.verifiers.base import Acceptance, Verifier
from specdec.verifiers.exact import ExactVerifier

VERIFIERS: dict[str, type[Verifier]] = {"exact": ExactVerifier}
"""Verifiers by name."""

__all__ = ["VERIFIERS", "Acceptance", "ExactVerifier", "Verifier"]
