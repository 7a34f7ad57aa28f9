"""The training loop of the reasoning pair: resumable, deterministic, on a CPU or one GPU."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from chains import NONE, Example, Mixture, Writer
from rich.console import Console
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "embedded"))
from trainer import Run, run_steps
from trainer import Settings as TrainerSettings

BASE = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 352,
}
DEEP = BASE | {"num_hidden_layers": 12}
SHAPES: dict[str, dict[str, int]] = {
    "base": BASE,
    "solver": DEEP,
    "target": DEEP,
    "draft": BASE | {"hidden_size": 96, "intermediate_size": 256},
}
HELD_OUT_EXAMPLES = 64


@dataclass
class Settings(TrainerSettings):
    """Those of the embedded models' training, what the examples are made of, and how judging is learned."""

    mixture: Mixture = field(default_factory=Mixture)
    judge_weight: float = 1.0
    """Of the scores in the loss of a model that learns to judge."""
    keep_weight: float = 1.0
    """Of what keeps it from going away from its teacher."""


class Hints(torch.nn.Module):
    """Read-outs of a judge's hidden states, which lead it to a score step by step; left out of the exported model.

    Whether a token is right is a comparison, of which a loss on scores alone shows the first layers nothing. So behind
    layer `PLACES[0]` each digit is to know which one ought to stand in its place (the token before has predicted it),
    behind the next whether it is that one, and behind the third a step's last token is to know the step's score.

    Args:
        hidden_size: Of the model.
        vocab_size: Of the model.
    """

    PLACES = (4, 5, 6)

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.right = torch.nn.Linear(hidden_size, vocab_size)
        self.agrees = torch.nn.Linear(hidden_size, 2)
        self.total = torch.nn.Linear(hidden_size, 10)

    def loss(self, hidden_states: Sequence[Tensor], batch: dict[str, Tensor]) -> Tensor:
        """Sum of the three losses. `hidden_states`: [batch, length, hidden] behind each layer."""
        right, agrees, total = (F.rms_norm(hidden_states[i], hidden_states[i].shape[-1:]) for i in self.PLACES)
        agreement = torch.where(batch["rights"] == NONE, NONE, (batch["rights"] == batch["ids"]).long())
        return (
            known_loss(self.right(right), batch["rights"])
            + known_loss(self.agrees(agrees), agreement)
            + 0.5 * known_loss(self.total(total), batch["totals"])
        )


def known_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy where there is a label. `logits`: [batch, length, classes]; `labels`: [batch, length]."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=NONE)


def learns_to_judge(run: Run, frozen: int) -> None:
    """Gives a model hints, and keeps its embedding and its first layers as they are."""
    config = run.model.config
    run.model.hints = Hints(config.hidden_size, config.vocab_size)
    run.adam.add_param_group({"params": list(run.model.hints.parameters())})
    layers = run.model.model.layers
    for module in (run.model.model.embed_tokens, run.model.model.norm, *layers[:frozen]):
        module.requires_grad_(False)


def draw(writer: Writer, which: str, name: str, count: int, length: int) -> list[Example]:
    """Examples of at most `length` tokens, a function of `name` alone, so a resumed run repeats nothing."""
    write = writer.for_draft if which == "draft" else writer.for_target
    rng = random.Random(name)
    examples: list[Example] = []
    while len(examples) < count:
        example = write(rng)
        if writer.size(example) <= length:
            examples.append(example)
    return examples


def forward(model: torch.nn.Module, batch: dict[str, Tensor], **options: bool) -> Any:
    return model(
        input_ids=batch["ids"],
        attention_mask=batch["mask"],
        position_ids=batch["position_ids"],
        use_cache=False,
        **options,
    )


