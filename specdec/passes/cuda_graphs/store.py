"""What captured steps of a model need beyond one call: graphs, buffers, and the memory of the kv cache."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from specdec.kv_cache import Storage
from specdec.passes.cuda_graphs.fingerprint import fingerprint, hooked
from specdec.passes.cuda_graphs.graphs import CudaRecorder, Graphs, Recorder
from specdec.target import CausalLM, is_on_one_device

GraphMode = Literal["auto", "eager"] | bool
GRAPH_MODES: tuple[GraphMode, ...] = ("auto", True, False, "eager")
KEPT_SHARE = 0.125
"""Share of the device's memory that a model's kv cache, buffers and graphs may keep between calls. Raising it keeps
larger caches, whose graphs then need not be captured anew."""
MAX_CHANGES = 4
"""Calls in a row before each of which the model has changed, after which nothing is captured any more."""
OVERSIZE = 2
"""A kept kv cache may be so many times larger than a call needs before it is replaced to fit a new shape."""


class StaticStore(Storage):
    """Of one model on one device: graphs, their buffers, and keys and values that stay where they are.

    Args:
        device: The model's.
        recorder: None: the static step runs as it is.
    """

    def __init__(self, device: torch.device, recorder: Recorder | None) -> None:
        self.device = device
        self.graphs = Graphs(recorder)
        self.lock = threading.Lock()
        self.batch = 0
        self.slots = 0
        self.is_compared = False
        """The static step has given what the step of changing shapes gives."""
        self._pools: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self._buffers: dict[Hashable, Tensor] = {}
        self._fingerprint = 0
        self._num_changes = 0
        self._last_use: Any = None

    def acquire(self, model: CausalLM) -> bool:
        """Begins a call, until `end`; False while another call is under way."""
        if not self.lock.acquire(blocking=False):
            return False
        current = fingerprint(model)
        if current != self._fingerprint:
            self._num_changes += 1
            self._fingerprint, self.is_compared = current, False
            self.graphs.clear()
            if self._num_changes > MAX_CHANGES:
                self.graphs.fail(f"something in the model was another one in {MAX_CHANGES} calls in a row")
        else:
            self._num_changes = 0
        if self._last_use is not None:
            torch.cuda.current_stream(self.device).wait_event(self._last_use)
        return True

    def reserve(self, batch: int, slots: int) -> int:
        """Makes room in the kv cache; returns how many slots there are."""
        if batch > self.batch or slots > self.slots:
            wider, longer = max(batch, self.batch), max(slots, self.slots)
            if wider * longer > OVERSIZE * batch * slots:
                wider, longer = batch, slots
            self._forget()
            self.batch, self.slots = wider, longer
        return self.slots

    def end(self) -> None:
        """The call is over."""
        if self.device.type == "cuda":
            self._last_use = torch.cuda.Event()
            self._last_use.record(torch.cuda.current_stream(self.device))
            memory = torch.cuda.get_device_properties(self.device).total_memory
            if self.nbytes > KEPT_SHARE * memory:
                self._forget()
        self.lock.release()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, of buffers (draws and logits among them), and of the graphs' own memory."""
        tensors = [*(part for pool in self._pools.values() for part in pool), *self._buffers.values()]
        graphs = 0 if self.graphs.recorder is None else self.graphs.recorder.nbytes
        return graphs + sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def take(self, kind: tuple[Any, ...], layers: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        batch = len(key)
        if kind not in self._pools:
            keys, values = (
                part.new_zeros((layers, self.batch, part.shape[1], self.slots, part.shape[-1])) for part in (key, value)
            )
            self._pools[kind] = keys, values
        # What is hidden by the mask is still multiplied, by zero: nothing of an earlier call may be there that is not
        # a number.
        keys, values = (pool[:, :batch].zero_() for pool in self._pools[kind])
        return keys, values

    def replace(self, pools: Mapping[tuple[Any, ...], tuple[Tensor, Tensor]], slots: int) -> None:
        self._forget()
        self._pools = dict(pools)
        self.batch, self.slots = next(iter(pools.values()))[0].shape[1], slots

    def buffer(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.int64, fill: float | None = None
    ) -> Tensor:
        """The buffer of this name and shape, always the same one; its first content is `fill`, or undefined."""
        key = name, shape, dtype
        if key not in self._buffers:
            new = torch.empty(shape, dtype=dtype, device=self.device)
            self._buffers[key] = new if fill is None else new.fill_(fill)
        return self._buffers[key]

    def counting(self, count: int) -> Tensor:
        """0, 1, 2, ..."""
        buffer = self._buffers.get(("counting", count))
        if buffer is None:
            buffer = self._buffers["counting", count] = torch.arange(count, device=self.device)
        return buffer

    def keep(self, name: str, shape: tuple[int, int], result: Tensor) -> None:
        """Copies a result of a step, `[*shape, ...]`, into its buffer."""
        if (name, shape) not in self._buffers:
            self._buffers[name, shape] = torch.empty_like(result)
        self._buffers[name, shape].copy_(result)

    def kept(self, name: str, shape: tuple[int, int]) -> Tensor | None:
        """The buffer of a result, or None where there was none."""
        return self._buffers.get((name, shape))

    def describe(self) -> str:
        """In words, how steps are run."""
        if self.graphs.failure is not None:
            return f"none, because {self.graphs.failure}"
        if self.graphs.recorder is None:
            return "none; the same static step runs as it is, for tests"
        return f"{len(self.graphs)} captured so far, of at most {self.graphs.limit}"

    def _forget(self) -> None:
        """Frees keys, values and buffers, and with them all graphs."""
        self.graphs.clear()
        self._pools, self._buffers = {}, {}
        self.batch = self.slots = 0


_STORES: WeakKeyDictionary[CausalLM, dict[Hashable, StaticStore]] = WeakKeyDictionary()


def store_of(model: CausalLM, mode: GraphMode, device: torch.device) -> StaticStore:
    """The store of a model, which lives as long as the model."""
    stores = _STORES.setdefault(model, {})
    key = mode == "eager", str(device)
    if key not in stores:
        recorder = None if mode == "eager" else CudaRecorder(device)
        stores[key] = StaticStore(device, recorder)
    return stores[key]


def release(model: CausalLM) -> None:
    """Frees the graphs of a model, and the kv cache that was kept for them. The next call captures anew."""
    _STORES.pop(model, None)


def check_graph_mode(mode: Any) -> None:
    """Refuses what is no mode, and graphs where there can be none.

    Raises:
        ValueError: `mode` is not known, or it is True and torch finds no CUDA device.
    """
    if not any(mode is known or (isinstance(mode, str) and mode == known) for known in GRAPH_MODES):
        known = ", ".join(map(repr, GRAPH_MODES))
        raise ValueError(f"cuda_graphs={mode!r} is not known; use one of {known}")
    if mode is True and not torch.cuda.is_available():
        raise ValueError("cuda_graphs=True needs a CUDA device, and torch finds none; use cuda_graphs='auto'")


def obstacle(model: CausalLM, mode: GraphMode, device: torch.device) -> str | None:
    """Why no step of this model may be captured, or None."""
    if mode is False:
        return "switched off by the caller"
    if mode != "eager" and device.type != "cuda":
        return f"the model is on {device.type}"
    if model.training:
        return "the model is in training mode"
    if not is_on_one_device(model) or _is_offloaded(model):
        return "the model is spread over several devices, or its weights come from elsewhere"
    if getattr(model, "_tp_size", None) is not None:
        return "the model is split over several processes"
    if name := hooked(model):
        return f"forward hooks of its {name} must be called in each pass"
    known = _STORES.get(model, {}).get((mode == "eager", str(device)))
    return known.graphs.failure if known is not None else None


def acquire(model: CausalLM, mode: GraphMode, device: torch.device) -> StaticStore | str:
    """The store of a model for one call, which must `end`; or why there is none.

    Raises:
        ValueError: There is none, and graphs are demanded.
    """
    reason = obstacle(model, mode, device)
    if reason is None:
        store = store_of(model, mode, device)
        if store.acquire(model):
            return store
        reason = "another call of this model is using them"
    check_demand(mode, reason)
    return reason


def check_demand(mode: GraphMode, reason: str) -> None:
    """Refuses to go on without graphs if they are demanded.

    Raises:
        ValueError: They are.
    """
    if mode is True:
        raise ValueError(f"cuda_graphs=True cannot be had: {reason}; use cuda_graphs='auto' to go on without")


def _is_offloaded(model: CausalLM) -> bool:
    return any(str(place) in ("cpu", "disk") for place in getattr(model, "hf_device_map", {}).values())


def describe(model: CausalLM, mode: GraphMode) -> str:
    """In words, whether steps of this model are captured, and why not; empty where nobody expects it."""
    device = model.device
    if mode == "auto" and device.type == "cpu":
        return ""
    if reason := obstacle(model, mode, device):
        return f"none, because {reason}"
    known = _STORES.get(model, {}).get((mode == "eager", str(device)))
    return known.describe() if known is not None else "captured at the first call"
