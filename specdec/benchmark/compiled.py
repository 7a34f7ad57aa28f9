"""HF generate at its fastest: a static kv cache, and a forward compiled by torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, StaticCache

from specdec.compat import CACHE

COMPILED = "HF generate, compiled"


@dataclass
class CompiledGenerate:
    """`model.generate` with one static cache for all prompts, so that nothing is compiled again between them.

    `prepare`, which is outside the clock, compiles the first time and empties the cache each time.

    Args:
        model: The target. It is not changed: what is compiled belongs to `generate`.
        rows: Prompts per call.
        longest: Tokens of the longest prompt.
        arguments: Those of `generate` that all methods are given.
    """

    model: Any
    rows: int
    longest: int
    arguments: dict[str, Any]
    seconds: float = 0.0
    """What compiling took, the first run included."""
    _cache: StaticCache | None = field(default=None, repr=False)

    def prepare(self) -> CompiledGenerate:
        """Makes it ready for a run."""
        if self._cache is None:
            started = perf_counter()
            length = self.longest + self.arguments["max_new_tokens"] + 1
            self._cache = StaticCache(config=self.model.config.get_text_config(decoder=True), max_cache_len=length)
            ids = torch.ones((self.rows, self.longest), dtype=torch.int64, device=self.model.device)
            self.generate(ids, attention_mask=torch.ones_like(ids), **self.arguments)
            self.seconds = perf_counter() - started
        self._cache.reset()
        return self

    def generate(self, ids: Tensor, **kwargs: Any) -> Any:
        """`model.generate` with the cache, compiled."""
        config = CompileConfig()
        config._compile_all_devices = True  # type: ignore[assignment]  # on the CPU too
        return self.model.generate(ids, **{CACHE: self._cache}, compile_config=config, **kwargs)
