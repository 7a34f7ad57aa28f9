"""How near a model's steps come to what the device can do: bytes read and operations done per second, measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from specdec.api import accelerate
from specdec.benchmark.measuring import synchronize
from specdec.budget import Budget
from specdec.compat import CACHE
from specdec.drafters.base import DraftContext, Drafter
from specdec.passes.cuda_graphs.store import GraphMode
from specdec.report import SpeculationReport
from specdec.target import embedding_rows, input_device, unwrapped
from specdec.tree import TokenTree

ROUNDS = 7
"""Timed repeats of everything, after one that is not."""
PASSES = 12
"""Passes of a call whose steps are timed."""
KINDS = {
    "attention": ("attention", "flash", "fmha", "softmax", "baddbmm"),
    "matrix products": ("mm", "linear", "gemm", "matmul", "cutlass", "nvjet", "gemv", "cublas"),
}
"""Kinds of work by what the names of operations and kernels contain."""
OTHER, HOST = "other operations", "host: Python and launches"
STEP_PHASES = ("draft", "target", "verify", "commit")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token")
TOKENS = 4
"""Tokens by which the size of the kv cache is found out."""


@dataclass(frozen=True)
class StepCosts:
    """Bytes and operations of one step, from the model's own weights and cache.

    Args:
        weight_bytes: Weights that every step reads: all but experts, and but an input embedding that is not shared.
        expert_bytes: Weights of all experts.
        num_experts: Experts of a layer; 0 where there are none.
        num_chosen: Experts that a token goes to.
        kv_bytes: Keys and values per token of context and row.
        node_flops: Operations of the matrix products per node, chosen experts alone.
        attention_flops: Operations of attention per node and token of context.
    """

    weight_bytes: int
    expert_bytes: int
    num_experts: int
    num_chosen: int
    kv_bytes: int
    node_flops: int
    attention_flops: int

    def active_share(self, nodes: int) -> float:
        """Share of the experts that so many nodes are expected to need, if each chooses at random."""
        if not self.num_experts:
            return 0.0
        return 1.0 - (1.0 - self.num_chosen / self.num_experts) ** nodes

    def bytes(self, nodes: int, context: int, batch: int = 1) -> float:
        """Bytes that a step reads, over all rows."""
        experts = self.expert_bytes * self.active_share(nodes * batch)
        return self.weight_bytes + experts + self.kv_bytes * (context + nodes) * batch

    def flops(self, nodes: int, context: int, batch: int = 1) -> float:
        """Operations of a step, over all rows."""
        return batch * nodes * (self.node_flops + self.attention_flops * (context + nodes))

    def floor(self, nodes: int, context: int, bandwidth: float, flops: float, batch: int = 1) -> float:
        """Seconds that no step can be below.

        Args:
            nodes: Of the tree.
            context: Tokens in the kv cache.
            bandwidth: Bytes per second.
            flops: Operations per second.
            batch: Rows.
        """
        return max(self.bytes(nodes, context, batch) / bandwidth, self.flops(nodes, context, batch) / flops)


def step_costs(model: Any) -> StepCosts:
    """The costs of a model's steps; runs it on a few tokens to see what its cache holds."""
    config = model.config.get_text_config(decoder=True)
    num_experts = next((n for name in EXPERTS if (n := getattr(config, name, None))), 0)
    num_chosen = next((n for name in CHOSEN if (n := getattr(config, name, None))), num_experts)
    share = num_chosen / num_experts if num_experts else 0.0
    weight_bytes = expert_bytes = 0
    flops = 0.0
    tied = _input_embedding(model)
    for name, weight in model.named_parameters():
        size = weight.numel() * weight.element_size()
        if ".experts." in name and num_experts:
            expert_bytes += size
            flops += 2 * weight.numel() * share
        elif weight is not tied:
            weight_bytes += size
            flops += 2 * weight.numel() if weight.dim() > 1 else 0
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_bytes = _kv_bytes(model)
    return StepCosts(
        weight_bytes, expert_bytes, num_experts, num_chosen, kv_bytes, int(flops), 4 * heads * head_dim * layers
    )


def _input_embedding(model: Any) -> Tensor | None:
    """The weight of the input embedding, of which a step reads a few rows, unless it is the output embedding too."""
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    output = getattr(model.get_output_embeddings(), "weight", None)
    return None if embedding is output else embedding


