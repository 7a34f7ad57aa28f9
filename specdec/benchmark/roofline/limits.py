"""What a device can do, measured: bytes copied and operations of matrix products per second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
"""Bytes that are copied to measure the bandwidth: more than any cache holds."""
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}
ROUNDS = 7


@dataclass(frozen=True)
class DeviceLimits:
    """Measured limits of a device.

    Args:
        bandwidth: Bytes per second that a copy reads and writes, together.
        flops: Operations per second of a large matrix product in the model's type.
    """

    bandwidth: float
    flops: float

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)


def device_limits(device: torch.device, dtype: torch.dtype) -> DeviceLimits:
    """Measures them, in a second or so.

    Args:
        device: Where.
        dtype: Type of the matrix product.
    """
    count = COPY_BYTES.get(device.type, 2**26)
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    bandwidth = 2 * count / seconds(lambda: copy.copy_(source), device)
    size = MATMUL_SIZE.get(device.type, 1024)
    left, right = (torch.ones((size, size), dtype=dtype, device=device) for _ in range(2))
    product = torch.empty_like(left)
    flops = 2 * size**3 / seconds(lambda: torch.matmul(left, right, out=product), device)
    return DeviceLimits(bandwidth, flops)


def seconds(run: Callable[[], Any], device: torch.device, rounds: int = ROUNDS) -> float:
    """Median seconds of a call, its work on the device included; one more call warms up."""
    times = []
    for _ in range(rounds + 1):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return median(times[1:])


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)
