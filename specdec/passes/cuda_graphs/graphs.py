"""What the device does in a function, recorded once and done again at the cost of one launch."""

from __future__ import annotations

import gc
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec.passes.probe import is_passing

MAX_GRAPHS = 64
"""Graphs of one model; each holds some megabytes of the driver's memory beside the buffers that all of them share."""
NUM_PROVEN = 2
"""Graphs of one model that are compared again on the first inputs that differ from those of the recording."""


PAUSE = 30.0
"""Seconds without recording after the device ran out of memory; raising it leaves more time for memory to be freed."""


class Recorder(Protocol):
    """Records what a function without arguments does on the device."""

    nbytes: int = 0
    """Device memory that recordings took beyond the buffers they were given."""

    def reset(self) -> None:
        """Called when all recordings are forgotten: their memory may be freed."""

    def warm_up(self, function: Callable[[], None]) -> None:
        """Runs the function as it is, where a recording may follow."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Records the function and returns what does the same again."""


class CudaRecorder:
    """CUDA graphs, all in one memory pool: what a graph needs between its launches is free for the next graph.

    So a function must leave its results in buffers that were allocated outside.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.index = device.index
        self.reset()

    def reset(self) -> None:
        self.nbytes = 0
        self.pool: Any = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(self.device)

    def warm_up(self, function: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            function()
        current.wait_stream(self.stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        generator = torch.cuda.default_generators[torch.cuda.current_device() if self.index is None else self.index]
        before = generator.clone_state()
        reserved = torch.cuda.memory_reserved(self.device)
        collects = gc.isenabled()
        gc.disable()  # what it frees may belong to other streams, which invalidates the capture
        try:
            with (
                torch.cuda.device(self.device),
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                function()
        except BaseException:
            # A capture that fails leaves the generator waiting for its end, and refusing to draw.
            generator.graphsafe_set_state(before)
            self.reset()  # pool and stream may be left in the middle of it
            raise
        finally:
            torch.cuda.set_stream(current)  # ... and its own stream behind as the current one
            if collects:
                gc.enable()
        self.nbytes += max(torch.cuda.memory_reserved(self.device) - reserved, 0)
        return graph.replay


@dataclass
class _Entry:
    """One graph.

    Args:
        replay: Launches it.
        kept: What it refers to by address, and what nobody else may hold on to.
        inputs: What it was recorded with.
        is_proven: It was right on other inputs, too, or need not be shown to be.
    """

    replay: Callable[[], None]
    kept: Any
    inputs: Hashable
    is_proven: bool = False


class Graphs:
    """Recorded functions by key, the least recently used forgotten first.

    Nothing is taken on trust: a recording must give the result that the function itself has just given, and the first
    ones must do so again on other inputs, which tells a value of the host that has become a part of the graph. After
    a difference or an error nothing is recorded any more, and every function simply runs; after a lack of memory that
    lasts for `PAUSE` seconds.

    Args:
        recorder: None for functions that simply run.
        limit: Graphs to keep at most.
    """

    def __init__(self, recorder: Recorder | None, limit: int = MAX_GRAPHS) -> None:
        self.recorder = recorder
        self.limit = limit
        self._failure: str | None = None
        self._ends_at = math.inf
        self.num_recorded = 0
        self._num_proven = 0
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def failure(self) -> str | None:
        """Why nothing is recorded now, or any more."""
        if time.monotonic() >= self._ends_at:
            self._failure, self._ends_at = None, math.inf
        return self._failure

    @property
    def is_recording(self) -> bool:
        """Whether functions are recorded, as far as is known."""
        return self.recorder is not None and self.failure is None

    def run(
        self,
        key: Hashable,
        function: Callable[[], None],
        outputs: Callable[[], Sequence[Tensor]],
        inputs: Hashable = None,
        kept: Any = None,
    ) -> None:
        """Does what `function` does.

        Args:
            key: Functions of one key launch the same work on the same buffers.
            function: Reads and writes buffers that stay where they are; run twice, it leaves what it leaves run once.
            outputs: The buffers with the results, asked for after a run.
            inputs: Tells apart what the buffers hold; None: never the same.
            kept: Objects with tensors of their own that the function reads.
        """
        if self.recorder is None or self.failure is not None:
            function()
            return
        entry = self._entries.get(key)
        if entry is None:
            self._record(self.recorder, key, function, outputs, inputs, kept)
            return
        self._entries.move_to_end(key)
        if entry.is_proven or (inputs is not None and inputs == entry.inputs):
            entry.replay()
        else:
            self._prove(self.recorder, entry, function, outputs)

    def discard(self, key: Hashable) -> None:
        """Forgets one graph."""
        self._entries.pop(key, None)

    def clear(self) -> None:
        """Forgets all graphs: their buffers are gone, or what they take for granted is not so any more."""
        self._entries.clear()
        if self.recorder is not None:
            self.recorder.reset()

    def fail(self, reason: str, error: BaseException | None = None) -> None:
        """Records nothing any more; after a lack of memory, for a while.

        Args:
            reason: Why, in words.
            error: The error behind it, if there is one.
        """
        self._failure, self._ends_at = reason, math.inf
        if error is not None and is_passing(error):
            self._failure, self._ends_at = f"{reason} (tried again after {PAUSE:g} s)", time.monotonic() + PAUSE
        self.clear()

    def _record(
        self,
        recorder: Recorder,
        key: Hashable,
        function: Callable[[], None],
        outputs: Callable[[], Sequence[Tensor]],
        inputs: Hashable,
        kept: Any,
    ) -> None:
        replay = self._checked(recorder, function, outputs, lambda: recorder.record(function))
        if replay is None:
            return
        self.num_recorded += 1
        self._entries[key] = _Entry(replay, (kept, outputs()), inputs, self._num_proven >= NUM_PROVEN)
        if len(self._entries) > self.limit:
            self._entries.popitem(last=False)

    def _prove(
        self,
        recorder: Recorder,
        entry: _Entry,
        function: Callable[[], None],
        outputs: Callable[[], Sequence[Tensor]],
    ) -> None:
        if self._checked(recorder, function, outputs, lambda: entry.replay) is not None:
            entry.is_proven = True
            self._num_proven += 1

    def _checked(
        self,
        recorder: Recorder,
        function: Callable[[], None],
        outputs: Callable[[], Sequence[Tensor]],
        replay_of: Callable[[], Callable[[], None]],
    ) -> Callable[[], None] | None:
        """Does what the function does, twice: as it is, and by what should replay it.

        Returns:
            What replays it; None if that gave another result or an error, after which nothing is recorded any more.
        """
        recorder.warm_up(function)
        expected = [output.clone() for output in outputs()]
        failed: Exception | None = None
        try:
            replay = replay_of()
            reason = _difference(replay, outputs(), expected)
        except Exception as error:
            reason, failed = describe(error), first_error(error)
        if reason is None:
            return replay
        self.fail(reason, failed)
        function()
        return None


def _difference(replay: Callable[[], None], outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """Whether a replay gives something else than the function itself, in words."""
    for output in outputs:
        # What a replay does not write must not look right.
        output.fill_(float("nan")) if output.is_floating_point() else output.fill_(-1)
    replay()
    # The same kernels over the same inputs: bit for bit, not up to rounding.
    if not all(torch.equal(output, right) for output, right in zip(outputs, expected, strict=True)):
        return "a replayed step gave another result than the step itself"
    return None


def first_error(error: Exception) -> Exception:
    """The first error, where ending the capture has raised another."""
    while isinstance(error.__context__, Exception):
        error = error.__context__
    return error


def describe(error: Exception) -> str:
    """The first error in one line."""
    error = first_error(error)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]:.300}"
