"""A target that does not fit in memory: its weights stay on the disk, and a small model drafts while they load.

    python examples/offload/offload.py
    python examples/offload/offload.py --tokens 96 --prompts 3 --json benchmarks/results/offload.json

A Llama of about 160 million parameters (random weights, nothing is downloaded) is written to a temporary folder, and
accelerate's `disk_offload` runs it from there: before each module's forward its weights are read, afterwards they are
freed again. So a pass takes about as long for 64 tokens as for one, and what counts is how many tokens each pass makes.

The weights are made so that the first layer decides most of the output and the others change it a little, and a copy of
that layer is the draft model: it is often right, as a trained draft model would be, and its mistakes are real ones.

A model of this size would stay in the operating system's page cache, and after the first pass nothing would come from
the disk any more. One larger than the memory would not: so the files are dropped from the cache after every pass, for
all methods alike (`--warm` leaves them there).

HF generate, paced drafts (LLMCad, arXiv 2309.04255), and the same with drafting ahead while weights load
(`DraftModelDrafter(draft_model, pipelined=True)`) complete each prompt in turn, greedily. Needs about 1.5 GB of memory
and 0.7 GB of disk.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from accelerate import disk_offload
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import specdec
from specdec.benchmark.display import measure_with_progress
from specdec.benchmark.measuring import EncodedPrompt, Measurement, Method, Settings
from specdec.common.provenance import circumstances, model_info, write_json
from specdec.drafters import DraftModelDrafter

HF, PACED, PIPELINED = "HF generate", "paced drafts", "paced drafts, pipelined"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def make_models(layers: int, hidden: int, tail: float, sharpness: float, seed: int) -> tuple[Any, Any]:
    """A target and a draft model that agrees with it often.

    Args:
        layers: Of the target; the draft model is its first one.
        hidden: Width.
        tail: What the output of the other layers is scaled by.
        sharpness: What the logits are scaled by: random weights alone are never sure of anything.
        seed: Of the weights.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=4096,
        initializer_range=0.05,
        tie_word_embeddings=False,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    target = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        target.lm_head.weight *= sharpness
        for layer in target.model.layers[1:]:
            layer.self_attn.o_proj.weight *= tail
            layer.mlp.down_proj.weight *= tail
    first = LlamaConfig.from_dict(config.to_dict() | {"num_hidden_layers": 1})
    draft_model = LlamaForCausalLM(first).eval()
    draft_model.load_state_dict(target.state_dict(), strict=False)
    return target, draft_model


@contextmanager
def read_anew(target: Any, folder: Path) -> Iterator[None]:
    """Drops the weights from the page cache after each pass, as if the memory held something else by then."""

    def drop(*args: object) -> None:
        for path in folder.glob("*.dat"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    for path in folder.glob("*.dat"):  # pages that are not yet written cannot be dropped
        with path.open("rb") as file:
            os.fsync(file.fileno())
    drop()
    hook = target.register_forward_hook(drop)
    try:
        yield
    finally:
        hook.remove()


def compare(target: Any, draft_model: Any, prompts: int, tokens: int, repeats: int) -> tuple[Measurement, list[Any]]:
    """Runs the three methods in turn; also returns what the pipeline says of itself, per prompt."""
    runners = {
        PACED: specdec.accelerate(target, DraftModelDrafter(draft_model, growth="paced"), strict=True),
        PIPELINED: specdec.accelerate(target, DraftModelDrafter(draft_model, pipelined=True), strict=True),
    }
    ids = torch.randint(1, target.config.vocab_size, (prompts + 1, 1, 32), generator=torch.Generator().manual_seed(1))
    encoded = [EncodedPrompt(f"random tokens {i}", row) for i, row in enumerate(ids)]
    methods = [Method(HF, lambda: target)]
    methods += [Method(name, lambda fast=fast: fast) for name, fast in runners.items()]  # type: ignore[misc]
    warm_up, *measured = encoded
    result = measure_with_progress("offload", methods, [*measured, warm_up], target, Settings.of(tokens), repeats)
    pipelined = [sample for sample in result.samples if sample.method == PIPELINED and sample.report]
    figures = [{"prompt": s.prompt, **s.report["drafter_figures"], "seconds": s.report["seconds"]} for s in pipelined]  # type: ignore[index]
    return result, figures


def table_of(result: Measurement) -> Table:
    """The result, a method a line."""
    table = Table("method", "tokens/s", "speed-up", "tokens per pass", "identical", title="target on the disk")
    for row in result.rows():
        speed, speedup = f"{row.tokens_per_second:.2f}", f"{row.speedup:.2f}x"
        table.add_row(row.method, speed, speedup, f"{row.tokens_per_pass:.2f}", f"{row.num_identical}/{row.num_runs}")
    return table


def pipeline_gain(result: Measurement) -> float:
    """Median over the prompts of the pipeline's speed by that of the same drafts without it."""
    speeds: dict[tuple[str, str], list[float]] = {}
    for sample in result.samples:
        speeds.setdefault((sample.prompt, sample.method), []).append(sample.tokens_per_second)
    prompts = {prompt for prompt, _ in speeds}
    return median(median(speeds[prompt, PIPELINED]) / median(speeds[prompt, PACED]) for prompt in prompts)


@app.command(help=__doc__.replace("\n\n    ", "\n\n\b\n    "))
def main(
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per completion.")] = 64,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts, besides the one for the warm-up.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Runs per prompt and method.")] = 1,
    layers: Annotated[int, typer.Option(min=2, help="Of the target.")] = 6,
    hidden: Annotated[int, typer.Option(min=64, help="Width, a multiple of 64.")] = 1280,
    tail: Annotated[float, typer.Option(min=0, help="How much the layers behind the first change the output.")] = 0.05,
    sharpness: Annotated[float, typer.Option(min=0, help="How sure the models are of what they say.")] = 8.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights.")] = 0,
    warm: Annotated[bool, typer.Option("--warm", help="Leave the weights in the page cache.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where to put the temporary folder: on a real disk.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures there.")] = None,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    target, draft_model = make_models(layers, hidden, tail, sharpness, seed)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (target, draft_model)]
    print(f"target {sizes[0] / 1e6:.0f} M parameters, draft model {sizes[1] / 1e6:.0f} M, float32")
    with tempfile.TemporaryDirectory(dir=folder) as weights:
        target = disk_offload(target, weights, execution_device="cpu")
        if warm:
            result, figures = compare(target, draft_model, prompts, tokens, repeats)
        else:
            with read_anew(target, Path(weights)):
                result, figures = compare(target, draft_model, prompts, tokens, repeats)
    gain = pipeline_gain(result)
    Console().print(table_of(result))
    print(f"gain of the pipeline alone: {gain:.2f}x")
    if json is not None:
        names = {"target": f"random Llama of {layers} layers, on the disk", "draft": "its first layer"}
        models = {role: model_info(names[role], m) for role, m in (("target", target), ("draft", draft_model))}
        setting = {"batch": 1, "num_prompts": prompts, "repeats": repeats, "models": models}
        setting |= {"weights": {"tail": tail, "sharpness": sharpness, "seed": seed}, "page_cache_kept": warm}
        parts = {"greedy": result.to_dict() | {"pipeline_gain": gain, "pipeline": figures}}
        write_json(json, {**circumstances(), **setting, "parts": parts})
        print(f"written to {json}")


if __name__ == "__main__":
    app()
