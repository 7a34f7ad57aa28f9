"""Measures the step on a GPU: a model of a real shape with random weights, and drafts of a known acceptance.

    python benchmarks/bench_gpu_step.py                                # Llama-3.1-8B's shape, bfloat16, about 8 minutes
    python benchmarks/bench_gpu_step.py --part batches
    python benchmarks/bench_gpu_step.py --preset tiny --device cpu     # does the script run?

The weights are random, but for the output embedding, which is the input embedding moved on by one row: the model counts
(each token is followed by the next id), whatever rounding does, while every product and every byte is that of the
shape. So drafts of any acceptance can be scripted. Parts:

    off       drafting off, HF generate as it is, and HF with a static cache and compiled, in turn, per context,
              against the measured copy bandwidth
    step      steps of 1 to 64 nodes per context, their target passes, and where the time goes
    accept    tokens per second at 2, 3 and 4.5 tokens per pass, 64 nodes each
    batches   the same at 3 tokens per pass for several batch sizes, with a budget that may choose
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import specdec
from specdec.benchmark.measuring import synchronize
from specdec.benchmark.roofline import DeviceLimits, device_limits, measure_roofline, step_costs
from specdec.budget import Budget
from specdec.common.errors import with_short_errors
from specdec.common.provenance import circumstances, model_info, write_json
from specdec.drafters import DraftContext, Drafter
from specdec.passes.cuda_graphs.store import release
from specdec.tree import TokenTree

RESULTS = Path(__file__).parent / "results"
PARTS = ("off", "step", "accept", "batches")
ACCEPTED = {"2": (1,), "3": (2,), "4.5": (3, 4)}
"""Accepted draft tokens of the passes in turn, by tokens per pass."""


@dataclass(frozen=True)
class Preset:
    """What is measured.

    Args:
        config: Of the model.
        dtype: Of its weights.
        contexts: Tokens of the prompts.
        tokens: New tokens per call.
        batches: Rows.
        nodes: Largest tree.
        repeats: Rounds.
    """

    config: dict[str, Any]
    dtype: torch.dtype
    contexts: tuple[int, ...]
    tokens: int
    batches: tuple[int, ...]
    nodes: int
    repeats: int


PRESETS = {
    "llama-8b": Preset(
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
        },
        torch.bfloat16,
        (512, 4096, 16384),
        128,
        (1, 4, 16, 64),
        64,
        3,
    ),
    "tiny": Preset(
        {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
        },
        torch.float32,
        (16, 48),
        12,
        (1, 2),
        8,
        1,
    ),
}


def counting_model(preset: Preset, device: torch.device) -> Any:
    """A model that follows each token by the next id."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **preset.config, tie_word_embeddings=False, pad_token_id=0, bos_token_id=None, eos_token_id=None
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(preset.dtype)
    try:
        with device:
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight.normal_()
        model.get_output_embeddings().weight.copy_(embedding.roll(1, 0))
    model.generation_config.eos_token_id = None
    return model


@dataclass
class ScriptedDrafter(Drafter):
    """Knows what a counting model says, and drafts so many right tokens per pass, among wrong ones.

    Args:
        vocab: Of the model.
        accepted: Right tokens of the passes in turn.
        nodes: Of each tree.
    """

    vocab: int
    accepted: tuple[int, ...]
    nodes: int
    name = "scripted"
    calls: int = field(init=False, default=0)

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        right = self.accepted[self.calls % len(self.accepted)]
        self.calls += 1
        size = min(self.nodes, max_nodes)
        right = min(right, size - 1)
        roots = torch.tensor([[int(sequence[-1])] for sequence in context.sequences])
        steps = torch.cat([torch.arange(right + 1), torch.arange(right + 1, size) + 1])
        parents = torch.cat([torch.arange(-1, right), torch.zeros(size - right - 1, dtype=torch.int64)])
        scores = torch.cat([torch.full((right + 1,), 0.95), torch.full((size - right - 1,), 0.01)])
        rows = len(roots)
        return TokenTree(
            (roots + steps) % self.vocab,
            parents.expand(rows, size).contiguous(),
            scores.expand(rows, size).contiguous(),
        )


def prompt(batch: int, context: int, vocab: int, device: torch.device) -> Tensor:
    ids = torch.randint(0, vocab, (batch, context), generator=torch.Generator().manual_seed(1))
    return ids.to(device)


def decode_seconds(generate: Callable[..., Any], ids: Tensor, tokens: int) -> float:
    """Seconds per new token and row: a long call less a short one, so that the prefill is in neither."""
    times = []
    for count in (1, tokens):
        synchronize(ids.device)
        start = time.perf_counter()
        out = generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        synchronize(ids.device)
        times.append(time.perf_counter() - start)
        assert out.shape[1] == ids.shape[1] + count
    return max(times[1] - times[0], 1e-9) / (tokens - 1)


def in_turn(methods: dict[str, Callable[..., Any]], ids: Tensor, preset: Preset) -> dict[str, Any]:
    """Median seconds per token of each method, and what failed."""
    seconds: dict[str, list[float]] = {}
    first: dict[str, float] = {}
    failed = {}
    for turn in range(preset.repeats + 1):
        for name, generate in methods.items():
            if name in failed:
                continue
            start = time.perf_counter()
            try:
                taken = decode_seconds(generate, ids, preset.tokens)
            except Exception as error:  # the others are still worth measuring
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                continue
            if turn:
                seconds.setdefault(name, []).append(taken)
            else:
                first[name] = time.perf_counter() - start
    figures = {
        name: {
            "seconds_per_token": median(of),
            "tokens_per_second": len(ids) / median(of),
            "warm_up_seconds": first[name],
        }
        for name, of in seconds.items()
    }
    return figures | {name: {"failed": reason} for name, reason in failed.items()}


