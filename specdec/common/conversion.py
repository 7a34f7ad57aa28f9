"""Values of settings from text, as the command line and YAML have them."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin

BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


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
