"""Layers on top of a trained target that learn to judge, while what it has learned stays as it is.

A score compares what a step says with what the target itself would have said there. Its last layer knows that, and
no layer of its own comes behind it; so a few more are put on top, and only they are trained. What lies below is run
once for each batch and kept.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from chains import Writer
from learn import accuracies, draw, losses
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "embedded"))
from muon import Muon
from trainer import caught_signals


@dataclass(frozen=True)
class Plan:
    """How the top layers are trained.

    Args:
        layers: How many are added.
        steps: Of the optimizer.
        batch: Rows of a step.
        window: Tokens of a row.
        fresh: Different batches; after these they come again in another order.
        muon_lr: Learning rate of the matrices.
        adam_lr: Learning rate of the norms.
        seed: Of the weights and of the examples.
    """

    layers: int = 3
    steps: int = 2000
    batch: int = 8
    window: int = 384
    fresh: int = 300
    muon_lr: float = 6e-3
    adam_lr: float = 3e-3
    seed: int = 1


def grown(model: LlamaForCausalLM, layers: int, seed: int) -> LlamaForCausalLM:
    """The model with more layers, which do nothing yet."""
    torch.manual_seed(seed)
    config = LlamaConfig.from_dict(
        model.config.to_dict() | {"num_hidden_layers": model.config.num_hidden_layers + layers}
    )
    taller = LlamaForCausalLM(config)
    taller.load_state_dict(model.state_dict(), strict=False)
    for layer in taller.model.layers[-layers:]:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return taller


@dataclass
class Logits:
    logits: Tensor


class TopLayers(nn.Module):
    """The last layers of a model, behind the output of those below them.

    Args:
        model: All of it.
        layers: How many are at the top.
    """

    def __init__(self, model: LlamaForCausalLM, layers: int) -> None:
        super().__init__()
        self.inner, self.head = model.model, model.lm_head
        self.count = layers
        model.requires_grad_(False)
        for layer in self.top:
            layer.requires_grad_(True)

    @property
    def top(self) -> list[nn.Module]:
        return list(self.inner.layers[-self.count :])

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **_: Any) -> Logits:
        """`input_ids` are the hidden states below, [batch, length, hidden]."""
        hidden = self._through(self.top, input_ids, attention_mask, position_ids)
        return Logits(self.head(self.inner.norm(hidden)))

    @torch.no_grad()
    def below(self, batch: dict[str, Tensor]) -> Tensor:
        """What comes out below the top layers: [batch, length, hidden]."""
        lower = list(self.inner.layers[: -self.count])
        return self._through(lower, self.inner.embed_tokens(batch["ids"]), batch["mask"], batch["position_ids"])

    def _through(self, layers: list[nn.Module], hidden: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        angles = self.inner.rotary_emb(hidden, positions)
        for layer in layers:
            hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=angles)
        return hidden


def batches(top: TopLayers, make: Any, fresh: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """`fresh` new batches, then these again in random order without end; their `ids` are the hidden states below."""
    rng, kept = random.Random(seed), []
    for number in range(fresh):
        batch = make(number)
        kept.append(batch | {"ids": top.below(batch)})
        yield kept[-1]
    while True:
        rng.shuffle(kept)
        yield from kept


def learn_to_judge(state: dict[str, Any], writer: Writer, plan: Plan, checkpoint: Path) -> dict[str, Any]:
    """Trains new layers on top of the target in `state`, going on from `checkpoint` where there is one.

    Returns:
        The state of the grown model, as it was saved.
    """
    lower = LlamaForCausalLM(LlamaConfig.from_dict(state["config"]))
    lower.load_state_dict(state["model"])
    model = grown(lower, plan.layers, plan.seed)
    top = TopLayers(model, plan.layers)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = [
        Muon([p for p in parameters if p.ndim == 2], lr=plan.muon_lr, weight_decay=0.05),
        torch.optim.AdamW([p for p in parameters if p.ndim < 2], lr=plan.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    first = 0
    if checkpoint.exists():
        known = torch.load(checkpoint, weights_only=True, map_location="cpu")
        model.load_state_dict(known["model"])
        for optimizer, value in zip(optimizers, known["optimizers"], strict=True):
            optimizer.load_state_dict(value)
        first = known["judge_step"]

    def make(name: str) -> dict[str, Tensor]:
        return writer.batch(draw(writer, "target", name, plan.batch, plan.window), plan.window)

    held_out = [make(f"evaluation {number}") for number in range(4)]
    held_out = [batch | {"ids": top.below(batch)} for batch in held_out]
    stream = batches(top, lambda number: make(f"judging {plan.seed} {number}"), plan.fresh, plan.seed)
    recent: list[float] = []
    saved: dict[str, Any] = {}
    with caught_signals() as signals, Progress(disable=not Console().is_terminal) as progress:
        bar = progress.add_task("judge", total=plan.steps, completed=first)
        for step, batch in enumerate(islice(stream, plan.steps)):
            if step < first:
                continue
            scale = min(1.0, (step + 1) / 50, (plan.steps - step) / (0.4 * plan.steps))
            for optimizer, rate in zip(optimizers, (plan.muon_lr, plan.adam_lr), strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = rate * scale
                optimizer.zero_grad(set_to_none=True)
            loss, *_ = losses(top, batch, writer.mark_ids, writer.mixture.mark_weight)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            recent = [*recent[-49:], loss.item()]
            progress.update(bar, advance=1)
            is_last = step + 1 == plan.steps or bool(signals)
            if is_last or (step + 1) % 100 == 0:
                found = [accuracies(top, batch, writer.mark_ids) for batch in held_out]
                means = {name: sum(f[name] for f in found) / len(found) for name in found[0]}
                shown = "  ".join(f"{name} {share:.2%}" for name, share in means.items())
                print(f"step {step + 1}  loss {sum(recent) / len(recent):.3f}  right: {shown}", flush=True)
                saved = state | {
                    "config": model.config.to_dict(),
                    "model": model.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "judge_step": step + 1,
                }
                torch.save(saved, checkpoint)
            if is_last:
                break
    return saved
