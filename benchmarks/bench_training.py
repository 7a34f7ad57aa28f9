"""Measures what a training step of Medusa-1 costs: the target's pass, the heads' products, and the whole step.

    python benchmarks/bench_training.py
    python benchmarks/bench_training.py --model Qwen/Qwen3-8B --dtype bfloat16 --name qwen3

A step ought to cost little more than what cannot be left out: the target's pass without gradients up to its last
hidden states, and the matrix products of the heads, forwards and backwards. Both are timed on their own, in turn with
the whole step, and medians are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from specdec.benchmark.runs import spread
from specdec.commands import options
from specdec.common.errors import with_short_errors
from specdec.common.loading import EMBEDDED, load_model, prepare_torch
from specdec.common.provenance import circumstances, model_info, write_json
from specdec.heads import MedusaHeads
from specdec.training.config import MedusaTrainingConfig
from specdec.training.losses import LOGITS_MIB, LOGITS_MIB_CPU, medusa_targets
from specdec.training.recipes import HeadsAlone, head_losses

RESULTS = Path(__file__).parent / "results"

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, add_completion=False)


def windows(batch: int, window: int, vocab: int, device: Any) -> dict[str, Tensor]:
    """Random tokens, one example per window, all of them supervised."""
    ids = torch.randint(vocab, (batch, window), generator=torch.Generator().manual_seed(0)).to(device)
    positions = torch.arange(window, device=device).expand(batch, -1).contiguous()
    return {
        "input_ids": ids,
        "supervised": torch.ones_like(ids),
        "segments": torch.ones_like(ids),
        "position_ids": positions,
    }


class Parts:
    """What is timed, each on the same windows."""

    def __init__(self, recipe: HeadsAlone, batch: dict[str, Tensor]) -> None:
        self.recipe, self.heads, self.batch = recipe, recipe.heads, batch
        count = self.heads.config.num_heads
        self.targets = medusa_targets(batch["input_ids"], batch["supervised"], batch["segments"], count)
        self.coefficients = torch.full((count + 1,), 1e-3, device=batch["input_ids"].device)
        self.optimizer = torch.optim.AdamW(self.heads.parameters(), lr=1e-6)
        self.hidden = recipe.prepare(batch)["hidden"]

    def target(self) -> None:
        """The target's pass without gradients, up to its last hidden states."""
        self.recipe.prepare(self.batch)

    def products(self) -> None:
        """The matrix products of the heads, block by block: layers and logits, forwards and backwards."""
        heads, flat = self.heads, self.hidden.flatten(0, 1)
        features = heads.features(flat)
        block = self.recipe.logits_mib or (LOGITS_MIB_CPU if flat.device.type == "cpu" else LOGITS_MIB)
        size = max(1, block * 2**18 // (heads.config.vocab_size or 1) // len(features))
        gradient = torch.empty_like(features)
        for start in range(0, features.shape[1], size):
            part = features[:, start : start + size].detach().requires_grad_()
            logits = heads.project(part)
            gradient[:, start : start + size] = torch.autograd.grad(logits, part, logits.detach())[0]
        features.backward(gradient)

    def loss(self) -> None:
        """Heads and loss, forwards and backwards."""
        targets, coefficients = self.targets[1:], self.coefficients[1:]
        head_losses(self.heads, self.hidden, targets, coefficients, self.recipe.logits_mib).loss.backward()

    def step(self) -> None:
        """Everything, the optimizer too."""
        batch = self.recipe.prepare(self.batch)
        self.recipe(batch, self.targets, self.coefficients).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.heads.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed(self, part: Callable[[], None]) -> float:
        """Seconds of one run, gradients cleared before."""
        self.optimizer.zero_grad()
        _synchronize(self.hidden.device)
        start = perf_counter()
        part()
        _synchronize(self.hidden.device)
        return perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@app.command()
@with_short_errors
def main(
    name: Annotated[str, typer.Option(help="Of the file in benchmarks/results.")] = "training",
    model: options.Model = EMBEDDED,
    heads: Annotated[int, typer.Option(min=1, help="Draft heads.")] = 4,
    batch: Annotated[int, typer.Option(min=1, help="Windows per step.")] = 4,
    window: Annotated[int, typer.Option(min=8, help="Tokens per window.")] = 512,
    logits_mib: Annotated[int | None, typer.Option(min=1, help="Largest block of logits.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each part.")] = 9,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Measure the parts of a step and write benchmarks/results/NAME.json."""
    prepare_torch(threads)
    target, _ = load_model(model, dtype, device)
    config = MedusaTrainingConfig(num_heads=heads, logits_mib=logits_mib)
    recipe = HeadsAlone(target, MedusaHeads.for_model(target, heads), config)
    vocab = target.config.get_text_config(decoder=True).vocab_size
    parts = Parts(recipe, windows(batch, window, vocab, target.device))
    order = {part.__name__: part for part in (parts.target, parts.products, parts.loss, parts.step)}
    for part in order.values():
        parts.timed(part)
    samples: dict[str, list[float]] = {part: [] for part in order}
    for _ in range(repeats):
        for part, function in order.items():
            samples[part].append(parts.timed(function))
    seconds = {part: median(times) for part, times in samples.items()}
    quartiles = {part: spread(times) for part, times in samples.items()}
    ratio = median(s / (t + p) for s, t, p in zip(samples["step"], samples["target"], samples["products"], strict=True))
    table = Table(title=f"one step of Medusa-1: {batch} windows of {window} tokens, {heads} heads, median of {repeats}")
    table.add_column("part")
    table.add_column("ms", justify="right")
    labels = {"target": "target's pass", "products": "heads' products", "loss": "heads and loss", "step": "whole step"}
    for part, label in labels.items():
        table.add_row(label, f"{seconds[part] * 1000:.1f}")
    table.add_row("whole step / (target's pass + heads' products)", f"{ratio:.2f}x")
    Console().print(table)
    settings = {"heads": heads, "batch": batch, "window": window, "logits_mib": logits_mib, "repeats": repeats}
    results = {"models": {"target": model_info(model, target)}, "settings": settings, "seconds": seconds}
    write_json(RESULTS / f"{name}.json", {**circumstances(), **results, "ratio": ratio, "quartiles": quartiles})
    Console().print(f"written to {RESULTS / name}.json", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
