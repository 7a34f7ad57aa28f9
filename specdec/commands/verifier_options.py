"""Verifiers from the command line: settings are the fields of the verifier's dataclass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specdec.commands.drafter_options import settings_from
from specdec.common.errors import UserError, user_errors


def build_verifier(name: str, options: Sequence[str] = ()) -> Any:
    """A new verifier.

    Args:
        name: In `VERIFIERS`.
        options: `field=value` each.

    Raises:
        UserError: The name, a field or a value is not known or not allowed.
    """
    from specdec.verifiers import VERIFIERS

    if name not in VERIFIERS:
        raise UserError(f"--verifier {name} is not known; use one of {', '.join(VERIFIERS)}")
    settings = settings_from(options, VERIFIERS[name], "verifier", name)
    with user_errors(ValueError, TypeError):
        return VERIFIERS[name](**settings)
