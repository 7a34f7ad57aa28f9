"""Whether two results are the same up to rounding."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-4}
"""Allowed difference, in standard deviations; `LOW_PRECISION_TOLERANCE` for other types."""
LOW_PRECISION_TOLERANCE = 0.06


def differ(mine: Tensor, reference: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether two tensors differ by more than rounding; integers, by anything. Waits for the device.

    Args:
        mine: Of any float type, if `reference` is of one.
        reference: What it should be.
        dtype: What both were computed in; None: the reference's type.
    """
    if not reference.is_floating_point():
        return not torch.equal(mine, reference)
    tolerance = TOLERANCE.get(dtype or reference.dtype, LOW_PRECISION_TOLERANCE)
    mine, reference = mine.to(reference.dtype).double(), reference.double()
    finite = reference[reference.isfinite()]
    spread = finite.std().clamp(min=1e-12) if finite.numel() > 1 else reference.new_ones(())
    # Equal infinities have no difference that is a number; not a number is always a difference.
    gap = torch.where(mine == reference, 0.0, (mine - reference).abs()).max()
    return not bool(gap <= tolerance * spread)
