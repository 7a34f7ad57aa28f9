"""`specdec roofline`: how near steps come to what the device can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.commands import options
from specdec.common.errors import UserError, user_errors
from specdec.common.loading import EMBEDDED, load_model, prepare_torch

MODES: dict[str, Any] = {"auto": "auto", "eager": "eager", "off": False}


def run(
    model: options.Model = EMBEDDED,
    nodes: Annotated[
        list[int] | None, typer.Option(help="Tree size, a power of 2; may be repeated. Default: 1, 2, 4, ... 64.")
    ] = None,
    context: Annotated[
        list[int] | None, typer.Option(min=2, help="Tokens in the kv cache; may be repeated. Default: 64 and 512.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    cuda_graphs: Annotated[str, typer.Option(help="auto, off, or eager: static shapes without capture.")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to a JSON file.")] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Compare step times with what the device can do at best, and show where the rest goes."""
    from rich.console import Console

    console = Console()
    console = console if console.is_terminal else Console(width=160)
    if cuda_graphs not in MODES:
        raise UserError(f"--cuda-graphs {cuda_graphs} is not known; use one of {', '.join(MODES)}")

    from specdec.benchmark.roofline import measure_roofline, roofline_tables
    from specdec.common.provenance import circumstances, model_info, write_json

    prepare_torch(threads)
    with console.status("loading the model") as status, user_errors(ValueError):
        target, _ = load_model(model, dtype, device)
        found = measure_roofline(
            target,
            nodes or (1, 2, 4, 8, 16, 32, 64),
            context or (64, 512),
            batch_size,
            MODES[cuda_graphs],
            lambda entry: status.update(f"{entry.nodes} nodes, {entry.context} tokens of context"),
        )
    console.print(roofline_tables(found))
    if json_file is not None:
        with user_errors(OSError):
            write_json(json_file, circumstances() | {"model": model_info(model, target)} | found.to_dict())
