"""`specdec tune-tree`: measures Medusa heads and this device, and stores the best tree beside the heads."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.commands import options
from specdec.common.errors import UserError, user_errors
from specdec.common.loading import EMBEDDED, load_model, path_of, prepare_torch

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from specdec.training.tree_tuning import Tuning


def run(
    data: Annotated[
        str,
        typer.Option(
            help="Prompts that the model answers first, as for specdec distill; or a folder that specdec distill wrote."
        ),
    ],
    model: options.Model = EMBEDDED,
    heads: Annotated[
        str | None, typer.Option(help="Folder or hub name of the heads; default: the folder medusa in the model's.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="For medusa_tree.json; default: the heads' own folder.")] = None,
    max_nodes: Annotated[int, typer.Option(help="Largest tree, the root included: 2, 4, ... 128.")] = 64,
    top_k: Annotated[int, typer.Option(min=1, help="Length of each head's list.")] = 10,
    limit: Annotated[int, typer.Option(min=1, help="So many prompts at most, chosen by the seed.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=8, help="Tokens per answer at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the answers; 0: greedy.")] = 0.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are answered at once.")] = 8,
    seed: options.Seed = 0,
    chat: Annotated[bool, typer.Option("--chat", help="A prompt is a user's turn: apply the chat template.")] = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Measure Medusa heads on the model's own text and passes on this device; store accuracies and the best tree."""
    from specdec.tree import NODE_BUCKETS

    if max_nodes not in NODE_BUCKETS[1:]:
        raise UserError(f"--max-nodes {max_nodes} is not allowed; use one of {', '.join(map(str, NODE_BUCKETS[1:]))}")
    source = heads or str(Path(path_of(model)) / "medusa")
    if output is None and not Path(source).is_dir():
        remedy = "name a folder with --output" if heads else "name heads with --heads"
        raise UserError(f"{source} is not a folder, and the result is stored beside the heads; {remedy}")
    prepare_torch(threads)

    from rich.console import Console

    from specdec.heads import MedusaHeads
    from specdec.training.tree_tuning import tune

    console = Console()
    with user_errors(ValueError, OSError):
        loaded_heads = MedusaHeads.from_pretrained(source)
    target, tokenizer = load_model(model, dtype, device)
    with user_errors(ValueError, OSError):
        loaded_heads.bind(target)
        answers = _answers(
            target, tokenizer, data, limit, chat, console,
            max_new_tokens=max_new_tokens, temperature=temperature, batch_size=batch_size, seed=seed,
        )  # fmt: skip
        with console.status("measuring heads and passes"):
            tuning = tune(target, loaded_heads, answers, num_ranks=top_k, max_nodes=max_nodes)
        folder = output or Path(source)
        tuning.calibration.save(folder)
    console.print(_accuracies(tuning), _trees(tuning), sep="\n")
    console.print(f"written to {folder / 'medusa_tree.json'}", highlight=False, soft_wrap=True)


def _answers(target: Any, tokenizer: Any, data: str, limit: int, chat: bool, console: Console, **kwargs: Any) -> Any:
    """What the target wrote: read from a folder of answers, or written now."""
    from specdec.training.distillation import distill
    from specdec.training.examples import load_examples
    from specdec.training.prompts import load_prompts
    from specdec.training.records import DISTILLATION

    if (Path(data).expanduser() / DISTILLATION).is_file():
        return load_examples(data, tokenizer, limit=limit, seed=kwargs["seed"])
    prompts = load_prompts(data, tokenizer, limit=limit, seed=kwargs["seed"], chat=chat)
    with tempfile.TemporaryDirectory() as folder:
        distill(target, tokenizer, prompts, folder, console=console, **kwargs)
        return load_examples(folder, tokenizer)


def _accuracies(tuning: Tuning) -> Table:
    from rich.table import Table

    calibration = tuning.calibration
    table = Table(title=f"the model's own pick is among a head's first ... ({calibration.num_tokens} positions)")
    num_ranks = len(calibration.accuracies[0])
    shown = [n for n in (1, 2, 3, 5, 10) if n < num_ranks] + [num_ranks]
    for name in ("head", *map(str, shown)):
        table.add_column(name, justify="right")
    for head, ranks in enumerate(calibration.accuracies, 1):
        table.add_row(str(head), *(f"{sum(ranks[:n]):.1%}" for n in shown))
    return table


def _trees(tuning: Tuning) -> Table:
    from rich.table import Table

    plain, chosen = tuning.candidates[0], tuning.chosen
    pays = chosen.tokens_per_second > plain.tokens_per_second
    table = Table(
        title=f"tokens per pass by size of the tree; {tuning.calibration.device}",
        caption="Measured; expected of independent heads; measured of the default tree. "
        f"{tuning.draft_seconds * 1e3:.2f} ms of each pass are the draft."
        + ("" if pays else " No tree is faster than plain decoding here: the least slow one is stored."),
    )
    for name in ("nodes", "depth", "measured", "expected", "default", "ms", "tokens/s", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for candidate in tuning.candidates:
        table.add_row(
            str(candidate.nodes),
            str(max(map(len, candidate.tree), default=0)),
            f"{candidate.measured:.2f}",
            f"{candidate.expected:.2f}",
            f"{candidate.default:.2f}",
            f"{candidate.seconds * 1e3:.2f}",
            f"{candidate.tokens_per_second:.1f}",
            "stored" if candidate is chosen else "",
            style="bold" if candidate is chosen else None,
        )
    return table
