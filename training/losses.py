"""Cross-entropy of many heads over a large vocabulary, without the logits of all of them in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = -100
"""The target of a position that is not supervised."""
NUM_RANKS = 10
"""Ranks that are counted: how often the target token is first, second ... among a head's logits."""
LOGITS_MIB = 64
"""Largest block of logits, in MiB of float32."""
LOGITS_MIB_CPU = 8
"""The same on the CPU: larger blocks exceed its caches."""


class Sums(NamedTuple):
    """Sums over the supervised targets of some positions.

    Args:
        loss: The weighted loss, with gradients.
        cross_entropy: `[outputs]`, in nats.
        ranks: `[outputs, NUM_RANKS]`: at how many positions the target token has this rank.
        divergence: KL(teacher || student) in nats, zero without a teacher.
    """

    loss: Tensor
    cross_entropy: Tensor
    ranks: Tensor
    divergence: Tensor


def medusa_targets(input_ids: Tensor, supervised: Tensor, segments: Tensor, num_heads: int) -> Tensor:
    """What the model's own output (row 0) and each head should say at each position.

    Head k, from 1, at position t is to say token t+1+k; the model's own output says token t+1. A target counts only
    where it is supervised and stands in the same segment as t.

    Args:
        input_ids: `[batch, window]`.
        supervised: Nonzero where the token is to be learned, of the same shape.
        segments: Number of the packed example, of the same shape; 0 is padding.
        num_heads: How many heads.

    Returns:
        `[num_heads + 1, batch, window]`, token ids or `IGNORED`.
    """
    targets = torch.full((num_heads + 1, *input_ids.shape), IGNORED, dtype=torch.long, device=input_ids.device)
    width = input_ids.shape[1]
    for k in range(min(num_heads + 1, width - 1)):
        shift = k + 1
        here, there = segments[:, :-shift], segments[:, shift:]
        valid = (here == there) & (here != 0) & (supervised[:, shift:] != 0)
        targets[k, :, : width - shift] = input_ids[:, shift:].masked_fill(~valid, IGNORED)
    return targets


def chunked_loss(
    features: Tensor,
    targets: Tensor,
    coefficients: Tensor,
    project: Callable[[Tensor], Tensor],
    vocab_size: int,
    parameters: Sequence[Tensor] = (),
    teacher: Callable[[slice], Tensor] | None = None,
    logits_mib: float | None = None,
) -> Sums:
    """Weighted sum of cross-entropies (or of divergences from a teacher), computed block by block.

    The gradient of a block of logits is taken while the block is there, so that logits are computed once and at most
    `logits_mib` of them exist at a time.

    Args:
        features: `[outputs, positions, hidden]`.
        targets: `[outputs, positions]`, token ids or `IGNORED`.
        coefficients: `[outputs]`, the factors of the summed losses.
        project: `[outputs, some positions, hidden] -> [outputs, some positions, vocab_size]`.
        vocab_size: As above.
        parameters: Trained parameters that `project` uses.
        teacher: Logits of the teacher at some of the positions; then the loss is KL(teacher || student) at the
            supervised positions, and cross-entropy is only counted.
        logits_mib: Largest block of logits; None: as the device likes it.
    """
    if logits_mib is None:
        logits_mib = LOGITS_MIB_CPU if features.device.type == "cpu" else LOGITS_MIB
    with_gradients = torch.is_grad_enabled() and (features.requires_grad or any(p.requires_grad for p in parameters))
    work = _Blocks(targets, coefficients, project, vocab_size, teacher, logits_mib, with_gradients)
    loss = _BlockwiseLoss.apply(features, work, *parameters)
    return Sums(loss, work.cross_entropy, work.ranks, work.divergence)


@dataclass
class _Blocks:
    targets: Tensor
    coefficients: Tensor
    project: Callable[[Tensor], Tensor]
    vocab_size: int
    teacher: Callable[[slice], Tensor] | None
    logits_mib: float
    with_gradients: bool
    cross_entropy: Tensor = field(init=False)
    ranks: Tensor = field(init=False)
    divergence: Tensor = field(init=False)

    def __post_init__(self) -> None:
        outputs, device = self.targets.shape[0], self.targets.device
        self.cross_entropy = torch.zeros(outputs, device=device)
        self.ranks = torch.zeros(outputs, NUM_RANKS, dtype=torch.long, device=device)
        self.divergence = torch.zeros((), device=device)
        # Half-precision gradients of the logits must not vanish: the common factor is applied afterwards.
        self.scale = self.coefficients.max().clamp(min=1e-30)

    @property
    def block_size(self) -> int:
        """Positions per block."""
        return max(1, int(self.logits_mib * 2**18) // (self.vocab_size * self.targets.shape[0]))

    def take(self, logits: Tensor, block: slice) -> Tensor | None:
        """Adds a block's losses; returns the gradient of the logits, divided by `scale`."""
        targets = self.targets[:, block]
        valid = targets != IGNORED
        index = targets.clamp(min=0).unsqueeze(-1)
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        chosen = log_probs.gather(-1, index)
        rank = (log_probs > chosen).sum(-1, dtype=torch.int32)  # three times as fast as a sum in int64
        self.cross_entropy -= (chosen.squeeze(-1) * valid).sum(-1)
        places = torch.arange(NUM_RANKS, device=rank.device)
        self.ranks += ((rank[..., None] == places) & valid[..., None]).sum(1)
        if self.teacher is not None:
            teacher = torch.log_softmax(self.teacher(block).float(), dim=-1)
            probs = teacher.exp()
            self.divergence += ((probs * (teacher - log_probs)).sum(-1) * valid).sum()
        if not self.with_gradients:
            return None
        gradient = log_probs.exp_()
        if self.teacher is not None:
            gradient -= probs
        else:
            gradient.scatter_add_(-1, index, torch.full_like(chosen, -1.0))
        return gradient.mul_((valid * (self.coefficients / self.scale)[:, None]).unsqueeze(-1))

    def loss(self) -> Tensor:
        if self.teacher is not None:
            return self.divergence * self.coefficients[0]
        return (self.cross_entropy * self.coefficients).sum()


class _BlockwiseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, work: _Blocks, *parameters: Tensor) -> Tensor:
        total = torch.zeros_like(features) if work.with_gradients else features.new_zeros(0)
        trained = [p for p in parameters if p.requires_grad] if work.with_gradients else []
        totals = {id(parameter): torch.zeros_like(parameter) for parameter in trained}
        for start in range(0, features.shape[1], work.block_size):
            block = slice(start, min(start + work.block_size, features.shape[1]))
            part = features[:, block].detach().requires_grad_(work.with_gradients)
            with torch.set_grad_enabled(work.with_gradients):
                logits = work.project(part)
            gradient = work.take(logits.detach(), block)
            if gradient is not None:
                found = torch.autograd.grad(logits, [part, *trained], gradient.to(logits.dtype))
                total[:, block] = found[0]
                for parameter, part_of_it in zip(trained, found[1:], strict=True):
                    totals[id(parameter)] += part_of_it
        ctx.scale = work.scale
        ctx.is_trained = [id(parameter) in totals for parameter in parameters]
        ctx.save_for_backward(total, *totals.values())
        return work.loss()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
        first, *others = ctx.saved_tensors
        factor = grad_loss * ctx.scale
        rest = iter(others)
        return first * factor, None, *(next(rest) * factor if trained else None for trained in ctx.is_trained)
