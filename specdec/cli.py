"""The command `specdec`.

Nothing here or at the top of a command's file imports torch or transformers: help and errors must come at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

from specdec.commands import COMMANDS
from specdec.common.errors import with_short_errors

app = typer.Typer(
    name="specdec",
    help="Exact speculative decoding for Hugging Face causal language models: the same tokens, sooner.",
    epilog="Set SPECDEC_TRACEBACK=1 to see where an error comes from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from specdec import __version__

        typer.echo(f"specdec {__version__}")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """What all commands have in common."""


for _name in COMMANDS:
    _module = import_module(f"specdec.commands.{_name.replace('-', '_')}")
    app.command(_name)(with_short_errors(_module.run))