@torch.no_grad()
def _kv_bytes(model: nn.Module) -> int:
    outputs = model(torch.ones((1, TOKENS), dtype=torch.int64, device=input_device(model)), use_cache=True)
    total = 0
    for layer in outputs[CACHE].layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            total += 0 if tensor is None else tensor.numel() * tensor.element_size()
    return total // TOKENS


COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
"""Bytes that are copied to measure the bandwidth: more than any cache holds."""
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class DeviceLimits:
    """Measured limits of a device.

    Args:
        bandwidth: Bytes per second that a copy reads and writes, together.
        flops: Operations per second of a large matrix product in the model's type.
    """

    bandwidth: float
    flops: float


def device_limits(device: torch.device, dtype: torch.dtype) -> DeviceLimits:
    """Measures them, in a second or so.

    Args:
        device: Where.
        dtype: Type of the matrix product.
    """
    count = COPY_BYTES.get(device.type, 2**26)
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    bandwidth = 2 * count / _seconds(lambda: copy.copy_(source), device)
    size = MATMUL_SIZE.get(device.type, 1024)
    left, right = (torch.ones((size, size), dtype=dtype, device=device) for _ in range(2))
    product = torch.empty_like(left)
    flops = 2 * size**3 / _seconds(lambda: torch.matmul(left, right, out=product), device)
    return DeviceLimits(bandwidth, flops)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call, its work on the device included; one more call warms up."""
    times = []
    for _ in range(ROUNDS + 1):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return median(times[1:])


@dataclass(frozen=True)
class StepTime:
    """The time of one size of step.

    Args:
        nodes: Of the tree.
        context: Tokens in the kv cache of each row.
        step: Seconds of a step: drafting (of a fixed tree), target pass, verification and commit.
        target: Seconds of its target pass, as the call's report has it.
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
        shares: Where the time of decoding without a draft goes, by kind of work.
        cuda_graphs: Whether steps were replayed as graphs.
    """

    costs: StepCosts
    limits: DeviceLimits
    batch: int
    times: list[StepTime] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)
    cuda_graphs: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return asdict(self) | {"times": [vars(entry) | {"reached": entry.reached} for entry in self.times]}


class _Fan(Drafter):
    """Proposes a tree one token deep, of tokens that are accepted by chance only."""

    name = "fan"

    def __init__(self, nodes: int, vocab_size: int) -> None:
        self.nodes, self.vocab_size = nodes, vocab_size

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        tokens = torch.arange(3, 3 + self.nodes).expand(len(context.rows), self.nodes) % self.vocab_size
        tokens = tokens.clone()
        tokens[:, 0] = torch.tensor([int(sequence[-1]) for sequence in context.sequences])
        return TokenTree(tokens, ((torch.arange(self.nodes) > 0).long() - 1).expand_as(tokens).contiguous())


def measure_roofline(
    model: Any,
    nodes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    contexts: Sequence[int] = (64, 512),
    batch: int = 1,
    cuda_graphs: GraphMode = "auto",
    on_time: Callable[[StepTime], None] = lambda entry: None,
) -> Roofline:
    """Measures a model on the device where it is.

    Args:
        model: The target.
        nodes: Tree sizes: 1, 2, 4, ... 128.
        contexts: Tokens in the kv cache.
        batch: Rows.
        cuda_graphs: See `accelerate`.
        on_time: Called with each step time.

    Raises:
        ValueError: The model cannot be run on trees, or a tree size is not allowed.
    """
    model = unwrapped(model)
    device = input_device(model)
    capability = accelerate(model, None).capability
    if capability.mode != "tree":
        raise ValueError(f"{type(model).__name__} cannot be measured on trees: {capability.reason}")
    found = Roofline(step_costs(model), device_limits(device, model.dtype), batch)
    for context in contexts:
        for size in nodes:
            call = _call(model, context, batch, size, cuda_graphs)
            call()
            reports = [call() for _ in range(ROUNDS)]
            floor = found.costs.floor(size, context, found.limits.bandwidth, found.limits.flops, batch)
            step, target = (median(_per_pass(r, phases) for r in reports) for phases in (STEP_PHASES, ("target",)))
            found.times.append(StepTime(size, context, step, target, floor))
            found.cuda_graphs = reports[-1].cuda_graphs
            on_time(found.times[-1])
    found.shares = _shares(_call(model, contexts[-1], batch, 1, cuda_graphs), device)
    return found


def _per_pass(report: SpeculationReport, phases: Sequence[str]) -> float:
    """Seconds of these phases per pass; the prefill is none of the passes."""
    return sum(report.seconds[phase] for phase in phases) / max(report.num_target_passes - 1, 1)


def _call(model: Any, context: int, batch: int, nodes: int, cuda_graphs: GraphMode) -> Callable[[], SpeculationReport]:
    """A short greedy call after random prompts of `context` tokens, each pass over `nodes` nodes."""
    drafter = _Fan(nodes, embedding_rows(model)) if nodes > 1 else None
    fast = accelerate(model, drafter, strict=True, budget=Budget(nodes, fixed=True), cuda_graphs=cuda_graphs)
    ids = torch.randint(3, embedding_rows(model), (batch, context), generator=torch.Generator().manual_seed(0))
    ids = ids.to(input_device(model))
    kwargs: dict[str, Any] = {"min_new_tokens": PASSES, "max_new_tokens": PASSES, "do_sample": False, "num_beams": 1}

    def call() -> SpeculationReport:
        fast.generate(ids, attention_mask=torch.ones_like(ids), **kwargs)
        return fast.report

    return call


def _shares(call: Callable[[], SpeculationReport], device: torch.device) -> dict[str, float]:
    """Shares of the time of a call by kind of work; what is left is the host's: Python and launches.

    On a GPU kernels are set against a call that is not profiled; on a CPU operations against the profiled one, because
    the profiler slows both down.
    """
    on_gpu = device.type == "cuda"
    plain = _seconds(call, device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        start = time.perf_counter()
        call()
        synchronize(device)
        wall = time.perf_counter() - start
    shares = dict.fromkeys([*KINDS, OTHER], 0.0)
    for event in profiled.key_averages():
        if on_gpu or event.key.startswith("aten::"):
            spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            name = event.key.lower()
            kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), OTHER)
            shares[kind] += spent * 1e-6 / (plain if on_gpu else wall)
    used = sum(shares.values())
    return {kind: share / max(used, 1.0) for kind, share in shares.items()} | {HOST: max(1.0 - used, 0.0)}


def roofline_tables(found: Roofline) -> Group:
    """Costs and limits, step times, and where the time goes."""
    costs, limits = found.costs, found.limits
    head = Table(title="what a step must read and compute", show_header=False, title_justify="left")
    head.add_row("weights", _bytes(costs.weight_bytes + costs.expert_bytes))
    if costs.num_experts:
        share = f"{costs.num_chosen} of {costs.num_experts} experts per token"
        head.add_row("of these, experts", f"{_bytes(costs.expert_bytes)}, {share}")
    head.add_row("kv cache", f"{_bytes(costs.kv_bytes)} per token of context")
    head.add_row("operations", f"{costs.node_flops / 1e9:.3g} GFLOP per node")
    head.add_row("measured copy", f"{_bytes(limits.bandwidth)}/s")
    head.add_row("measured matrix product", f"{limits.flops / 1e12:.3g} TFLOP/s")
    head.add_row("CUDA graphs", found.cuda_graphs or "-")
    times = Table(title=f"steps, batch {found.batch}", title_justify="left")
    for column in ("context", "nodes", "step ms", "target pass ms", "limit ms", "of the limit", "of 1 node"):
        times.add_column(column, justify="right")
    first = {entry.context: entry.step for entry in reversed(found.times)}
    for entry in found.times:
        seconds = (f"{value * 1e3:.3f}" for value in (entry.step, entry.target, entry.floor))
        ratios = f"{entry.reached:.1%}", f"{entry.step / first[entry.context]:.2f}x"
        times.add_row(str(entry.context), str(entry.nodes), *seconds, *ratios)
    shares = Table(title="where the time of decoding without a draft goes", show_header=False, title_justify="left")
    for kind, used in found.shares.items():
        shares.add_row(kind, f"{used:.1%}")
    return Group(head, times, shares)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
