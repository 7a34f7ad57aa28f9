"""Accuracy of heads on held-out windows, and the tokens per pass to expect from it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from specdec.heads import HeadCalibration
from specdec.heads.tree_choice import best_tree, expected_tokens
from specdec.training.batches import Batch
from specdec.training.losses import IGNORED, NUM_RANKS, Sums, medusa_targets

TREE_SIZES = (8, 16, 32, 64)
"""Node counts, the root included, for which expected tokens per pass are reported."""


def count(sums: Sums, targets: Tensor) -> Tensor:
    """Totals of one batch, which may be added up over batches and processes.

    Args:
        sums: Of the batch.
        targets: `[outputs, batch, window]`, as `medusa_targets` returns them.

    Returns:
        `[outputs, 3 + NUM_RANKS]`: supervised targets, cross-entropy, divergence, and ranks. Row 0 is the target's own
        output, row k head k.
    """
    num_targets = (targets != IGNORED).flatten(1).sum(1)
    dtype = torch.float32 if targets.device.type == "mps" else torch.float64
    columns = (num_targets, sums.cross_entropy.detach(), sums.divergence.expand(len(targets)))
    return torch.cat([torch.stack([c.to(dtype) for c in columns], dim=1), sums.ranks.to(dtype)], dim=1)


@dataclass
class Evaluation:
    """Means over the supervised targets of some windows.

    Args:
        losses: Cross-entropy per head, in nats.
        accuracies: `[head][rank]`: how often the token of this rank, from the best, is the right one.
        num_targets: Supervised targets of a head.
        own_loss: Cross-entropy of the target's own output; 0 where it was not computed.
        own_accuracy: How often the target's own best token is the right one.
        divergence: KL of the target's own output from that of the original target, in nats per token.
    """

    losses: list[float]
    accuracies: list[list[float]]
    num_targets: int
    own_loss: float = 0.0
    own_accuracy: float = 0.0
    divergence: float = 0.0
    tokens_per_pass: dict[str, float] = field(init=False)
    """Expected: of the chain of first ranks, and of best-first trees by node count."""

    def __post_init__(self) -> None:
        chain = [[0] * depth for depth in range(1, len(self.accuracies) + 1)]
        trees = {"chain": chain, **{f"tree of {n}": best_tree(self.accuracies, n) for n in TREE_SIZES}}
        self.tokens_per_pass = {name: expected_tokens(self.accuracies, tree) for name, tree in trees.items()}

    @classmethod
    def of(cls, counts: Tensor) -> Evaluation:
        """Means of totals, see `count`."""
        means = (counts / counts[:, :1].clamp(min=1)).tolist()
        _, own_loss, divergence, own_accuracy, *_ = means[0]
        losses, accuracies = [row[1] for row in means[1:]], [row[3:] for row in means[1:]]
        return cls(losses, accuracies, int(counts[1:, 0].max()), own_loss, own_accuracy, divergence)

    def top(self, ranks: int) -> list[float]:
        """Per head, how often the right token is among the first `ranks`."""
        return [sum(accuracies[:ranks]) for accuracies in self.accuracies]

    @property
    def perplexity(self) -> float:
        """Of the target's own output."""
        return math.exp(min(self.own_loss, 700.0))

    def figures(self) -> dict[str, float]:
        """Figures for trackers, by name."""
        found = {f"loss_{k}": loss for k, loss in enumerate(self.losses, 1)}
        for ranks in (1, 5):
            found |= {f"top{ranks}_{k}": share for k, share in enumerate(self.top(ranks), 1)}
        found |= {f"tokens_per_pass/{name}": tokens for name, tokens in self.tokens_per_pass.items()}
        return found | {"own_loss": self.own_loss, "divergence": self.divergence}

    def calibration(self) -> HeadCalibration:
        """For the file beside the heads."""
        return HeadCalibration(accuracies=self.accuracies, tree=None, num_tokens=self.num_targets)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**asdict(self), "perplexity": self.perplexity}


@torch.no_grad()
def evaluate(trained: Any, prepare: Any, batches: Iterable[Batch], num_heads: int, accelerator: Any) -> Evaluation:
    """Means over all windows, in all processes.

    Args:
        trained: The module of the recipe, as accelerate prepared it.
        prepare: The recipe's own `prepare`.
        batches: This process's share.
        num_heads: Number of heads.
        accelerator: Of the run.
    """
    was_training = trained.training
    trained.eval()
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    total = torch.zeros(num_heads + 1, 3 + NUM_RANKS, dtype=dtype, device=accelerator.device)
    coefficients = torch.zeros(num_heads + 1, device=accelerator.device)
    for cpu_batch in batches:
        batch = {name: tensor.to(accelerator.device) for name, tensor in cpu_batch.items()}
        targets = medusa_targets(batch["input_ids"], batch["supervised"], batch["segments"], num_heads)
        total += count(trained(prepare(batch), targets, coefficients), targets)
    trained.train(was_training)
    return Evaluation.of(accelerator.reduce(total, reduction="sum"))
