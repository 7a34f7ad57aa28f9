"""Small tensors between host and device, without waiting where that is not needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec.kernels import Ints


class Upload:
    """Sends host values into a buffer on the device.

    There are two host buffers: one may be filled while the copy of the other is still to come.

    Args:
        buffer: On the device.
    """

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        pinned = buffer.device.type == "cuda"
        self._hosts = [torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=pinned) for _ in range(2)]

    def host(self) -> Any:
        """An array to fill; `send` sends it."""
        self._hosts.reverse()
        return self._hosts[0].numpy()

    def send(self) -> None:
        """Copies what was filled last, in the stream's order."""
        self.buffer.copy_(self._hosts[0], non_blocking=True)


class Download:
    """A copy of a device's integers under way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: Any = None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))
        else:
            self._host = tensor.clone()

    def wait(self) -> Ints:
        """The values, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        array: Ints = self._host.numpy()
        return array