def specdec_generate(model: Any, drafter: Drafter | None, fixed: bool, mode: Any) -> Any:
    budget = Budget(64, fixed=fixed)
    return specdec.accelerate(model, drafter, strict=True, budget=budget, cuda_graphs=mode)


def hf_generate(model: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: model.generate(*args, **kwargs)


def hf_compiled(model: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: model.generate(*args, cache_implementation="static", **kwargs)


def off(model: Any, preset: Preset, limits: DeviceLimits, mode: Any) -> Iterator[dict[str, Any]]:
    costs = step_costs(model)
    for context in preset.contexts:
        ids = prompt(1, context, model.config.vocab_size, model.device)
        fast = specdec_generate(model, None, False, mode)
        methods = {"specdec off": fast.generate, "HF generate": hf_generate(model), "HF compiled": hf_compiled(model)}
        figures = in_turn(methods, ids, preset)
        bytes_read = costs.bytes(1, context + preset.tokens // 2)
        for of in figures.values():
            if "seconds_per_token" in of:
                of["of_copy_bandwidth"] = bytes_read / limits.bandwidth / of["seconds_per_token"]
        told = {"cuda_graphs": fast.report.cuda_graphs, "attention": fast.report.attention}
        yield {"context": context, "methods": figures} | told


def step(model: Any, preset: Preset, mode: Any) -> dict[str, Any]:
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= preset.nodes]
    return measure_roofline(model, sizes, preset.contexts, 1, mode).to_dict()


def accept(model: Any, preset: Preset, mode: Any) -> Iterator[dict[str, Any]]:
    for context in preset.contexts:
        ids = prompt(1, context, model.config.vocab_size, model.device)
        methods: dict[str, Any] = {"HF generate": hf_generate(model), "HF compiled": hf_compiled(model)}
        runs = {}
        for name, accepted in ACCEPTED.items():
            drafter = ScriptedDrafter(model.config.vocab_size, accepted, preset.nodes)
            runs[name] = specdec_generate(model, drafter, True, mode)
            methods[f"specdec at {name}"] = runs[name].generate
        figures = in_turn(methods, ids, preset)
        reached = {name: run.report.tokens_per_pass for name, run in runs.items()}
        phases = {name: run.report.seconds for name, run in runs.items()}
        yield {"context": context, "methods": figures, "tokens_per_pass": reached, "phases": phases}


def batches(model: Any, preset: Preset, mode: Any) -> Iterator[dict[str, Any]]:
    for batch in preset.batches:
        ids = prompt(batch, preset.contexts[0], model.config.vocab_size, model.device)
        vocab = model.config.vocab_size
        chosen = specdec_generate(model, ScriptedDrafter(vocab, ACCEPTED["3"], preset.nodes), False, mode)
        methods = {
            "specdec off": specdec_generate(model, None, False, mode).generate,
            "always 64 nodes": specdec_generate(
                model, ScriptedDrafter(vocab, ACCEPTED["3"], preset.nodes), True, mode
            ).generate,
            "the budget's choice": chosen.generate,
        }
        figures = in_turn(methods, ids, preset)
        sizes = dict(sorted(chosen.speculation.budget.sizes.items()))
        yield {"batch": batch, "methods": figures, "sizes_chosen": sizes}
        release(model)


def table(part: str, rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title=f"{part}: tokens/s, all rows", title_justify="left")
    names = list(dict.fromkeys(name for row in rows for name in row["methods"]))
    for column in ("", *names):
        shown.add_column(column, justify="right")
    for row in rows:
        cells = [
            f"{of['tokens_per_second']:.1f}" if "tokens_per_second" in of else "failed"
            for of in row["methods"].values()
        ]
        shown.add_row(f"context {row['context']}" if "context" in row else f"batch {row['batch']}", *cells)
    return shown


app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, add_completion=False)


@app.command()
@with_short_errors
def main(
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "llama-8b",
    part: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(PARTS)}; may be repeated. Default: all.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    cuda_graphs: Annotated[str, typer.Option(help="auto, eager or off.")] = "auto",
    name: Annotated[str, typer.Option(help="The results' file is gpu_step_NAME.json.")] = "",
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Measure, print tables, write JSON."""
    console, chosen = Console(), PRESETS[preset]
    mode: Any = {"auto": "auto", "eager": "eager", "off": False}[cuda_graphs]
    model = counting_model(chosen, torch.device(device))
    limits = device_limits(model.device, chosen.dtype)
    results: dict[str, Any] = circumstances() | {"model": model_info(preset, model), "limits": vars(limits)}
    file = output / f"gpu_step_{name or preset}.json"
    for wanted in part or PARTS:
        if wanted == "step":
            results[wanted] = step(model, chosen, mode)
        else:
            run = {"off": lambda: off(model, chosen, limits, mode), "accept": lambda: accept(model, chosen, mode)}
            rows = results[wanted] = []
            for row in run.get(wanted, lambda: batches(model, chosen, mode))():
                rows.append(row)
                write_json(file, results)  # a time limit may come before the next one
            console.print(table(wanted, rows))
        release(model)
        write_json(file, results)
    console.print(f"written to {file}", soft_wrap=True)


if __name__ == "__main__":
    app()
