"""Verifiers as users write them."""

from __future__ import annotations

from typing import Any

from specdec.verifiers import VERIFIERS
from specdec.verifiers.base import Verifier


def resolve_verifier(verifier: Any) -> Verifier:
    """A verifier from its name, or the verifier itself.

    Raises:
        ValueError: The name is not known.
        TypeError: It is neither a name nor a verifier.
    """
    if isinstance(verifier, Verifier):
        return verifier
    if isinstance(verifier, str):
        if verifier not in VERIFIERS:
            known = ", ".join(map(repr, VERIFIERS))
            raise ValueError(f"verifier={verifier!r} is not known; use one of {known}, or a Verifier")
        return VERIFIERS[verifier]()
    if isinstance(verifier, type) and issubclass(verifier, Verifier):
        raise TypeError(f"verifier={verifier.__name__} is a class; pass an instance: {verifier.__name__}()")
    raise TypeError(f"verifier must be a name ({', '.join(map(repr, VERIFIERS))}) or a Verifier, not {verifier!r}")
