"""Which backend of tree attention computes a pass: by name, or by measurement on the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from specdec.passes.attention.base import AttentionCall, TreeAttention, UnsupportedAttentionError
from specdec.passes.attention.dense import ModelAttention, SdpaAttention
from specdec.passes.attention.flash import FlashTreeAttention
from specdec.passes.attention.flex import FlexTreeAttention
from specdec.passes.attention.triton_attention import TritonTreeAttention
from specdec.passes.cuda_graphs.graphs import CudaRecorder, Recorder, describe

AttentionLike = str | Sequence[str]

BACKENDS: dict[str, Callable[[], TreeAttention]] = {
    "sdpa": SdpaAttention,
    "flex": FlexTreeAttention,
    "triton": TritonTreeAttention,
    "flash": FlashTreeAttention,
}
"""Backends by name, beside `"model"`: what the model was loaded with, given a mask."""

RUNS = 10
"""Calls of a backend that are timed together."""


def known_names() -> str:
    """The names that a user can say, for messages."""
    return ", ".join(map(repr, ("auto", "model", *BACKENDS)))


def check_attention(attention: AttentionLike) -> None:
    """Refuses names that are not known and backends that are not installed.

    Raises:
        ValueError: A name is not known, or there is none.
        TypeError: It is not made of names.
        ImportError: A backend needs what is not installed.
    """
    names = [attention] if isinstance(attention, str) else list(attention)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"attention={attention!r} must be one of {known_names()}, or a list of such names")
    if not names or ("auto" in names and len(names) > 1):
        raise ValueError(f"attention={attention!r} names nothing to choose of; use one of {known_names()}, or a list")
    for name in names:
        if name not in ("auto", "model", *BACKENDS):
            raise ValueError(f"attention={name!r} is not known; use one of {known_names()}, or a list of them")
        if name in BACKENDS and (missing := BACKENDS[name]().missing()):
            raise ImportError(f"attention={name!r} cannot be used: {missing}")


def candidates(attention: AttentionLike, implementation: str, device: torch.device) -> list[str]:
    """Backends to try, in the order in which they are preferred while nothing is measured.

    Args:
        attention: What the user said.
        implementation: What the model was loaded with, in transformers' words.
        device: Where the model runs.
    """
    if attention != "auto":
        return [attention] if isinstance(attention, str) else list(dict.fromkeys(attention))
    if device.type != "cuda":
        return ["model"]
    names = {"sdpa": ["model", "triton", "sdpa"], "eager": ["triton", "sdpa"]}.get(implementation, [])
    if implementation.startswith("flash_attention"):
        names = ["flash", "triton", "sdpa"]
    return [name for name in names if name == "model" or BACKENDS[name]().missing() is None] or ["model"]


ShapeClass = tuple[Any, ...]
"""Calls whose fastest backend is taken to be the same: sizes by powers of two, heads, types and the kind of layer."""


def shape_class(call: AttentionCall) -> ShapeClass:
    """The class of a call's shapes."""
    query, key, value = call.query, call.key, call.value
    sizes = [1 << (size - 1).bit_length() for size in (query.shape[0], query.shape[2], key.shape[2])]
    heads = query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]
    kind = call.layer_type, call.softcap is not None, call.plan.is_left_padded, call.plan.needs_no_mask
    return (*sizes, *heads, query.dtype, query.device, *kind)


