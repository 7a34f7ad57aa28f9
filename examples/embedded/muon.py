"""Muon in float32.

torch.optim.Muon orthogonalises in bfloat16, which a CPU without bfloat16 instructions runs 40 times
slower than float32; here matrices of one shape also go through the iteration as one batch.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.775, 2.0315)
ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrices.

    Muon is Scalable for LLM Training, arXiv 2502.16982, equation 2.

    Args:
        matrices: [count, rows, columns].
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalise(matrices.mT.contiguous()).mT
    a, b, c = COEFFICIENTS
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Muon for 2-D hidden matrices, its updates scaled to the size of AdamW's (RMS 0.2)."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:  # frozen
                    continue
                by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                scale = 0.2 * max(shape) ** 0.5
                directions = orthogonalise(torch.stack([self._nesterov(p, group["momentum"]) for p in parameters]))
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(direction, alpha=-group["lr"] * scale)

    def _nesterov(self, parameter: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum)
