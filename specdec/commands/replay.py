"""`specdec replay`: what a drafter would gain on recorded answers, without a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.commands import options
from specdec.commands.drafter_options import DrafterFlags
from specdec.common.errors import UserError, user_errors
from specdec.common.loading import path_of, read_text


def run(
    file: Annotated[
        Path,
        typer.Argument(help='JSONL, one {"prompt": ..., "answer": ...} a line: token ids, or text and --tokenizer.'),
    ],
    nodes: Annotated[int, typer.Option(min=1, help="Largest token tree, the root included.")] = 64,
    drafter: options.DrafterName = "lookahead",
    drafter_option: options.DrafterSettings = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub name of the target's tokenizer; needed for records of text.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most records to replay.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Replay recorded answers through a drafter: tokens per pass, acceptance per position, draft time."""
    if drafter == "none":
        raise UserError("--drafter none has nothing to replay; name a drafter")
    lines = read_text(file).splitlines()
    guess = DrafterFlags(drafter, drafter_option or []).build()

    from specdec.drafters import Drafter

    if type(guess).bind is not Drafter.bind and not guess.is_target_free:
        raise UserError(f"--drafter {drafter} needs the target, which recorded answers do not hold; use specdec bench")

    from rich.console import Console

    from specdec.benchmark.offline_replay import replay

    with user_errors(ValueError):
        result = replay(guess, islice(_records(file, lines, _loaded(tokenizer)), limit), nodes)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    else:
        Console().print(result)


def _loaded(tokenizer: str | None) -> Any:
    if tokenizer is None:
        return None
    from transformers import AutoTokenizer

    with user_errors(OSError, ValueError, ImportError, remedy="name a folder or a tokenizer of the Hugging Face hub"):
        return AutoTokenizer.from_pretrained(path_of(tokenizer, "tokenizer_config.json"))


def _records(file: Path, lines: list[str], tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Records as token ids.

    Raises:
        UserError: A line is not a record.
    """
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"line {number} of {file}"
            with user_errors(ValueError, remedy=f"{where} must be a JSON object"):
                record = json.loads(line)
            yield {key: _ids(record, key, where, tokenizer) for key in ("prompt", "answer")}


def _ids(record: Any, key: str, where: str, tokenizer: Any) -> list[int]:
    value = record.get(key) if isinstance(record, dict) else None
    if isinstance(value, str):
        if tokenizer is None:
            raise UserError(f"{where}: {key!r} is text; name the target's tokenizer with --tokenizer")
        value = tokenizer(value, add_special_tokens=key == "prompt").input_ids
    if not isinstance(value, list) or not all(isinstance(token, int) and token >= 0 for token in value):
        raise UserError(f'{where} is not a record; write {{"prompt": [ids], "answer": [ids]}}, or text in their place')
    return value
