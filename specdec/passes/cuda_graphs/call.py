"""A function of tensors that is captured per shape of its arguments."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from specdec.passes.cuda_graphs.graphs import CudaRecorder, Graphs, Recorder

Function = Callable[..., tuple[Tensor, ...]]


class CapturedCall:
    """Calls a function of tensors; on CUDA, its launches are captured once per shape and then replayed.

    What it returns is overwritten by the next call of the same shape. It is not for several threads at once. After a
    difference or an error in capturing, the function is simply called, for good.

    Args:
        function: Of tensors on one device, to a tuple of tensors there. Everything that it depends on besides must be
            in the key, and stay where it is.
        device: Where. On a CPU the function is simply called.
        limit: Shapes to keep at most.
        recorder: In place of CUDA graphs.
    """

    def __init__(
        self, function: Function, device: torch.device, limit: int = 8, recorder: Recorder | None = None
    ) -> None:
        self.function = function
        if recorder is None and device.type == "cuda":
            recorder = CudaRecorder(device)
        self.graphs = Graphs(recorder, limit)
        self._known: OrderedDict[Hashable, tuple[list[Tensor], tuple[Tensor, ...]]] = OrderedDict()

    @property
    def failure(self) -> str | None:
        """Why calls are not captured any more; None while they are."""
        return self.graphs.failure

    def __call__(self, *inputs: Tensor, key: Hashable = (), kept: Any = None) -> tuple[Tensor, ...]:
        """The function's results.

        Args:
            inputs: The arguments; they are copied.
            key: What else the function depends on.
            kept: Objects with tensors that the function reads, to live as long as its graph.
        """
        if not self.graphs.is_recording:
            return self.function(*inputs)
        shape = key, tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
        if shape not in self._known:
            results = self.function(*inputs)
            self._known[shape] = [tensor.clone() for tensor in inputs], tuple(map(torch.clone, results))
            if len(self._known) > self.graphs.limit:
                self.graphs.discard(self._known.popitem(last=False)[0])
        self._known.move_to_end(shape)
        arguments, results = self._known[shape]
        for argument, tensor in zip(arguments, inputs, strict=True):
            argument.copy_(tensor, non_blocking=True)

        def run() -> None:
            for result, new in zip(results, self.function(*arguments), strict=True):
                result.copy_(new)

        self.graphs.run(shape, run, lambda: results, kept=kept)
        return results
