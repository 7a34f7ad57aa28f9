"""Drafters from the command line: settings are the fields of the drafter's dataclass."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from specdec.common.conversion import convert
from specdec.common.errors import UserError, user_errors
from specdec.common.loading import own_draft_model, path_of

DRAFT_MODEL = "draft_model"
"""The field of a drafter that takes a model by its name."""


@dataclass(frozen=True)
class DrafterFlags:
    """A drafter as the command line names it.

    Args:
        name: A name in `DRAFTERS`, or `"none"`.
        options: `field=value` each.
        model: The target's name; a drafter that asks a draft model takes the one that comes with it, unless told.
    """

    name: str
    options: Sequence[str] = ()
    model: str | None = None

    def build(self) -> Any:
        """A new drafter, or None for `"none"`.

        Raises:
            UserError: The name, a field or a value is not known or not allowed.
        """
        if self.name == "none":
            if self.options:
                raise UserError("--drafter-option has no meaning with --drafter none; leave one of them out")
            return None

        from specdec.drafters import DRAFTERS

        if "/" in self.name or os.path.isdir(self.name):
            from specdec.drafters.published import published_drafter

            if self.options:
                raise UserError(
                    "--drafter-option needs a drafter by name; give --drafter eagle3 --drafter-option head=..."
                )
            with user_errors(ValueError, OSError):
                return published_drafter(self.name)
        if self.name not in DRAFTERS:
            names = ", ".join(DRAFTERS)
            raise UserError(
                f"--drafter {self.name} is not known; use one of {names}, the folder or hub name of a draft "
                "checkpoint, or none"
            )
        drafter = DRAFTERS[self.name]
        known = fields_of(drafter)
        settings = settings_from(self.options, drafter, "drafter", self.name)
        if DRAFT_MODEL in known:
            settings[DRAFT_MODEL] = self._draft_model(settings.get(DRAFT_MODEL))
        for field in known.values():
            if field.default is MISSING and field.default_factory is MISSING and field.name not in settings:
                raise UserError(f"drafter {self.name} needs {field.name}; give --drafter-option {field.name}=...")
        with user_errors(ValueError, TypeError, OSError):
            return drafter(**settings)

    def _draft_model(self, name: str | None) -> str:
        """Folder or hub name of the draft model.

        Args:
            name: As the user gave it.

        Raises:
            UserError: There is none.
        """
        name = name or (own_draft_model(self.model) if self.model else None)
        if name is None:
            raise UserError(
                f"drafter {self.name} needs a draft model; give --drafter-option {DRAFT_MODEL}=..., a folder or hub "
                "name, or self for the target's own first layers"
            )
        return path_of(name)


def fields_of(method: Any) -> dict[str, Field[Any]]:
    """The settings of a drafter's or verifier's class, by name."""
    return {f.name: f for f in fields(method) if f.init} if is_dataclass(method) else {}


def settings_from(options: Sequence[str], method: Any, kind: str, name: str) -> dict[str, Any]:
    """Values of the fields that `name=value` options give.

    Args:
        options: From the command line.
        method: The class of the drafter or verifier.
        kind: `"drafter"` or `"verifier"`; names the flag in errors.
        name: Of the method.

    Raises:
        UserError: An option is no setting of the method, or its value is not allowed.
    """
    known, flag = fields_of(method), f"--{kind}-option"
    hints = get_type_hints(method) if known else {}
    settings = {}
    for option in options:
        key, sign, value = option.partition("=")
        key = key.strip().replace("-", "_")
        if not sign or key not in known:
            names = ", ".join(map(_described, known.values())) or "none"
            raise UserError(f"{flag} {option} is not a setting of {kind} {name}; known are {names}")
        with user_errors(ValueError):
            settings[key] = convert(value.strip() or value, hints.get(key, str), f"{flag} {key}")
    return settings


def _described(field: Field[Any]) -> str:
    if field.default is MISSING:
        return field.name
    shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    return f"{field.name}={shown}"
