"""How good heads are on held-out windows, and what that promises for drafting."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec.heads import HeadCalibration
from specdec.heads.tree_choice import best_tree, expected_tokens
from specdec.training.batches import Batch
from specdec.training.losses import IGNORED, NUM_RANKS, Sums, medusa_targets

TREE_SIZES = (8, 16, 32, 64)
"""Node counts, the root included, for which expected tokens per pass are reported."""


class Reducer(Protocol):
    """What of an `accelerate.Accelerator` adds up over processes."""

    def reduce(self, tensor: Tensor, reduction: str = "sum") -> Tensor: ...


@dataclass
class Counts:
    """Totals over supervised targets; row 0 is the target's own output, row k head k.

    Args:
        cross_entropy: `[outputs]`, in nats.
        ranks: `[outputs, ranks]`.
        targets: `[outputs]`.
        divergence: KL from the original target's output, in nats.
    """

    cross_entropy: Tensor
    ranks: Tensor
    targets: Tensor
    divergence: Tensor

    @classmethod
    def of(cls, sums: Sums, targets: Tensor) -> Counts:
        """Of one batch; `targets` as `medusa_targets` gives them."""
        num_targets = (targets != IGNORED).flatten(1).sum(1)
        return cls(
            sums.cross_entropy.detach().double(), sums.ranks.double(), num_targets.double(), sums.divergence.double()
        )

    def __add__(self, other: Counts) -> Counts:
        mine, theirs = vars(self).values(), vars(other).values()
        return Counts(*(a + b for a, b in zip(mine, theirs, strict=True)))

    def reduced(self, accelerator: Reducer) -> Counts:
        """Totals over all processes."""
        packed = torch.cat([self.cross_entropy[:, None], self.targets[:, None], self.ranks], dim=1)
        packed = torch.cat([packed, self.divergence.expand(1, packed.shape[1])])
        packed = accelerator.reduce(packed.float() if packed.device.type == "mps" else packed, reduction="sum")
        return Counts(packed[:-1, 0], packed[:-1, 2:], packed[:-1, 1], packed[-1, 0])

    def evaluated(self) -> Evaluation:
        """As means."""
        num_targets = self.targets.clamp(min=1)
        losses = (self.cross_entropy / num_targets).tolist()
        accuracies = (self.ranks / num_targets[:, None]).tolist()
        return Evaluation(
            losses=losses[1:],
            accuracies=accuracies[1:],
            num_targets=int(self.targets[1:].max()),
            own_loss=losses[0],
            own_accuracy=accuracies[0][0],
            divergence=float(self.divergence / num_targets[0]),
        )


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

    def top(self, ranks: int) -> list[float]:
        """Per head, how often the right token is among the first so many."""
        return [sum(accuracies[:ranks]) for accuracies in self.accuracies]

    @property
    def perplexity(self) -> float:
        """Of the target's own output."""
        return math.exp(min(self.own_loss, 700.0))

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
        num_heads: How many heads.
        accelerator: Of the run.
    """
    was_training = trained.training
    trained.eval()
    total: Counts | None = None
    coefficients = torch.zeros(num_heads + 1, device=accelerator.device)
    for cpu_batch in batches:
        batch = {name: tensor.to(accelerator.device) for name, tensor in cpu_batch.items()}
        targets = medusa_targets(batch["input_ids"], batch["supervised"], batch["segments"], num_heads)
        counts = Counts.of(trained(prepare(batch), targets, coefficients), targets)
        total = counts if total is None else total + counts
    trained.train(was_training)
    if total is None:  # a process without a window of its own
        zeros = torch.zeros(num_heads + 1, dtype=torch.double, device=accelerator.device)
        total = Counts(zeros, zeros[:, None].expand(-1, NUM_RANKS), zeros, zeros[0])
    return total.reduced(accelerator).evaluated()
