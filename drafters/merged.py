"""Several drafters as one: all they propose goes into one tree."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import exp
from typing import Any
from weakref import ref

import torch

from specdec.drafters.base import DraftContext, Drafter, Needs
from specdec.drafters.merging.growth import compile_kernels
from specdec.drafters.merging.known import known_of, new_known
from specdec.drafters.merging.session import MergedSession, distinct_names
from specdec.target import embedding_rows

MAX_SOURCES = 8
"""Most drafters that can be merged: acceptances are counted by each combination of them."""


@dataclass(eq=False)
class MergedDrafter(Drafter):
    """Merges the trees of several drafters into one, the best nodes of all first.

    A path that several sources propose stands in the tree once, and is worth more. What a node is worth is learned by
    the sources that propose it, its depth and their scores: decayed counts of how often such nodes were accepted where
    their parent was. By these the tree grows best-first, which is optimal at every size (OPT-Tree, arXiv 2406.17276),
    so a source gets as many nodes as it earns, and what no source is good at gets none.

    Each source has its time measured. One that brings fewer tokens than could be generated in its time is paused, and
    tried again after a number of steps that doubles.

    A source that raises is left out for the rest of the call. Where a verifier needs drafts that were drawn at random
    (`"block"`, `"traversal"`) there is no merging: a drawn tree must be verified with all its nodes and no others, so
    the first source that draws is the only one then.

    Args:
        sources: The drafters, used as they are. Each keeps what it learns.
        max_nodes: Largest tree, the root included.
        prior_weight: How many counted nodes the sources' own scores are worth.
        memory: Steps after which a count is worth 1/e.
        chained: Let sources continue what other ones have proposed.
    """

    name = "merged"

    sources: Sequence[Drafter] = ()
    max_nodes: int = 64
    prior_weight: float = 6.0
    memory: float = 60.0
    chained: bool = True

    def __post_init__(self) -> None:
        for name, least in (("max_nodes", 1), ("prior_weight", 0.01), ("memory", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        self.decay = exp(-1.0 / self.memory)
        self._lock = threading.Lock()
        self._shares_counts = True
        self._clock: Callable[[], float] = time.perf_counter
        self._target: Callable[[], Any]
        self._use(self.sources)

    def _use(self, sources: Sequence[Drafter]) -> None:
        """Takes up sources, and forgets what was counted of others."""
        self.sources = sources = list(sources)
        for source in sources:
            if not isinstance(source, Drafter):
                raise TypeError(f"sources must be Drafters, got {source!r:.200}; specdec.accelerate takes names too")
        if not 1 <= len(sources) <= MAX_SOURCES:
            raise ValueError(f"sources: {len(sources)} drafters were given; 1 to {MAX_SOURCES} can be merged")
        if len(set(map(id, sources))) < len(sources):
            raise ValueError("sources: one drafter was given twice; leave it out once")
        self.needs_hidden_states = any(source.needs_hidden_states for source in sources)
        self.needs_step_seconds = any(source.needs_step_seconds for source in sources)
        self.num_top_tokens = max(source.num_top_tokens for source in sources)
        self._known = new_known(len(sources))
        self._target = lambda: None

    def fresh(self) -> MergedDrafter:
        """Fresh sources, all of which are asked in each step: what they cost is not measured."""
        settings = {name: getattr(self, name) for name in ("max_nodes", "prior_weight", "memory", "chained")}
        new = MergedDrafter([source.fresh() for source in self.sources], **settings)
        new.name, new._clock = self.name, lambda: 0.0
        new._shares_counts = False
        return new

    def settings(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name != "sources"}
        names = distinct_names(self.sources)
        return values | {"sources": {name: s.settings() for name, s in zip(names, self.sources, strict=True)}}

    def bind(self, model: Any) -> None:
        for source in self.sources:
            source.bind(model)
        with self._lock:
            if self._target() is not model:
                self._target = ref(model)
                self._vocab_size = embedding_rows(model)
                kind = type(self), *map(type, self.sources), str(self.settings())
                number = len(self.sources)
                self._known = known_of(model, kind, number) if self._shares_counts else new_known(number)
        compile_kernels()

    def needs(self, device: torch.device, rows: int, is_sampled: bool) -> Needs:
        needs = [source.needs(device, rows, is_sampled) for source in self.sources]
        layers = sorted({layer for need in needs for layer in need.layers})
        return Needs(any(need.hidden_states for need in needs), max(need.top_tokens for need in needs), tuple(layers))

    def start(self, context: DraftContext) -> MergedSession:
        known = self._known[context.sampler is not None and context.sampler.noise is not None]
        for source in known.sources:
            source.backoff.begin_call()
        return MergedSession(self, known, self._vocab_size, self._clock, context)

    def state_dict(self) -> dict[str, Any]:
        modes = [[is_sampled, known.state_dict()] for is_sampled, known in self._known.items()]
        return {"modes": modes, "sources": [source.state_dict() for source in self.sources]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for is_sampled, known in state["modes"]:
            self._known[bool(is_sampled)].load_state_dict(known)
        for source, known in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(known)
