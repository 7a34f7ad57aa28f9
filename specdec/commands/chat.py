"""`specdec chat`: a conversation in the terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer

import specdec
from specdec.commands import options
from specdec.commands.drafter_options import DrafterFlags
from specdec.commands.generate import Sampling
from specdec.common.errors import UserError, user_errors
from specdec.common.loading import load_model, prepare_torch

SMOLLM2 = "smollm2"
HELP = "/reset starts a new conversation, /quit ends; Ctrl-C stops an answer"


def run(
    model: options.Model = SMOLLM2,
    system: Annotated[str | None, typer.Option(help="The system's turn, before the first question.")] = None,
    drafter: options.DrafterName = "auto",
    drafter_option: options.DrafterSettings = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 512,
    show_drafts: Annotated[
        bool, typer.Option("--show-drafts", help="Colour the tokens that had been drafted.")
    ] = False,
    sample: options.Sample = False,
    temperature: Annotated[float | None, typer.Option(min=1e-3, help="Needs --sample.")] = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Talk to a chat model; answers are streamed, and the cache is kept from turn to turn."""
    kwargs = Sampling(temperature, None, None, None).kwargs(sample) | {"max_new_tokens": max_new_tokens}
    prepare_torch(threads)
    drafted = DrafterFlags(drafter, drafter_option or [], model).build()
    loaded, tokenizer = load_model(model, dtype, device)
    if not tokenizer.chat_template:
        raise UserError(f"{model} has no chat template; name a chat model, such as --model {SMOLLM2}")

    import torch

    from specdec.commands.conversation import Conversation

    torch.manual_seed(seed)
    with user_errors(ValueError, TypeError, OSError):
        fast = specdec.accelerate(loaded, drafted)
    conversation = Conversation(fast, tokenizer, system, show_drafts)
    typer.echo(HELP, err=True)
    for question in _questions():
        if question == "/quit":
            break
        if question == "/reset":
            conversation.reset()
            typer.echo("a new conversation", err=True)
        elif question.startswith("/"):
            typer.echo(HELP, err=True)
        elif question:
            with _interrupts(conversation):
                figures = conversation.ask(question, **kwargs)
            typer.secho(figures, err=True, dim=True)


def _questions() -> Iterator[str]:
    """The user's lines: asked for in a terminal, else read from stdin."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    with suppress(ImportError):  # lines can be edited where there is readline
        import readline  # noqa: F401
    while True:
        try:
            yield input("> ").strip()
        except KeyboardInterrupt:
            typer.echo(f"\n{HELP}", err=True)
        except EOFError:
            typer.echo(err=True)
            return


@contextmanager
def _interrupts(conversation: Any) -> Iterator[None]:
    """Ctrl-C ends the answer after the pass that is running, so that the cache stays whole."""
    before = signal.signal(signal.SIGINT, lambda number, frame: conversation.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
