"""Verifiers from the command line: settings follow from the fields of the verifier's dataclass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from specdec.common.conversion import convert
from specdec.common.errors import UserError, user_errors


@dataclass(frozen=True)
class VerifierFlags:
    """A verifier as the command line names it.

    Args:
        name: A name in `VERIFIERS`.
        options: `field=value` each.
    """

    name: str = "exact"
    options: Sequence[str] = ()

    def build(self) -> Any:
        """A new verifier.

        Raises:
            UserError: The name, a field or a value is not known or not allowed.
        """
        from specdec.verifiers import VERIFIERS

        if self.name not in VERIFIERS:
            raise UserError(f"--verifier {self.name} is not known; use one of {', '.join(VERIFIERS)}")
        verifier: Any = VERIFIERS[self.name]
        known = {f.name: f for f in fields(verifier) if f.init} if is_dataclass(verifier) else {}
        hints = get_type_hints(verifier) if known else {}
        settings = {}
        for option in self.options:
            key, sign, value = option.partition("=")
            key = key.strip().replace("-", "_")
            if not sign or key not in known:
                names = ", ".join(f"{name}={field.default}" for name, field in known.items()) or "none"
                raise UserError(
                    f"--verifier-option {option} is not a setting of verifier {self.name}; known are {names}"
                )
            with user_errors(ValueError):
                settings[key] = convert(value.strip(), hints[key], f"--verifier-option {key}")
        with user_errors(ValueError, TypeError):
            return verifier(**settings)
