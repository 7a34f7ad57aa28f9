"""`compiled="auto"`: what was compiled before is used at once; the rest is compiled while eager passes go on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch._inductor.cpp_builder import get_cpp_compiler

from specdec.common.folders import cache_folder
from specdec.kv_cache import TreeCache
from specdec.passes.capability import Capability
from specdec.passes.compiled import package
from specdec.passes.compiled.background import Compilation, is_compiled_elsewhere, remembered
from specdec.passes.compiled.forward import Layout, SlotForward
from specdec.passes.compiled.passes import (
    CompiledPasses,
    CompileMode,
    Mask,
    Result,
    begin_compiled,
    compiled_passes,
    inputs_of,
    module_of,
    no_trees,
    obstacle,
)
from specdec.passes.cuda_graphs.fingerprint import fingerprint
from specdec.passes.hidden_states import FINAL

START_AFTER = 10.0
"""Seconds a model must have spent in eager passes of this process before it is compiled; raising it spares short
lives the work, and makes long ones wait."""
_LOGGER = logging.getLogger(__name__)


class AutoPasses:
    """What `compiled="auto"` knows of a model in this process.

    Args:
        passes: Of the model, for when there is a package.
    """

    def __init__(self, passes: CompiledPasses) -> None:
        self.passes = passes
        self.waited = 0.0
        """Seconds of eager passes so far."""
        self.failure: str | None = None
        """Why nothing is compiled in the background."""
        self.compilation: Compilation | None = None
        self._lock = threading.Lock()
        self._fingerprint: int | None = None
        self._digest = ""

    def has_package(self, model: Any) -> bool:
        """Whether something that was compiled for this model is on the disk, or in use."""
        current = fingerprint(model)
        if self.passes.is_ready_for(current):
            return True
        if current != self._fingerprint:
            self._digest, self.failure = package.module_digest(SlotForward(model, Layout((), None, False, ()))), None
            self._fingerprint = current
        found = {file.suffix: file for file in cache_folder().glob(f"{self._digest}-*")}
        if ".pt2" in found:
            return True
        if ".failed" in found:
            self.failure = f"{remembered(found['.failed'])} (kept in {found['.failed']}; compiled=True tries again)"
        return False

    def is_compiling(self) -> bool:
        """Whether a process of this one's compiles now; notes why it failed, if it did."""
        if self.compilation is None:
            return False
        if self.compilation.is_running:
            return True
        self.failure = self.failure or self.compilation.failure
        self.compilation = None
        return False

    def start(self, model: Any, layout: Layout, inputs: list[Tensor]) -> None:
        """Starts compiling, unless this or another process does so already, or has failed to before."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self.failure is not None or self.is_compiling():
                return
            self.waited = 0.0  # looks again after as long, in case another process compiles and is ended
            get_cpp_compiler()
            module = module_of(model, layout, inputs)
            if not is_compiled_elsewhere(package.package_file(*module)):
                self.compilation = Compilation(*module)
                _LOGGER.info("compiling the passes of %s in the background", type(model).__name__)
        except Exception as error:  # what cannot be pickled, a system without processes, no compiler
            self.failure = f"{type(error).__name__}: {str(error).strip()[:300]}"
        finally:
            self._lock.release()


class EagerPasses:
    """The passes of one call in which nothing compiled is used: timed, and compiled in the background in time.

    Args:
        auto: Of the model.
    """

    is_eager = True

    def __init__(self, auto: AutoPasses) -> None:
        self.auto = auto

    def __call__(
        self,
        model: Any,
        cache: TreeCache,
        tokens: Tensor,
        positions: Tensor | None,
        mask: Mask,
        extra: Mapping[str, Any],
        eager: Callable[[], Result],
        states: tuple[int, ...] = (FINAL,),
    ) -> Result:
        """One pass, as `CompiledPasses` takes it."""
        auto = self.auto
        if auto.waited >= START_AFTER and auto.failure is None and cache.static is None:
            layout, small, pools = inputs_of(cache, tokens, positions, mask, extra, states)
            auto.start(model, layout, small + pools)
        started = time.perf_counter()
        result = eager()
        auto.waited += time.perf_counter() - started
        return result


class KeptPasses(EagerPasses):
    """The passes of one call in which what is on the disk is used, and nothing is compiled."""

    is_eager = False

    def __call__(
        self,
        model: Any,
        cache: TreeCache,
        tokens: Tensor,
        positions: Tensor | None,
        mask: Mask,
        extra: Mapping[str, Any],
        eager: Callable[[], Result],
        states: tuple[int, ...] = (FINAL,),
    ) -> Result:
        return self.auto.passes(model, cache, tokens, positions, mask, extra, eager, may_compile=False, states=states)


_AUTO: WeakKeyDictionary[nn.Module, AutoPasses] = WeakKeyDictionary()


def auto_passes(model: Any) -> AutoPasses:
    """What `compiled="auto"` knows of a model, the same for all who ask."""
    passes = compiled_passes(model)
    if model not in _AUTO or _AUTO[model].passes is not passes:
        _AUTO[model] = AutoPasses(passes)
    return _AUTO[model]


def begin_passes(model: Any, capability: Capability, mode: CompileMode) -> CompiledPasses | EagerPasses | None:
    """What runs the passes of one call.

    Args:
        model: The target.
        capability: How it is run.
        mode: As the caller said.

    Returns:
        None where the model runs as it is.
    """
    if mode != "auto":
        return begin_compiled(model, capability) if mode else None
    if _obstacle(model, capability) is not None:
        return None
    auto = auto_passes(model)
    auto.is_compiling()
    if auto.has_package(model):
        return KeptPasses(auto) if auto.passes.begin(model, is_told=False) else None
    return EagerPasses(auto)


def describe_compiled(model: Any, capability: Capability, mode: CompileMode) -> str:
    """In words, whether passes of this model are compiled, and why not; empty where nobody asked."""
    if not mode:
        return ""
    passes = compiled_passes(model)
    reason = (_obstacle if mode == "auto" else _obstacle_on_demand)(model, capability)
    if reason is not None:
        return f"no, because {reason}"
    if passes.is_ready:
        return f"yes, ready in {passes.seconds:.1f} s"
    if mode != "auto":
        return "at the first call"
    auto = auto_passes(model)
    if auto.is_compiling():
        assert auto.compilation is not None
        return f"not yet, process {auto.compilation.process.pid} is compiling"
    if auto.has_package(model):
        return "at the next call"
    if auto.failure is not None:
        return f"no, because {auto.failure}"
    return f"not yet, compiled in the background after {START_AFTER:g} s of passes"


def _obstacle(model: Any, capability: Capability) -> str | None:
    if model.device.type != "cpu":
        return "compiled='auto' is for models on a CPU"
    return _obstacle_on_demand(model, capability)


def _obstacle_on_demand(model: Any, capability: Capability) -> str | None:
    return no_trees(model, capability) or compiled_passes(model).failure or obstacle(model)
