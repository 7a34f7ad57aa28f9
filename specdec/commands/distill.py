"""`specdec distill`: the target writes the answers that heads are trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.commands import options
from specdec.commands.drafter_options import DrafterFlags
from specdec.common.errors import UserError, user_errors
from specdec.common.loading import EMBEDDED, load_model, prepare_torch

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


def run(
    prompts: Annotated[
        str,
        typer.Argument(
            help='JSONL of {"prompt": ...} or messages, text files, a folder of these, or a data set of the hub. '
            "Leave it out with --own-prompts.",
            metavar="[PROMPTS]",
        ),
    ],
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="For the answers; an interrupted run continues from what is there.",
            metavar="FOLDER",
            show_default=False,
        ),
    ] = None,
    own_prompts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The chat model writes this many prompts itself: questions, explanations, stories, code, and tasks "
            "over texts that it wrote. No data set is needed.",
        ),
    ] = None,
    model: options.Model = EMBEDDED,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens per answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy; 0.3 gives more varied answers.")] = 0.0,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts that are answered at once: 8 by default, 32 with --own-prompts."),
    ] = None,
    seed: options.Seed = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="So many prompts at most, chosen by the seed.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Text is cut into prompts of so many tokens.")] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="A prompt is a user's turn: apply the chat template.")] = False,
    chat_template: Annotated[
        Path | None, typer.Option(help="File with a Jinja template, in place of the tokenizer's own.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of a data set.")] = "train",
    text_field: Annotated[str | None, typer.Option(help="Field with text or turns, if it has no known name.")] = None,
    drafter: Annotated[
        str | None,
        typer.Option(help="Drafter by name, none for drafting off: lookahead by default, none with --own-prompts."),
    ] = None,
    drafter_option: options.DrafterSettings = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    device_map: Annotated[str | None, typer.Option(help="As for from_pretrained: auto, balanced ...")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
    threads: options.Threads = None,
) -> None:
    """Let a model answer prompts, for training heads on its own answers; resumable.

    `specdec distill prompts.jsonl answers/` answers given prompts; `specdec distill --own-prompts 3000 answers/` lets
    a chat model write the prompts too.
    """
    target = _folder(prompts, folder, own_prompts)
    if own_prompts is not None and (limit is not None or chat or text_field is not None):
        raise UserError(
            "--limit, --chat and --text-field choose among given PROMPTS; leave them out with --own-prompts"
        )
    if batch_size is None:
        batch_size = 32 if own_prompts else 8
    prepare_torch(threads)
    guess = DrafterFlags(drafter or ("none" if own_prompts else "lookahead"), drafter_option or []).build()
    loaded, tokenizer = load_model(model, dtype, device, device_map, None, trust_remote_code)

    from rich.console import Console

    from specdec.training.distillation import distill
    from specdec.training.own_prompts import write_prompts
    from specdec.training.prompts import load_prompts

    console = Console(stderr=True)
    template = str(chat_template) if chat_template else None

    shared: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "console": console}
    try:
        with user_errors(ValueError, OSError):
            if own_prompts is not None:
                chosen = write_prompts(loaded, tokenizer, own_prompts, target, chat_template=template, **shared)
            else:
                chosen = load_prompts(
                    prompts, tokenizer, prompt_tokens=prompt_tokens, split=split, text_field=text_field, limit=limit,
                    seed=seed, chat=chat, chat_template=template,
                )  # fmt: skip
            report = distill(
                loaded, tokenizer, chosen, target,
                max_new_tokens=max_new_tokens, temperature=temperature, drafter=guess, **shared,
            )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo("Stopped; the same command goes on from here.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    typer.echo(str(report))


def _folder(prompts: str, folder: Path | None, own_prompts: int | None) -> Path:
    """Where the answers go: the second argument, or with --own-prompts the only one."""
    if own_prompts is None and folder is None:
        raise UserError(
            "distill needs PROMPTS and FOLDER; to let the model write the prompts too: "
            f"specdec distill --own-prompts 3000 {prompts}"
        )
    if own_prompts is not None and folder is not None:
        raise UserError(f"--own-prompts {own_prompts} takes FOLDER alone, and got {prompts} too; leave one of them out")
    return folder or Path(prompts)