@dataclass
class AttentionChoice:
    """The backends of one model, and which of them is used for which class of shapes.

    Args:
        backends: By name, preferred first.
        chosen: The fastest per class of shapes, as far as was measured.
        seconds: What each one took then.
        dropped: Why a backend is not used for some class.
        uncaptured: Why the launches of a backend were timed with its work.
    """

    backends: dict[str, TreeAttention]
    chosen: dict[ShapeClass, str] = field(default_factory=dict)
    seconds: dict[ShapeClass, dict[str, float]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    uncaptured: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> str:
        """Of the backends, in words."""
        return ", ".join(self.backends)

    def attend(self, call: AttentionCall) -> Tensor:
        """Attention by the fastest backend; the first call of a class of shapes measures them all.

        Raises:
            UnsupportedAttentionError: No backend can do what the layer asks for.
        """
        if len(self.backends) == 1:
            return next(iter(self.backends.values())).attend(call)
        kind = shape_class(call)
        name = self.chosen.get(kind)
        if name is None:
            if call.query.is_cuda and torch.cuda.is_current_stream_capturing():
                return next(iter(self.backends.values())).attend(call)
            name = self.chosen[kind] = self._measure(call, kind)
        return self.backends[name].attend(call)

    def _measure(self, call: AttentionCall, kind: ShapeClass) -> str:
        seconds: dict[str, float] = {}
        reasons = {}
        for name, backend in self.backends.items():
            try:
                seconds[name], why_not = seconds_of(partial(backend.attend, call), call.query.device)
                self.uncaptured |= {name: why_not} if why_not is not None else {}
            except Exception as error:  # whatever a compiler or a kernel may raise: the others can do without it
                reasons[name] = f"{type(error).__name__}: {error}"
        if not seconds:
            raise UnsupportedAttentionError("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
        self.seconds[kind] = seconds
        self.dropped |= reasons
        return min(seconds, key=seconds.__getitem__)

    def summary(self) -> str:
        """In words: the backends, and how often each was the fastest."""
        if len(self.backends) == 1:
            return next(iter(self.backends))
        counts = {name: list(self.chosen.values()).count(name) for name in self.backends}
        fastest = ", ".join(f"{name} for {count}" for name, count in counts.items() if count)
        return f"the fastest of {self.names}" + (f" (so far {fastest} classes of shapes)" if fastest else "")

    def explanation(self) -> str:
        """The summary, with what was measured last, and what went wrong."""
        parts = [self.summary()]
        if self.seconds:
            last = list(self.seconds.values())[-1]
            times = ", ".join(f"{name} {taken * 1e3:.3f} ms" for name, taken in last.items())
            parts.append(f"measured last, for one layer: {times}")
        parts += [f"{name} was left out: {why}" for name, why in self.dropped.items()]
        parts += [f"{name} could not be captured: {why}" for name, why in self.uncaptured.items()]
        return "; ".join(parts)


def seconds_of(
    run: Callable[[], Any], device: torch.device, recorder: Recorder | None = None
) -> tuple[float, str | None]:
    """Seconds of one call, the least of three rounds.

    On CUDA the calls are captured and replayed where that is possible, because the launches of a step cost next to
    nothing once it is captured.

    Args:
        run: What to time.
        device: Where it runs.
        recorder: In place of CUDA graphs.

    Returns:
        The seconds, and why the calls were not captured; None where they were, and where nothing is.
    """
    if recorder is None and device.type == "cuda":
        recorder = _recorder(device)

    def repeat() -> None:
        for _ in range(RUNS):
            run()

    def wait() -> None:
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)

    for _ in range(2):
        run()  # compiles
    timed, reason = repeat, None
    if recorder is not None:
        try:
            timed = recorder.record(repeat)
            timed()
        except Exception as error:
            wait()
            timed, reason = repeat, describe(error)
    return _least(timed, wait) / RUNS, reason


@cache
def _recorder(device: torch.device) -> CudaRecorder:
    """One memory pool for all measurements: none of their graphs lives on."""
    return CudaRecorder(device)


def _least(run: Callable[[], Any], wait: Callable[[], Any]) -> float:
    times = []
    for _ in range(3):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)


_CHOICES: WeakKeyDictionary[Any, dict[Any, AttentionChoice]] = WeakKeyDictionary()


def choice_for(model: Any, names: Sequence[str]) -> AttentionChoice:
    """The choice among some backends for a model, with all that was measured before."""
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    known = _CHOICES.setdefault(model, {})
    key = (tuple(names), implementation)
    if key not in known:
        backends = {name: ModelAttention(implementation) if name == "model" else BACKENDS[name]() for name in names}
        known[key] = AttentionChoice(backends)
    return known[key]
