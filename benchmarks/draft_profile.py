"""Where the time of a draft model's drafts goes: timing wrappers around the drafter's parts."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch

from specdec.api import accelerate
from specdec.benchmark.measuring import EncodedPrompt, Method, Settings, run_once
from specdec.budget import Budget
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.small_model import session
from specdec.drafters.small_model.lists import DraftLists
from specdec.drafters.small_model.passes import ChainPasses, TreePasses
from specdec.drafters.small_model.session import DraftModelSession
from specdec.passes.compiled.passes import CompiledPasses

FORWARDS = "forwards"
PARTS: dict[str, list[tuple[Any, Sequence[str]]]] = {
    "masks and cache": [
        (passes, ("prefill", "feed_pending", "feed_level", "commit", "keep_rows"))
        for passes in (TreePasses, ChainPasses)
    ],
    "lists": [(DraftLists, ("make", "probs_of"))],
    "tree": [(session, ("add_children", "choose_level", "follow", "write_trees"))],
    "depth": [(session, ("is_worth_a_level",))],
    "rest": [(DraftModelSession, ("propose", "observe"))],
    "prompt": [(DraftModelDrafter, ("start",))],
}
"""Functions by the part that their time counts for, less the time of those listed before that they call. "rest" also
holds the proposals that turn out to be no draft."""
WHOLE = "prompt"
"""A part that is counted with all that happens in it: the draft model reads the prompt once per call."""


class Split:
    """Seconds and calls by part.

    Args:
        device: Where the draft model runs; each part waits for an accelerator, so that no part pays for another.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._inner: list[float] = []
        self._in_whole = False

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted for a part."""

        @wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self._in_whole:
                return function(*args, **kwargs)
            self._inner.append(0.0)
            self._in_whole = part == WHOLE
            start = perf_counter()
            try:
                result = function(*args, **kwargs)
                if self.device.type != "cpu":
                    torch.get_device_module(self.device).synchronize(self.device)
                return result
            finally:
                spent = perf_counter() - start
                self._in_whole = False
                self.seconds[part] += spent - self._inner.pop()
                self.calls[part] += 1
                if self._inner:
                    self._inner[-1] += spent

        return wrapper

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Times all parts but the draft model's forwards; everything is put back at the end."""
        with ExitStack() as stack:
            for part, owners in PARTS.items():
                for owner, names in owners:
                    for name in names:
                        stack.enter_context(patch.object(owner, name, self.timed(part, getattr(owner, name))))
            yield

    def to_dict(self, drafts: int) -> dict[str, Any]:
        """Milliseconds per draft by part, and the share of the drafting, reading the prompt left out, per part."""
        parts = [FORWARDS, *(part for part in PARTS if part != WHOLE)]
        total = sum(self.seconds[part] for part in parts)
        share = {part: self.seconds[part] / max(total, 1e-12) for part in parts}
        return {
            "num_drafts": drafts,
            "num_forwards": self.calls[FORWARDS],
            "ms_per_draft": {part: 1e3 * self.seconds[part] / max(drafts, 1) for part in parts},
            "share": share,
            "share_outside_forwards": 1.0 - share[FORWARDS],
            "prompt_ms_per_call": 1e3 * self.seconds[WHOLE] / max(self.calls[WHOLE], 1),
        }


def profile(
    make: Callable[[Any], DraftModelDrafter],
    draft: Any,
    target: Any,
    prompts: Sequence[EncodedPrompt],
    settings: Settings,
) -> dict[str, Any]:
    """Splits the drafting time of a drafter over some prompts; the last one is for the warm-up.

    Args:
        make: A drafter that asks the model it is given.
        draft: The draft model; it stays as it is.
        target: The target.
        prompts: Two at least.
        settings: What is asked for.
    """
    split = Split(draft.device)
    twin = copy.copy(draft)  # shares all weights
    drafter = make(twin)
    forwards: tuple[Any, str] = (twin, "forward")
    if drafter.compiled:  # wrappers inside would be compiled too
        forwards = (CompiledPasses, "__call__")
    fast = accelerate(target, drafter, budget=Budget(fixed=True))  # drafts at each step, whether it pays or not
    method = Method("profile", lambda: fast)
    run_once(method, fast, prompts[-1], target, settings)
    split.seconds.clear()
    split.calls.clear()
    drafts = 0
    timed = patch.object(*forwards, split.timed(FORWARDS, getattr(*forwards)))
    with timed, split.installed():
        for number, prompt in enumerate(prompts[:-1]):
            run_once(method, fast, prompt, target, settings, number)
            drafts += fast.report.num_drafts
    return split.to_dict(drafts)
