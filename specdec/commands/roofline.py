"""`specdec roofline`: how near steps come to what the device can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdec.commands import options
from specdec.common.errors import UserError, user_errors
from specdec.common.loading import EMBEDDED, load_model, prepare_torch


def run(
    model: options.Model = EMBEDDED,
    nodes: Annotated[
        list[int] | None, typer.Option(min=1, max=128, help="Tree size; may be repeated. Default: 1, 2, 4, ... 64.")
    ] = None,
    context: Annotated[
        list[int] | None, typer.Option(min=2, help="Tokens in the kv cache; may be repeated. Default: 64 and 512.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    drafter: Annotated[str, typer.Option(help="Of a short generation whose phases are shown; none for none.")] = "auto",
    cuda_graphs: Annotated[str, typer.Option(help="auto, eager or off; see accelerate.")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them to this PNG file.")] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Set step times against what the device could do at best, and show where the rest goes."""
    from rich.console import Console

    console = Console()
    console = console if console.is_terminal else Console(width=160)
    modes = {"auto": "auto", "eager": "eager", "off": False}
    if cuda_graphs not in modes:
        raise UserError(f"--cuda-graphs {cuda_graphs} is not known; use one of {', '.join(modes)}")

    from specdec.benchmark.roofline.measure import measure_roofline
    from specdec.benchmark.roofline.report import roofline_figure, roofline_tables
    from specdec.common.provenance import circumstances, model_info, write_json
    from specdec.drafters.by_name import resolve_drafter

    with user_errors(ValueError):
        made = None if drafter == "none" else resolve_drafter(drafter)
    prepare_torch(threads)
    with console.status("loading the model") as status, user_errors(ValueError):
        target, _ = load_model(model, dtype, device)
        found = measure_roofline(
            target,
            nodes or (1, 2, 4, 8, 16, 32, 64),
            context or (64, 512),
            batch_size,
            modes[cuda_graphs],  # type: ignore[arg-type]
            made,
            lambda entry: status.update(f"{entry.nodes} nodes behind {entry.context} tokens"),
        )
    console.print(roofline_tables(found))
    with user_errors(OSError):
        if json_file is not None:
            write_json(json_file, circumstances() | {"model": model_info(model, target)} | found.to_dict())
        if plot is not None:
            try:
                plot.parent.mkdir(parents=True, exist_ok=True)
                roofline_figure(found).savefig(plot, dpi=120)
            except ImportError:
                raise UserError("--plot needs matplotlib; pip install 'specdec-hf[notebook]'") from None
