"""Drafting while accelerate loads the target's weights: LLMCad's pipeline (arXiv 2309.04255, section 3.4)."""

from __future__ import annotations

import functools
import mmap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from specdec.drafters.base import DraftContext, Step
from specdec.drafters.small_model.branch_pace import (
    FIRST_THRESHOLD,
    OPENING_SCORE,
    WIDTH,
    adjusted,
    choose_branches,
    outcome,
)
from specdec.drafters.small_model.call import DraftCall, Growth
from specdec.drafters.small_model.growth import DraftNodes
from specdec.kernels import Ints, host_array
from specdec.target import CausalLM

AHEAD_WIDTH = 4
"""Nodes per level of what is drafted ahead, likeliest first: the outcomes of the target's pass are many."""
LEAST_SHARE = 0.75
"""A level is begun while at least this share of its time is left of a load: the target waits for its end."""
MEMORY = 0.95
"""What is kept per load or level of the averages."""


@dataclass
class Pacing:
    """What is known from step to step and from call to call.

    Args:
        threshold: Confidence below which a draft ends.
        level_seconds: Time of a level of a draft, averaged; 0 while unknown.
        load_bytes: Bytes of weights loaded, with decay.
        load_seconds: What loading them took.
    """

    threshold: float = FIRST_THRESHOLD
    level_seconds: float = 0.0
    load_bytes: float = 0.0
    load_seconds: float = 0.0

    def observe_level(self, seconds: float) -> None:
        """Takes in the time of a level."""
        old = self.level_seconds or seconds
        self.level_seconds = MEMORY * old + (1 - MEMORY) * min(seconds, 4 * old)

    def observe_load(self, size: int, seconds: float) -> None:
        """Takes in the time of loading so many bytes."""
        self.load_bytes = MEMORY * self.load_bytes + size
        self.load_seconds = MEMORY * self.load_seconds + seconds

    def expected_load(self, size: int) -> float:
        """Seconds that loading so many bytes should take; 0 while nothing is known."""
        return size * self.load_seconds / self.load_bytes if self.load_bytes else 0.0


@dataclass
class AheadCounts:
    """What drafting ahead did in one call.

    Args:
        num_levels_ahead: Levels drafted while weights were loading.
        num_drafts_ahead: Steps before whose end some were.
        num_drafts_ahead_used: Those among them behind which the next step's draft went on.
        load_seconds: What loading took while the target ran over drafts.
        overlapped_seconds: Time of loading in which something was drafted.
        waiting_seconds: Time for which loaded weights waited for a level to end.
    """

    num_levels_ahead: int = 0
    num_drafts_ahead: int = 0
    num_drafts_ahead_used: int = 0
    load_seconds: float = 0.0
    overlapped_seconds: float = 0.0
    waiting_seconds: float = 0.0


def offload_hooks(model: CausalLM) -> Iterator[Any]:
    """The hooks with which accelerate loads a module's weights before its forward."""
    for module in model.modules():
        yield from _parts(getattr(module, "_hf_hook", None))


def _parts(hook: Any) -> Iterator[Any]:
    if hasattr(hook, "hooks"):  # a sequence of hooks
        for part in hook.hooks:
            yield from _parts(part)
    elif getattr(hook, "offload", False) and hasattr(hook, "weights_map"):
        yield hook


