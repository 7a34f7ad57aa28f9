"""What a benchmark is asked to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from specdec.benchmark.runs import Settings
from specdec.tree import NODE_BUCKETS

RANDOM_PART = "incompressible"
"""The part whose prompts are random tokens."""


@dataclass(frozen=True)
class Part:
    """One setting that all methods are measured at, in turn.

    Args:
        name: For tables and files.
        temperature: 0 for greedy decoding.
        batch_size: Prompts per call.
        is_random: The prompts are random tokens, in which there is nothing to look up.
    """

    name: str
    temperature: float
    batch_size: int
    is_random: bool = False


@dataclass(frozen=True)
class BenchmarkSettings:
    """Settings of a benchmark.

    Args:
        max_new_tokens: Tokens per completion at most.
        temperatures: Each is a part of its own; 0 is greedy decoding, others sample.
        batch_sizes: Prompts per call; each is a part of its own.
        repeats: Runs per prompt and method.
        seed: Prompt i is sampled with seed + i, by every method.
        random_prompts: Whether to measure, besides, what methods cost where there is nothing to gain: sampled
            continuations of random tokens, batch 1.
        compiled: Whether to measure HF generate with a static kv cache and a compiled forward too; it is compiled
            before each part.
        methods_compiled: Whether to measure drafting off and each drafter with compiled passes too.
        trace: Whether to record which tokens had been drafted, which takes microseconds a pass.
        max_nodes: Largest token tree per target pass, 1, 2, 4, ... 128; with several values each drafter is measured at
            each. None: the contenders' own.
        top_p: Samples from the most probable tokens that have this probability together; 1 is all of them.

    Raises:
        ValueError: A value is not allowed.
    """

    max_new_tokens: int = 128
    temperatures: tuple[float, ...] = (0.0, 1.0)
    batch_sizes: tuple[int, ...] = (1,)
    repeats: int = 1
    seed: int = 0
    random_prompts: bool = False
    compiled: bool = False
    methods_compiled: bool = False
    max_nodes: tuple[int, ...] = ()
    top_p: float = 1.0
    trace: bool = False

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 2), ("repeats", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed; it must be at least {least}")
        for name, least in (("temperatures", 0), ("batch_sizes", 1)):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values) or min(values) < least:
                raise ValueError(f"{name}={values} is not allowed; give distinct values, each at least {least}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is not allowed; it must be above 0 and at most 1")
        if not set(self.max_nodes) <= set(NODE_BUCKETS) or len(set(self.max_nodes)) < len(self.max_nodes):
            allowed = ", ".join(map(str, NODE_BUCKETS))
            raise ValueError(f"max_nodes={self.max_nodes} is not allowed; give distinct values out of {allowed}")

    def parts(self) -> Iterator[Part]:
        """What is measured, in this order."""
        for batch_size in self.batch_sizes:
            for temperature in self.temperatures:
                name = {0.0: "greedy", 1.0: "sampled"}.get(temperature, f"T={temperature:g}")
                yield Part(name if batch_size == 1 else f"{name}-batch-{batch_size}", temperature, batch_size)
        if self.random_prompts:
            # Sampled, because greedy continuations of random tokens soon repeat themselves.
            yield Part(RANDOM_PART, 1.0, 1, is_random=True)

    def of(self, part: Part) -> Settings:
        """What the methods are asked for in a part."""
        return Settings.of(self.max_new_tokens, part.temperature > 0, part.temperature, self.seed, self.top_p)