def solving_loss(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Weighted loss in nats a token."""
    each = F.cross_entropy(
        forward(model, batch).logits.float().flatten(0, 1), batch["targets"].flatten(), reduction="none"
    )
    weights = batch["weights"].flatten()
    return (each * weights).sum() / weights.sum()


def judging_loss(
    model: torch.nn.Module,
    hints: Hints,
    teacher: torch.nn.Module,
    batch: dict[str, Tensor],
    digit_ids: Sequence[int],
    settings: Settings,
) -> Tensor:
    """Loss of the scores and the hints, and on half of the chains how far the model has gone from its teacher."""
    output = forward(model, batch, output_hidden_states=True)
    logits = output.logits.float()
    scores = batch["scores"]
    answers = torch.where(scores == NONE, NONE, torch.tensor(digit_ids, device=scores.device)[scores])
    loss = settings.judge_weight * known_loss(logits, answers) + hints.loss(output.hidden_states, batch)
    half = {name: values[: max(1, len(values) // 2)] for name, values in batch.items()}
    with torch.no_grad():
        wanted = forward(teacher, half).logits.float()
    chain = half["is_chain"]
    log_probs = [part[chain].log_softmax(-1) for part in (logits[: len(wanted)], wanted)]
    return loss + settings.keep_weight * F.kl_div(*log_probs, reduction="batchmean", log_target=True)


@torch.inference_mode()
def accuracies(model: torch.nn.Module, batch: dict[str, Tensor], digit_ids: Sequence[int]) -> dict[str, float]:
    """Shares of right digits in results and in scores, and of the steps that a threshold of 7 sorts as it ought to.

    Of right and of wrong steps the same share each, so that to keep all of them, or none, is 50 %.
    """
    logits = forward(model, batch).logits.float()
    heavy, asked = batch["weights"] > 1, batch["scores"] != NONE
    found = {"results": (logits.argmax(-1) == batch["targets"])[heavy].float().mean().item()}
    if asked.any():
        probs = logits[asked][:, list(digit_ids)].softmax(-1)
        scores = batch["scores"][asked]
        found["scores"] = (probs.argmax(-1) == scores).float().mean().item()
        kept, good = probs @ torch.arange(10.0, device=probs.device) >= 7, scores == 9
        found["steps kept or not"] = (kept[good].float().mean().item() + (~kept[~good]).float().mean().item()) / 2
    return found


def learn(
    run: Run,
    writer: Writer,
    which: str,
    settings: Settings,
    folder: Path,
    compiled: bool = False,
    teacher: torch.nn.Module | None = None,
) -> bool:
    """Trains until `settings.tokens`, going on from the checkpoint in `folder` where there is one.

    Args:
        run: The model; one that `learns_to_judge` where there is a teacher.
        writer: Of the examples.
        which: Model of `SHAPES`.
        settings: All that decides the weights.
        folder: Of the checkpoint.
        compiled: Compile the model.
        teacher: The model before it learned to judge, from which it is not to go away.

    Returns:
        Whether the run is complete; False when SIGINT or SIGTERM ended it early, after saving.
    """
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        run.go_on_from(checkpoint)
    run.begin_phase(settings, compiled)
    model = torch.compile(run.model) if compiled else run.model
    device = run.model.device
    loss_of = (
        partial(solving_loss, model)
        if teacher is None
        else partial(judging_loss, model, run.model.hints, teacher, digit_ids=writer.digit_ids, settings=settings)
    )

    def batch_of(name: str, count: int) -> dict[str, Tensor]:
        batch = writer.batch(draw(writer, which, name, count, settings.window), settings.window)
        return {key: value.to(device) for key, value in batch.items()}

    held_out = batch_of("evaluation", HELD_OUT_EXAMPLES)

    def one_step() -> float:
        batch = batch_of(f"training {settings.seed} {run.step}", settings.batch)
        run.schedule(settings)
        return run.update(loss_of(batch), settings, batch["ids"].numel())

    def evaluate() -> str:
        shares = accuracies(run.model, held_out, writer.digit_ids)
        return "  ".join(f"right {name} {share:.2%}" for name, share in shares.items())

    return run_steps(run, settings, checkpoint, one_step, evaluate, Console())
