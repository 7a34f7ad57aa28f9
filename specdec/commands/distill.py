"""`specdec distill`: the target writes the answers that heads are trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdec.commands import options
from specdec.commands.drafter_options import DrafterFlags
from specdec.commands.errors import user_errors
from specdec.commands.loading import EMBEDDED, load_model, prepare_torch

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


def run(
    prompts: Annotated[
        str,
        typer.Argument(
            help='JSONL of {"prompt": ...} or messages, text files, a folder of these, or a data set of the hub.'
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="For the answers; an interrupted run goes on from what is there.")],
    model: options.Model = EMBEDDED,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy; 0.3 gives more varied answers.")] = 0.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are answered at once.")] = 8,
    seed: options.Seed = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="So many prompts at most, chosen by the seed.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Text is cut into prompts of so many tokens.")] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="A prompt is a user's turn: apply the chat template.")] = False,
    chat_template: Annotated[
        Path | None, typer.Option(help="File with a Jinja template, in place of the tokenizer's own.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of a data set.")] = "train",
    text_field: Annotated[str | None, typer.Option(help="Field with text or turns, if it has no known name.")] = None,
    drafter: options.DrafterName = "lookahead",
    drafter_option: options.DrafterSettings = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    device_map: Annotated[str | None, typer.Option(help="As for from_pretrained: auto, balanced ...")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
    threads: options.Threads = None,
) -> None:
    """Let a model answer prompts, for training heads on its own answers; resumable."""
    prepare_torch(threads)
    guess = DrafterFlags(drafter, drafter_option or []).build()
    loaded, tokenizer = load_model(model, dtype, device, device_map, None, trust_remote_code)

    from rich.console import Console

    from specdec.training.distillation import distill
    from specdec.training.prompts import load_prompts

    console = Console(stderr=True)
    with user_errors(ValueError, OSError):
        chosen = load_prompts(
            prompts,
            tokenizer,
            prompt_tokens=prompt_tokens,
            split=split,
            text_field=text_field,
            limit=limit,
            seed=seed,
            chat=chat,
            chat_template=str(chat_template) if chat_template else None,
        )
    try:
        with user_errors(ValueError, OSError):
            report = distill(
                loaded,
                tokenizer,
                chosen,
                folder,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                batch_size=batch_size,
                drafter=guess,
                seed=seed,
                console=console,
            )
    except KeyboardInterrupt:
        typer.echo("Stopped; the same command goes on from here.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    typer.echo(str(report))
