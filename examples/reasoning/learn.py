"""The training loop of the reasoning pair: resumable, deterministic, on a CPU or one GPU."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from chains import NO_MARK, Example, Mixture, Writer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "embedded"))
from trainer import LOG_EVERY, Run, caught_signals
from trainer import Settings as TrainerSettings

BASE = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 352,
}
SHAPES: dict[str, dict[str, int]] = {
    "base": BASE,
    "target": BASE | {"num_hidden_layers": 12},
    "draft": BASE | {"hidden_size": 96, "intermediate_size": 256},
}
HELD_OUT_EXAMPLES = 64


@dataclass
class Settings(TrainerSettings):
    """Those of the embedded models' training, and what the examples are made of."""

    mixture: Mixture = field(default_factory=Mixture)


def draw(writer: Writer, which: str, name: str, count: int, length: int) -> list[Example]:
    """Examples of at most `length` tokens, a function of `name` alone, so a resumed run repeats nothing."""
    write = writer.for_target if which == "target" else writer.for_draft
    rng = random.Random(name)
    examples: list[Example] = []
    while len(examples) < count:
        example = write(rng)
        if writer.size(example) <= length:
            examples.append(example)
    return examples


def losses(
    model: torch.nn.Module, batch: dict[str, Tensor], mark_ids: Sequence[int], mark_weight: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted loss in nats a token, the most likely next ids and the most likely marks: both [batch, length]."""
    logits = model(
        input_ids=batch["ids"], attention_mask=batch["mask"], position_ids=batch["position_ids"], use_cache=False
    ).logits.float()
    each = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
    weights = batch["weights"].flatten()
    loss = (each * weights).sum() / weights.sum()
    marks = logits[..., list(mark_ids)]
    if (batch["marks"] != NO_MARK).any():
        told = F.cross_entropy(marks.flatten(0, 1), batch["marks"].flatten(), ignore_index=NO_MARK)
        loss = loss + mark_weight * told
    return loss, logits.detach().argmax(-1), marks.detach().argmax(-1)


@torch.inference_mode()
def accuracies(model: torch.nn.Module, batch: dict[str, Tensor], mark_ids: Sequence[int]) -> dict[str, float]:
    """Shares of right digits in results and in scores, and of wrong tokens that are marked as such."""
    _, picks, marks = losses(model, batch, mark_ids)
    right = picks == batch["targets"]
    heavy = batch["weights"] > 1
    # the judgements stand behind the chain, whose position ids equal their place
    places = torch.arange(batch["ids"].shape[1], device=heavy.device)
    branch = batch["position_ids"] != places
    found = {"results": right[heavy & ~branch].float().mean().item()}
    if (heavy & branch).any():
        found["scores"] = right[heavy & branch].float().mean().item()
    if (batch["marks"] == 0).any():
        found["marks of wrong digits"] = (marks[batch["marks"] == 0] == 0).float().mean().item()
    return found


def step(
    run: Run, model: torch.nn.Module, batch: dict[str, Tensor], settings: Settings, mark_ids: Sequence[int]
) -> float:
    scale = settings.scale(run.step - run.optimizers_from, run.tokens)
    for optimizer, rate in ((run.muon, settings.muon_lr), (run.adam, settings.adam_lr)):
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        optimizer.zero_grad(set_to_none=True)
    loss, *_ = losses(model, batch, mark_ids, settings.mixture.mark_weight)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), settings.clip)
    run.muon.step()
    run.adam.step()
    run.step += 1
    run.tokens += batch["ids"].numel()
    return loss.item()


def learn(run: Run, writer: Writer, which: str, settings: Settings, folder: Path, compiled: bool = False) -> bool:
    """Trains until `settings.tokens`, going on from the checkpoint in `folder` where there is one.

    Returns:
        Whether the run is complete; False when SIGINT or SIGTERM ended it early, after saving.
    """
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        run.go_on_from(checkpoint)
    run.begin_phase(settings, compiled)
    model = torch.compile(run.model) if compiled else run.model
    device = run.model.device

    def batch_of(name: str, count: int) -> dict[str, Tensor]:
        batch = writer.batch(draw(writer, which, name, count, settings.window), settings.window)
        return {key: value.to(device) for key, value in batch.items()}

    held_out = batch_of("evaluation", HELD_OUT_EXAMPLES)
    console = Console()
    plain = not console.is_terminal
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with caught_signals() as signals, Progress(*columns, console=console, disable=plain) as progress:
        bar = progress.add_task(which, total=settings.tokens, completed=run.tokens, note="")
        started, started_at = time.perf_counter(), run.tokens
        while run.tokens < settings.tokens and not signals:
            batch = batch_of(f"training {settings.seed} {run.step}", settings.batch)
            run.losses.append(step(run, model, batch, settings, writer.mark_ids))
            rate = (run.tokens - started_at) / (time.perf_counter() - started)
            note = f"loss {float(np.mean(run.losses[-LOG_EVERY:])):.3f}  {rate:,.0f} tokens/s"
            progress.update(bar, completed=run.tokens, note=note)
            if plain and run.step % LOG_EVERY == 0:
                left = (settings.tokens - run.tokens) / rate / 60
                print(f"step {run.step}  tokens {run.tokens:,}  {note}  {left:.0f} min left", flush=True)
            if run.step % settings.eval_every == 0:
                shares = accuracies(run.model, held_out, writer.mark_ids)
                shown = "  ".join(f"right {name} {share:.2%}" for name, share in shares.items())
                progress.console.print(f"step {run.step}: {shown}")
            if run.step % settings.save_every == 0:
                run.save(checkpoint)
        run.save(checkpoint)
    return not signals
