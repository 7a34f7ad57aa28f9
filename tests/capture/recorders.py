"""Stand-ins for CUDA graphs, and what finds a value that the host reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specdec.passes.cuda_graphs import store as stores
from specdec.passes.cuda_graphs.graphs import Recorder
from specdec.passes.cuda_graphs.store import StaticStore


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: the operations of a function, on the very tensors that it had."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@dataclass
class Replays(Recorder):
    """Records functions on tapes.

    Args:
        error_at: Recording of this number raises.
        wrong_at: The replay of the recording of this number does nothing.
        is_strict: The host may read no value in a function.
    """

    error_at: int | None = None
    wrong_at: int | None = None
    is_strict: bool = True
    num_recorded: int = 0
    num_replayed: int = 0
    num_warm_ups: int = 0
    replayed: list[int] = field(default_factory=list)

    def warm_up(self, function: Callable[[], None]) -> None:
        self.num_warm_ups += 1
        with no_host_reads() if self.is_strict else nullcontext():
            function()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        number = self.num_recorded
        self.num_recorded += 1
        if number == self.error_at:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        with no_host_reads() if self.is_strict else nullcontext(), Tape() as tape:
            function()

        def replay() -> None:
            self.num_replayed += 1
            self.replayed.append(number)
            if number != self.wrong_at:
                tape.replay()

        return replay


class _NoReads(TorchDispatchMode):
    """Refuses operations whose shapes or values the host must learn."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"):
            raise AssertionError(f"the host reads a value: {func}")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_reads() -> Iterator[None]:
    """Inside, no value of a tensor may come to the host, and none may go to the device."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the host reads or writes a tensor in a static step")

    with pytest.MonkeyPatch.context() as patch, _NoReads():
        for method in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(Tensor, method, refuse)
        for function in ("tensor", "from_numpy", "as_tensor"):
            patch.setattr(torch, function, refuse)
        yield


@contextmanager
def recorded_by(recorder: Recorder | None) -> Iterator[dict[Any, StaticStore]]:
    """Inside, calls with `cuda_graphs="eager"` record with this recorder; gives the stores by model."""
    found: dict[Any, StaticStore] = {}

    def store_of(model: Any, mode: Any, device: torch.device) -> StaticStore:
        if model not in found:
            found[model] = StaticStore(device, recorder)
        return found[model]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "store_of", store_of)
        yield found