def read_pages(weights: Iterable[Tensor]) -> None:
    """Reads weights that are mapped from a file: else this would happen in the forward, where nothing is drafted."""
    for tensor in weights:
        if tensor.device.type == "cpu" and type(tensor) is nn.Parameter and tensor.is_contiguous():
            tensor.detach().view(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()


def check_pipeline(draft_model: CausalLM, target: CausalLM) -> None:
    """Looks whether a draft model can run while the target's weights are loading.

    Raises:
        ValueError: The draft model consists of the target's own modules, which wait for these very weights.
    """
    theirs = {id(module) for module in target.modules()}
    if any(id(module) in theirs for module in draft_model.modules()):
        raise ValueError(
            "pipelined=True cannot be used with a draft model that shares modules with the target, such as 'self': it "
            "would wait for the weights while which it is to draft; pass a draft model of its own, or leave it out"
        )
    if next(offload_hooks(target), None) is None:
        warnings.warn(
            f"pipelined=True brings nothing with this {type(target).__name__}: accelerate has offloaded none of its "
            "weights, so that there is no loading to draft in; the output is the same",
            stacklevel=3,
        )


@dataclass
class LoadWindows:
    """Lets the draft model run while weights of the target are being loaded, and at no other time.

    Between `open` and `close` each load of some length goes to a thread of its own, and until it has ended the thread
    that asked for it drafts, level by level. Then the target's module computes, in the same thread. So the draft
    model's cache has one owner, and never is anything drafted while the target computes. Only the `pre_forward` of
    accelerate's hooks is replaced, on the hook objects, and put back by `close`.

    Args:
        target: The model whose weights are loaded.
        pacing: Tells which loads are long enough.
    """

    target: CausalLM
    pacing: Pacing
    counts: AheadCounts = field(default_factory=AheadCounts)

    def __post_init__(self) -> None:
        self.hooks = list(offload_hooks(self.target))
        self._replaced: list[Any] = []
        self._work: Callable[[], bool] | None = None
        self._error: Exception | None = None
        self._loaded = 0.0
        self._levels = 0
        """Levels drafted ahead since the last step."""
        self._loader: ThreadPoolExecutor | None = None

    def open(self, call: DraftCall, context: DraftContext, growth: Growth, max_depth: int) -> None:
        """From now on loads are used.

        Args:
            call: With the draft that is about to be verified.
            context: The one it was drafted with.
            growth: How it was drafted.
            max_depth: Largest depth of what is drafted behind it.
        """
        ahead = growth_ahead(growth, self.pacing, np.array(context.max_depth, np.int64).clip(0, max_depth))
        self.counts.num_drafts_ahead_used += call.goes_on and self._levels > 0
        self._levels = 0
        self._work = functools.partial(call.grow_ahead, ahead)
        if self._loader is None and self.hooks:
            self._loader = ThreadPoolExecutor(1, "specdec-load")
        for hook in self.hooks:
            if "pre_forward" not in vars(hook):  # else another call is at it, and this one does without
                hook.pre_forward = functools.partial(self._load, hook, hook.pre_forward)
                self._replaced.append(hook)

    def close(self) -> None:
        """Puts everything back; may be called again.

        Raises:
            Exception: What went wrong in drafting ahead: the target's pass was not disturbed by it.
        """
        self._work = None
        for hook in self._replaced:
            vars(hook).pop("pre_forward", None)
        self._replaced.clear()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def finish(self) -> None:
        """Like `close`, with nothing to follow; an error of the last step matters to nobody any more."""
        self._error = None
        self.close()
        if self._loader is not None:
            self._loader.shutdown()
            self._loader = None

    def figures(self) -> dict[str, Any]:
        """What drafting ahead did in this call, ready for JSON; see `AheadCounts`."""
        figures = {name: round(value, 6) for name, value in vars(self.counts).items()}
        return figures | {"draft_threshold": self.pacing.threshold}

    def _load(self, hook: Any, pre_forward: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Takes the place of a hook's `pre_forward`, and drafts as long as that takes."""
        size = sum(part.numel() * part.element_size() for part in module.parameters(recurse=hook.place_submodules))
        expected = self.pacing.expected_load(size)
        least = LEAST_SHARE * self.pacing.level_seconds

        def load(is_grad_enabled: bool = torch.is_grad_enabled()) -> Any:  # known to each thread apart
            begun = time.perf_counter()
            with torch.set_grad_enabled(is_grad_enabled):
                out = pre_forward(module, *args, **kwargs)
                read_pages(module.parameters(recurse=hook.place_submodules))
            self._loaded = time.perf_counter()
            self.pacing.observe_load(size, self._loaded - begun)
            self.counts.load_seconds += self._loaded - begun
            return out

        if self._work is None or self._loader is None or least == 0.0 or expected < least:
            return load()
        begun = time.perf_counter()
        future: Future[Any] = self._loader.submit(load)
        try:
            while not future.done() and expected - (time.perf_counter() - begun) >= least:
                if not self._draft():
                    break
        finally:
            drafted = time.perf_counter()
            wait([future])
        self.counts.overlapped_seconds += min(drafted, self._loaded) - begun
        self.counts.waiting_seconds += max(0.0, drafted - self._loaded)
        return future.result()

    def _draft(self) -> bool:
        try:
            if self._work is not None and self._work():
                self.counts.num_levels_ahead += 1
                self.counts.num_drafts_ahead += self._levels == 0
                self._levels += 1
                return True
        except Exception as error:  # raised at the next step: the target's pass must not end in the middle
            self._error = error
        self._work = None
        return False


def paced_growth(growth: Growth, pacing: Pacing, size: int, is_chain: bool) -> Growth:
    """Growth by confidence-paced branches, up to the threshold or until a tree of `size` nodes would not change.

    Args:
        growth: Lists, depths and rates.
        pacing: Has the threshold, and is told the time of each level.
        size: Nodes that will be proposed.
        is_chain: Only the first branch may grow.
    """
    opening_score = np.inf if is_chain else OPENING_SCORE

    def choose(nodes: DraftNodes, num_fed: int, level: Ints) -> int:
        least = max(pacing.threshold, least_proposed(nodes, size))
        return int(choose_branches(nodes, opening_score, least, growth.max_depths, num_fed, level))

    width = 1 if is_chain else WIDTH
    return replace(growth, width=lambda _: width, measured=_timing(pacing), any_level=True, choose=choose)


def growth_ahead(growth: Growth, pacing: Pacing, max_depths: Ints) -> Growth:
    """Growth behind a tree that the target is about to verify: likeliest nodes first, wherever they are.

    Args:
        growth: Lists and rates.
        pacing: Is told the time of each level.
        max_depths: See `Growth`.
    """
    return Growth(
        growth.num_children,
        max_depths,
        growth.rates,
        lambda _: AHEAD_WIDTH,
        _timing(pacing),
        any_level=True,
        most=growth.most,
    )


def _timing(pacing: Pacing) -> Callable[[DraftNodes, Ints, float], None]:
    return lambda nodes, level, seconds: pacing.observe_level(seconds)


def least_proposed(nodes: DraftNodes, size: int) -> float:
    """What a node of some row must be ranked by at least to be among its best `size`."""
    rows = zip(nodes.orders, nodes.counts, strict=True)
    return min(float(np.partition(row[:count], -size)[-size]) if count > size else 0.0 for row, count in rows)


def adjust_threshold(pacing: Pacing, step: Step, known: Sequence[NDArray[np.int32]]) -> None:
    """Takes in what became of the drafts of a step.

    Args:
        pacing: Its threshold is changed.
        step: With the trees that were verified.
        known: Per row the tokens committed behind the tree's root.
    """
    tokens, parents = host_array(step.tree.tokens), step.tree.host_parents
    drafted, accepted = np.sum(
        [outcome(tokens[i], parents[i], new.astype(np.int64)) for i, new in enumerate(known)], axis=0
    )
    pacing.threshold = adjusted(pacing.threshold, int(drafted), int(accepted))
