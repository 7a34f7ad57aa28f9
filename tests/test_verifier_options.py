"""Verifiers by name and settings, as the command line has them."""

from __future__ import annotations

import pytest

from specdec.commands.verifier_options import build_verifier
from specdec.common.errors import UserError
from specdec.verifiers import ExactVerifier, StepVerifier, TypicalVerifier


def test_verifiers_by_name_and_settings() -> None:
    assert build_verifier("exact") == ExactVerifier()
    assert build_verifier("typical", ["epsilon=0.2"]) == TypicalVerifier(epsilon=0.2)
    made = build_verifier("step", ["threshold=-1.5", "judge=log-prob", "min-digit-mass=0.2"])
    assert made == StepVerifier(-1.5, "log-prob", 0.2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("strict", [], "--verifier strict is not known; use one of exact, block"),
        ("exact", ["threshold=3"], "--verifier-option threshold=3 is not a setting of verifier exact; known are none"),
        ("step", ["limit=3"], r"known are threshold=7\.0, judge=expectation"),
        ("step", ["threshold=high"], "--verifier-option threshold must be of type float"),
        ("step", ["threshold=11"], "threshold=11.0 is no score"),
    ],
)
def test_what_is_not_known(name: str, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_verifier(name, options)
