"""Drafters from the command line: flags follow from the fields of the drafter's dataclass."""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from specdec.commands.errors import UserError, user_errors

BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class DrafterFlags:
    """A drafter as the command line names it.

    Args:
        name: A name in `DRAFTERS`, or `"none"`.
        options: `field=value` each.
    """

    name: str
    options: Sequence[str] = ()

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

        if self.name not in DRAFTERS:
            raise UserError(f"--drafter {self.name} is not known; use one of {', '.join(DRAFTERS)}, or none")
        drafter = DRAFTERS[self.name]
        known = _settings_of(drafter)
        settings = self._settings(known, get_type_hints(drafter))
        missing = [f.name for f in known.values() if _is_required(f) and f.name not in settings]
        if missing:
            raise UserError(f"drafter {self.name} needs {', '.join(missing)}; give --drafter-option {missing[0]}=...")
        with user_errors(ValueError, TypeError, OSError):
            return drafter(**settings)

    def _settings(self, known: dict[str, Field[Any]], hints: dict[str, Any]) -> dict[str, Any]:
        """Values of the fields that are given."""
        settings = {}
        for option in self.options:
            key, sign, value = option.partition("=")
            key = key.strip().replace("-", "_")
            if not sign or key not in known:
                names = ", ".join(map(_described, known.values())) or "none"
                raise UserError(f"--drafter-option {option} is not a setting of drafter {self.name}; known are {names}")
            with user_errors(ValueError):
                settings[key] = convert(value.strip(), hints.get(key, str), f"--drafter-option {key}")
        return settings


def convert(text: str, annotation: Any, what: str) -> Any:
    """A value of a field from its text.

    Args:
        text: As the user wrote it; members of a tuple or list are separated by commas.
        annotation: The field's type.
        what: Names the setting in errors.

    Raises:
        ValueError: The text is no value of this type.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _first_that_fits(text, arguments, what)
    if origin in (tuple, list, Sequence):
        parts = [part.strip() for part in text.strip("()[] ").split(",") if part.strip()]
        return (list if origin is list else tuple)(convert(part, arguments[0], what) for part in parts)
    choices = {str(choice): choice for choice in arguments} if origin is Literal else {}
    choices = BOOLEANS if annotation is bool else {"none": None} if annotation is type(None) else choices
    if choices:
        if text.lower() not in choices and text not in choices:
            raise ValueError(f"{what} must be one of {', '.join(choices)}, not {text!r}")
        return choices[text if text in choices else text.lower()]
    if annotation in (int, float):
        try:
            return annotation(text)
        except ValueError:
            raise ValueError(f"{what} must be of type {annotation.__name__}, not {text!r}") from None
    return text


def _first_that_fits(text: str, annotations: Sequence[Any], what: str) -> Any:
    """The text as `int | str | None` and the like; plain text only if nothing else fits."""
    for annotation in sorted(annotations, key=lambda a: a in (str, Any)):
        try:
            return convert(text, annotation, what)
        except ValueError:
            continue
    allowed = " or ".join(getattr(a, "__name__", str(a)) for a in annotations)
    raise ValueError(f"{what} must be {allowed}, not {text!r}")


def _settings_of(drafter: Any) -> dict[str, Field[Any]]:
    return {f.name: f for f in fields(drafter) if f.init} if is_dataclass(drafter) else {}


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _described(field: Field[Any]) -> str:
    if field.default is MISSING:
        return field.name
    shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    return f"{field.name}={shown}"
