"""Errors that a user can put right: one line, the remedy in it, exit code 2."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import typer

Args = ParamSpec("Args")
Result = TypeVar("Result")


class UserError(Exception):
    """What the user asked for cannot be done; the message says why and what can."""


@contextmanager
def user_errors(*kinds: type[Exception], remedy: str = "") -> Iterator[None]:
    """Takes errors of these kinds for the user's; around calls whose arguments are the user's own.

    Args:
        kinds: Classes of errors.
        remedy: Appended to the first line of the message.
    """
    try:
        yield
    except kinds as error:
        first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError("; ".join(filter(None, [first_line.strip().rstrip(".:"), remedy]))) from error


def with_short_errors(command: Callable[Args, Result]) -> Callable[Args, Result]:
    """Turns a command's `UserError` into one line on stderr."""

    @wraps(command)
    def wrapped(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        try:
            return command(*args, **kwargs)
        except UserError as error:
            if os.environ.get("SPECDEC_TRACEBACK"):
                raise
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from None

    return wrapped
