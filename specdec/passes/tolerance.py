"""Whether two results are the same up to rounding."""

from __future__ import annotations

import math
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

NOISE_FACTOR = 2.5
"""Bounds a difference, in multiples of the model's own rounding noise. Raising it accepts more. On a 30-layer model in
bfloat16 right trees differ by 1.0 times the noise, planted faults by 5 and more."""
FLOORS = {torch.float64: 1e-9, torch.float32: 5e-5}
"""Differences that are always rounding, in standard deviations; for other types `FLOOR_STEPS` of their precision."""
FLOOR_STEPS = 4

_NOISE: WeakKeyDictionary[nn.Module, dict[torch.dtype, float]] = WeakKeyDictionary()


def noise_of(model: nn.Module, dtype: torch.dtype) -> float:
    """Rounding noise of a model in standard deviations, as the probe measured it; where it has not, the typical one."""
    return _NOISE.get(model, {}).get(dtype, typical_noise(dtype))


def remember_noise(model: nn.Module, dtype: torch.dtype, noise: float) -> None:
    """Keeps what the probe has measured."""
    _NOISE.setdefault(model, {})[dtype] = noise


def floor_of(dtype: torch.dtype) -> float:
    """The difference that is always rounding, in standard deviations."""
    return FLOORS.get(dtype, FLOOR_STEPS * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0)


def typical_noise(dtype: torch.dtype) -> float:
    """Rounding noise of a deep model in half precision, in standard deviations; 0 in wider types.

    Short passes, as the probe's, may round alike where longer ones do not: a 30-layer model in bfloat16 differs by
    nothing after 12 tokens, and by 2 to 4 steps of the type after 60 and more.
    """
    return 0.0 if dtype in FLOORS else floor_of(dtype)


def allowed(dtype: torch.dtype, noise: float = 0.0) -> float:
    """The largest difference that is rounding, in standard deviations.

    Args:
        dtype: What was computed in.
        noise: Of the model, in standard deviations.
    """
    return max(NOISE_FACTOR * noise, floor_of(dtype))


def distance(mine: Tensor, reference: Tensor) -> float:
    """How far two results are apart, in standard deviations of the reference. Waits for the device.

    Root mean square over the last dimension, then the largest of all positions: a single position that is wrong does
    not hide among right ones, and single logits far out do not count as much as they would in a maximum.

    Returns:
        Infinity where only one of two values is finite, or where one is not a number.
    """
    mine, reference = mine.to(reference.dtype).double(), reference.double()
    if mine.numel() == 0:
        return 0.0
    finite = reference[reference.isfinite()]
    spread = float(finite.std()) if finite.numel() > 1 else 1.0
    # Equal infinities have no difference that is a number.
    gap = torch.where(mine == reference, 0.0, mine - reference)
    rms = float(gap.square().mean(-1).sqrt().max())
    return rms / max(spread, 1e-12) if math.isfinite(rms) else math.inf


def differ(mine: Tensor, reference: Tensor, dtype: torch.dtype | None = None, noise: float = 0.0) -> bool:
    """Whether two tensors differ by more than rounding; integers, by anything. Waits for the device.

    Args:
        mine: `[..., size]`, of any float type if `reference` is of one.
        reference: What it should be.
        dtype: What both were computed in; None: the reference's type.
        noise: The model's own, in standard deviations; see `noise_of`.
    """
    if not reference.is_floating_point():
        return not torch.equal(mine, reference)
    return distance(mine, reference) > allowed(dtype or reference.dtype, noise)
