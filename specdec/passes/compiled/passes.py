"""A model's compiled passes over the slots of a `TreeCache`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.export import Dim

from specdec.kv_cache import TreeCache
from specdec.passes.capability import Capability, probe
from specdec.passes.compiled import package
from specdec.passes.compiled.forward import Layout, SlotForward, exportable
from specdec.passes.cuda_graphs.fingerprint import fingerprint, hooked
from specdec.passes.hidden_states import FINAL
from specdec.passes.tolerance import differ, noise_of

EXAMPLE = {"rows": 3, "nodes": 7, "width": 263, "slots": 521}
"""Sizes of what is exported: none is special, so that none is taken for a constant."""
CompileMode = bool | Literal["auto"]
Mask = Tensor | Mapping[str, Tensor] | None
Result = tuple[Tensor, Tensor | None]
"""Logits, `[batch, nodes, vocab]`, and the hidden states that are wanted, `[batch, nodes, layers * hidden]`."""


def check_compile_mode(mode: Any) -> None:
    """Refuses what `compiled` cannot be.

    Raises:
        ValueError: It is neither True, False nor `"auto"`.
    """
    if mode not in (True, False, "auto"):
        raise ValueError(f"compiled={mode!r} is not known; use True, False or 'auto'")


class CompiledPasses:
    """Runs a model over new nodes by a function that torch has compiled ahead of time.

    Number of rows and nodes, length and capacity of the cache are all open: one function serves plain passes, trees and
    batches. It is built when it is first needed and compared with the model itself on the first input of each kind.
    Where it cannot be had, or differs, the model runs as it is for good, after one warning.
    """

    is_eager = False

    def __init__(self) -> None:
        self.failure: str | None = None
        self.seconds = 0.0
        """What building has taken in this process."""
        self._functions: dict[Hashable, package.Function] = {}
        self._compared: set[Hashable] = set()
        self._fingerprint = 0
        self._told: set[str] = set()

    @property
    def is_ready(self) -> bool:
        """Whether something was built and has not failed."""
        return bool(self._functions)

    def is_ready_for(self, fingerprint: int) -> bool:
        """Whether what was built is of the model as it is now."""
        return self.is_ready and fingerprint == self._fingerprint

    def begin(self, model: Any, reason: str | None = None, is_told: bool = True) -> bool:
        """Begins a call: whether the model's passes can be compiled now, which is told once where not.

        Args:
            model: The model.
            reason: Why not, if that is known.
            is_told: Warn where not.
        """
        reason = reason or self.failure or obstacle(model)
        if reason is not None:
            if is_told:
                self._tell(model, reason)
            return False
        current = fingerprint(model)
        if current != self._fingerprint:  # weights that were moved or replaced, another adapter
            self._functions.clear()
            self._compared.clear()
            self._fingerprint = current
        return True

    def __call__(
        self,
        model: Any,
        cache: TreeCache,
        tokens: Tensor,
        positions: Tensor | None,
        mask: Mask,
        extra: Mapping[str, Any],
        eager: Callable[[], Result],
        may_compile: bool = True,
        states: tuple[int, ...] = (FINAL,),
    ) -> Result:
        """One pass.

        Args:
            model: The model.
            cache: After its prefill; new keys and values go to its next slots.
            tokens: `[batch, nodes]`.
            positions: `[..., batch, nodes]`, or None where the model takes none.
            mask: As the model takes it, over the slots in use; None to see all of these.
            extra: What else the model's forward is given.
            eager: Runs the same pass by the model itself.
            may_compile: Compile where nothing is found on the disk; else the model runs as it is.
            states: Which hidden states are wanted; see `HiddenStates`.
        """
        batch, nodes = tokens.shape
        layout, small, pools = inputs_of(cache, tokens, positions, mask, extra, states)
        if self.failure is not None or not all(part.is_contiguous() for part in pools):
            return eager()
        shapes = tuple((part.ndim, part.dtype) for part in small), tuple((p.shape[2::2], p.dtype) for p in pools)
        key = layout.places, layout.mask_kinds, repr(layout.extra), states, shapes, tokens.device
        sort = key, batch == 1, nodes == 1
        if cache.static is not None and sort not in self._compared:  # captured perhaps: no time for anything new
            return eager()
        try:
            inputs = [_aligned(part) for part in small] + pools
            if key not in self._functions:
                if not may_compile and not package.package_file(*module_of(model, layout, inputs)).exists():
                    return eager()
                self._functions[key] = self._build(model, layout, inputs)
            logits, *others = self._functions[key](*inputs)
        except Exception as error:  # whatever a model, torch or the compiler may raise
            self._fail(model, f"{type(error).__name__}: {str(error).strip()[:300]}")
            return eager()
        hidden = others[0] if others else None
        if sort not in self._compared:
            theirs = eager()
            noise = noise_of(model, model.dtype)
            if differ(logits, theirs[0], model.dtype, noise) or _differ(hidden, theirs[1], model.dtype, noise):
                self._fail(model, "its compiled passes give other logits than the model itself")
                return theirs
            self._compared.add(sort)
        return logits, hidden

    def _build(self, model: Any, layout: Layout, inputs: list[Tensor]) -> package.Function:
        started = time.perf_counter()
        built = package.compile_ahead(*module_of(model, layout, inputs), type(model).__name__)
        self.seconds += time.perf_counter() - started
        return built

    def _fail(self, model: Any, reason: str) -> None:
        self.failure = reason
        self._functions.clear()
        self._tell(model, reason)

    def _tell(self, model: Any, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            warnings.warn(
                f"the passes of {type(model).__name__} are not compiled, and run as they are; leave out compiled=True, "
                f"or see that torch can compile here. {reason}",
                RuntimeWarning,
                stacklevel=2,
            )


_PASSES: WeakKeyDictionary[nn.Module, CompiledPasses] = WeakKeyDictionary()


def compiled_passes(model: Any) -> CompiledPasses:
    """The compiled passes of a model, the same for all who ask."""
    if model not in _PASSES:
        _PASSES[model] = CompiledPasses()
    return _PASSES[model]


def begin_compiled(model: Any, capability: Capability) -> CompiledPasses | None:
    """The compiled passes of a model for one call; None where there are none, which is told once."""
    passes = compiled_passes(model)
    return passes if passes.begin(model, no_trees(model, capability)) else None


def no_trees(model: Any, capability: Capability) -> str | None:
    """Why a model that is run this way has no compiled passes, or None."""
    if capability.mode != "tree":
        return f"the model is not run on trees ({capability.reason})"
    # On a GPU another backend is the default; compiled passes need the model's own to take the same trees.
    is_own = capability.attention == "model"
    is_own = is_own or (
        model.device.type == "cuda" and probe(model, attention="model").mask_format == capability.mask_format
    )
    if not is_own:
        return f"attention is computed by {capability.attention}"
    return None


def obstacle(model: Any) -> str | None:
    """Why the passes of this model may not be compiled now, or None."""
    if model.training:
        return "the model is in training mode"
    places = set(map(str, getattr(model, "hf_device_map", {}).values()))
    if len(places) > 1 or places & {"cpu", "disk"} or model.device.type == "meta":
        return "the model is spread over several devices, or its weights come from elsewhere"
    if getattr(model, "_tp_size", None) is not None:
        return "the model is split over several processes"
    if name := hooked(model):
        return f"forward hooks of its {name} must be called in each pass"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    return None


def inputs_of(
    cache: TreeCache,
    tokens: Tensor,
    positions: Tensor | None,
    mask: Mask,
    extra: Mapping[str, Any],
    states: tuple[int, ...],
) -> tuple[Layout, list[Tensor], list[Tensor]]:
    """How the inputs of a pass are laid out, those made for it, and the pools of the cache."""
    batch, nodes = tokens.shape
    static = cache.static
    if static is None:
        width = cache.width + cache.staged + nodes
        cache.reserve(width)
        rows, slots = cache.new_slots(nodes, tokens.device)
    else:
        width, rows, slots = static.width, static.rows, static.slots
    if mask is None:
        mask = torch.ones((batch, 1, nodes, width), dtype=torch.bool, device=tokens.device)
    masks, kinds = ([mask], None) if isinstance(mask, Tensor) else ([*mask.values()], tuple(mask))
    pools, places = cache.pools()
    layout = Layout(places, kinds, positions is not None, tuple(sorted(extra.items())), states)
    return layout, [tokens, rows, slots, *([] if positions is None else [positions]), *masks], pools


def module_of(
    model: Any, layout: Layout, inputs: list[Tensor]
) -> tuple[SlotForward, tuple[Tensor, ...], tuple[Any, ...]]:
    """What is compiled, with examples of its inputs and which of their dimensions may have other sizes."""
    examples, dynamic = zip(*_examples(layout, inputs), strict=True)
    return SlotForward(exportable(model), layout), examples, dynamic


def _examples(layout: Layout, inputs: list[Tensor]) -> list[tuple[Tensor, dict[int, Any]]]:
    """Inputs of one layout with sizes that stand for all, and which of their dimensions these are."""
    rows, nodes, width, slots = EXAMPLE.values()
    at_masks = 4 if layout.has_positions else 3

    def sized(number: int, tensor: Tensor) -> dict[int, int]:
        if number == 1:
            return {0: rows}
        if number < at_masks:
            return {tensor.ndim - 2: rows, tensor.ndim - 1: nodes}
        if number < at_masks + layout.num_masks:
            return {0: rows, 2: nodes, 3: width}
        return {1: rows, 3: slots}

    found = []
    for number, tensor in enumerate(inputs):
        sizes = sized(number, tensor)
        shape = [sizes.get(dim, size) for dim, size in enumerate(tensor.shape)]
        found.append((tensor.new_zeros(shape), dict.fromkeys(sizes, Dim.DYNAMIC)))
    return found


def _aligned(tensor: Tensor) -> Tensor:
    """As compiled functions take it: on a GPU not only contiguous but at the beginning of an allocation."""
    return tensor.contiguous() if tensor.device.type == "cpu" else tensor.clone(memory_format=torch.contiguous_format)


def _differ(mine: Tensor | None, theirs: Tensor | None, dtype: torch.dtype, noise: float) -> bool:
    return mine is not None and theirs is not None and differ(mine, theirs, dtype, noise)
