"""Step times over tree sizes and contexts, and what a step's time goes into."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import GenerationConfig
from transformers.generation import LogitsProcessorList

from specdec.benchmark.roofline.costs import StepCosts, step_costs
from specdec.benchmark.roofline.limits import DeviceLimits, device_limits, seconds, synchronize
from specdec.budget import Budget
from specdec.drafters.base import Drafter
from specdec.drafting import CallFacts, GuardedDrafter
from specdec.generation import Speculation
from specdec.passes.cuda_graphs.step import step_for
from specdec.passes.cuda_graphs.store import GraphMode
from specdec.report import SpeculationReport
from specdec.rows.sequences import Sequences
from specdec.sampling import Sampler
from specdec.step import Step
from specdec.target import embedding_rows, input_device, unwrapped
from specdec.tree import TokenTree
from specdec.verifiers.exact import ExactVerifier

KINDS = {
    "attention": ("attention", "flash", "fmha", "softmax", "baddbmm"),
    "matrix products": ("mm", "linear", "gemm", "matmul", "cutlass", "nvjet", "gemv", "cublas"),
}
"""Kinds of work by what the names of operations and kernels contain."""
ROUNDS = 5


@dataclass(frozen=True)
class StepTime:
    """The time of one size of step.

    Args:
        nodes: Of the tree.
        context: Tokens in the kv cache of each row.
        step: Seconds from a tree on the host to its outcome on the host.
        target: Seconds of the target pass alone.
        floor: Seconds that no step can be below on this device.
    """

    nodes: int
    context: int
    step: float
    target: float
    floor: float

    @property
    def reached(self) -> float:
        """Fraction of the limit."""
        return self.floor / self.step


@dataclass
class Roofline:
    """What was measured of one model on one device.

    Args:
        costs: Of the model.
        limits: Of the device.
        batch: Rows.
        times: Per size and context.
        shares: Where the time of a step goes, by kind of work, as shares of the step without a draft.
        phases: Seconds per pass of a short generation with a drafter, by phase; empty without one.
        cuda_graphs: Whether steps were replayed as graphs.
    """

    costs: StepCosts
    limits: DeviceLimits
    batch: int
    times: list[StepTime] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    cuda_graphs: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        times = [vars(entry) | {"reached": entry.reached} for entry in self.times]
        return {
            "costs": self.costs.to_dict(),
            "limits": self.limits.to_dict(),
            "batch": self.batch,
            "times": times,
            "shares": self.shares,
            "phases": self.phases,
            "cuda_graphs": self.cuda_graphs,
        }


def measure_roofline(
    model: Any,
    nodes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    contexts: Sequence[int] = (64, 512),
    batch: int = 1,
    cuda_graphs: GraphMode = "auto",
    drafter: Drafter | None = None,
    on_time: Callable[[StepTime], None] = lambda entry: None,
) -> Roofline:
    """Measures a model on the device where it is.

    Args:
        model: The target.
        nodes: Tree sizes.
        contexts: Tokens in the kv cache.
        batch: Rows.
        cuda_graphs: See `accelerate`.
        drafter: Of a short generation whose phases are told; None for none.
        on_time: Called with each step time.

    Raises:
        ValueError: The model cannot be run on trees.
    """
    model = unwrapped(model)
    device = input_device(model)
    found = Roofline(step_costs(model), device_limits(device, model.dtype), batch)
    for context in contexts:
        with stepping(model, context, batch, max(nodes), cuda_graphs) as (step, report):
            for size in nodes:
                entry = _time(found, step, size, context, device)
                found.times.append(entry)
                on_time(entry)
            if context == contexts[-1]:
                found.shares = _shares(lambda: _run(step, 1), found.times[-len(nodes)].step, device)
        found.cuda_graphs = report.cuda_graphs
    if drafter is not None:
        found.phases = _phases(model, drafter, contexts[0], device, cuda_graphs)
    return found


@contextmanager
def stepping(
    model: Any, context: int, batch: int, max_nodes: int, cuda_graphs: GraphMode
) -> Iterator[tuple[Step, SpeculationReport]]:
    """A step in mid-generation, behind a random prompt of `context` tokens per row."""
    speculation = Speculation(None, ExactVerifier(), Budget(64), True, "auto", cuda_graphs=cuda_graphs)
    found: list[tuple[Any, ...]] = []

    def inside(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Tensor:
        kwargs = {name: value for name, value in kwargs.items() if name not in ("synced_gpus", "streamer")}
        found.append((input_ids, generation_config, kwargs))
        return input_ids

    device = input_device(model)
    ids = torch.randint(3, embedding_rows(model), (batch, context), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.generate(
            ids.to(device),
            attention_mask=torch.ones_like(ids).to(device),
            max_new_tokens=max(2 * max_nodes, 16),
            do_sample=False,
            custom_generate=inside,
        )
        input_ids, config, kwargs = found[0]
        capability = speculation.capability_of(model)
        if capability.mask_format is None:
            raise ValueError(f"{type(model).__name__} cannot be measured on trees: {capability.reason}")
        target = speculation.target_for(model, config, kwargs, capability, False, device)
        try:
            sequences = Sequences(input_ids, None, config.max_length)
            sampler = Sampler(LogitsProcessorList(), False, sequences)
            report = speculation.report
            drafter = GuardedDrafter(None, report, CallFacts(embedding_rows(model), strict=True))
            step = step_for(target, ExactVerifier(), sampler, drafter, report)
            target.prefill(input_ids)
            yield step, report
            report.cuda_graphs = getattr(getattr(target, "store", None), "describe", lambda: report.cuda_graphs)()
        finally:
            target.close()


def _fan(step: Step, nodes: int) -> TokenTree:
    """A tree one token deep, of tokens that are not accepted but for chance."""
    rows = len(step.sampler.sequences)
    tokens = torch.arange(3, 3 + nodes).expand(rows, nodes) % step.drafter.facts.vocab_size
    return TokenTree(tokens.contiguous(), ((torch.arange(nodes) > 0).long() - 1).expand(rows, nodes).contiguous())


def _run(step: Step, nodes: int) -> None:
    """A whole step, rolled back."""
    rows = list(range(len(step.sampler.sequences)))
    step.run(_fan(step, nodes), rows)
    step.target.commit([[]] * len(rows))


def _time(found: Roofline, step: Step, nodes: int, context: int, device: torch.device) -> StepTime:
    floor = found.costs.floor(nodes, context, found.limits.bandwidth, found.limits.flops, found.batch)
    tree = _fan(step, nodes)

    def target_pass() -> None:
        step.target.forward(step.target.place(tree))
        step.target.commit([[]] * found.batch)

    for run in (lambda: _run(step, nodes), target_pass):
        run()
        run()
    whole = seconds(lambda: _run(step, nodes), device, ROUNDS)
    return StepTime(nodes, context, whole, seconds(target_pass, device, ROUNDS), floor)


def _shares(run: Callable[[], None], step_seconds: float, device: torch.device) -> dict[str, float]:
    """Shares of the time of `run` by kind of work; what is left is the host's: Python and launches.

    On a GPU kernels are set against a step that is not profiled; on a CPU operations against the profiled one, because
    the profiler slows both down.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    run()
    synchronize(device)
    start = time.perf_counter()
    with profile(activities=activities) as profiled:
        for _ in range(ROUNDS):
            run()
        synchronize(device)
        wall = (time.perf_counter() - start) / ROUNDS
    total = step_seconds if on_gpu else wall
    shares = dict.fromkeys([*KINDS, "other operations"], 0.0)
    for event in profiled.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if not on_gpu and not event.key.startswith("aten::"):
            continue
        shares[_kind(event.key)] += spent * 1e-6 / ROUNDS / total
    used = sum(shares.values())
    shares = {kind: share / max(used, 1.0) for kind, share in shares.items()}
    return shares | {"host: Python and launches": max(1.0 - used, 0.0)}


def _kind(name: str) -> str:
    name = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other operations")


def _phases(
    model: Any, drafter: Drafter, context: int, device: torch.device, cuda_graphs: GraphMode
) -> dict[str, float]:
    """Seconds per pass of each phase, of the second of two calls."""
    speculation = Speculation(drafter, ExactVerifier(), Budget(64), True, "auto", cuda_graphs=cuda_graphs)
    speculation.bind(model)
    ids = torch.randint(3, embedding_rows(model), (1, context), generator=torch.Generator().manual_seed(0)).to(device)
    for _ in range(2):
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, custom_generate=speculation
        )
    report = speculation.report
    passes = max(report.num_target_passes - 1, 1)
    return {phase: spent / passes for phase, spent in report.seconds.items() if phase not in ("prefill", "calibrate")}
