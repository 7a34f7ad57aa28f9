"""Measures Medusa heads on held-out prompts: a tree against a chain, a tuned tree against the default ones.

    python benchmarks/bench_medusa.py
    python benchmarks/bench_medusa.py --model Qwen/Qwen3-8B --heads me/qwen3-8b-medusa --name medusa-qwen3

    python benchmarks/bench_medusa.py --heads heads/ --adapter heads/adapter --name medusa-2      (of --recipe medusa-2)

All methods complete each prompt in turn with HF generate. Figures are medians over the prompts. With an adapter, the
adapted model is the target, and how far its own output has moved is reported.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from specdec.benchmark.display import measure_with_progress, summary_table
from specdec.benchmark.measuring import EncodedPrompt, Method, Settings
from specdec.benchmark.methods import HF_GENERATE, OFF, Contender
from specdec.benchmark.prompts import read_benchmark_prompts
from specdec.commands import options
from specdec.common.errors import with_short_errors
from specdec.common.loading import EMBEDDED, load_model, prepare_torch
from specdec.common.provenance import circumstances, model_info, write_json
from specdec.drafters.base import Drafter
from specdec.drafters.medusa import MedusaDrafter
from specdec.heads import MedusaHeads
from specdec.tree import TokenTree

RESULTS = Path(__file__).parent / "results"

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, add_completion=False)


@dataclass(eq=False)
class ChainOnly(MedusaDrafter):
    """The heads' best tokens one after the other, without branches."""

    def grow(self, *args: Any) -> TokenTree:
        return super().grow(*args).first_chain()


def variants(heads: MedusaHeads) -> dict[str, Callable[[], Drafter]]:
    """Drafters by name, made anew for each run."""
    untuned = copy.deepcopy(heads)
    unmeasured = copy.deepcopy(heads)
    unmeasured.calibration = None
    if untuned.calibration is not None:
        untuned.calibration.tree = None
    made: dict[str, Callable[[], Drafter]] = {
        "by probability": lambda: MedusaDrafter(heads),
        "chain": lambda: ChainOnly(heads),
        "default accuracies": lambda: MedusaDrafter(unmeasured, dynamic=False),
        "measured accuracies": lambda: MedusaDrafter(untuned, dynamic=False),
    }
    if heads.calibration is not None and heads.calibration.tree:
        made["tuned tree"] = lambda: MedusaDrafter(heads, dynamic=False)
    return made


@torch.no_grad()
def moved(adapted: Any, prompts: Sequence[EncodedPrompt]) -> dict[str, float]:
    """Perplexity of the prompts with and without the adapter, and KL(without || with) in nats per token."""
    losses, divergence, count = [0.0, 0.0], 0.0, 0
    for prompt in prompts:
        ids = prompt.input_ids
        with adapted.disable_adapter():
            before = adapted(ids).logits[0, :-1].float().log_softmax(-1)
        after = adapted(ids).logits[0, :-1].float().log_softmax(-1)
        for i, log_probs in enumerate((before, after)):
            losses[i] += float(torch.nn.functional.nll_loss(log_probs, ids[0, 1:], reduction="sum"))
        divergence += float((before.exp() * (before - after)).sum())
        count += ids.shape[1] - 1
    perplexities = [math.exp(loss / count) for loss in losses]
    return {"perplexity_before": perplexities[0], "perplexity_after": perplexities[1], "divergence": divergence / count}


@app.command()
@with_short_errors
def main(
    heads: Annotated[str | None, typer.Option(help="Folder or hub name; the folder medusa in the model's own.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Folder of adapters that were trained with the heads.")] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="Verify each draft whole, paying or not: for the tokens per pass.")
    ] = False,
    name: Annotated[str, typer.Option(help="Of the file in benchmarks/results.")] = "medusa",
    model: options.Model = EMBEDDED,
    prompt_file: Annotated[Path | None, typer.Option(help='JSONL, {"prompt": "..."} a line.')] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts per part.")] = 20,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per completion.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Runs per prompt and method.")] = 1,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Measure and write benchmarks/results/NAME.json."""
    prepare_torch(threads)
    target, tokenizer = load_model(model, dtype, device)
    loaded = MedusaHeads.from_pretrained(heads or str(Path(target.config.name_or_path) / "medusa"))
    chosen = read_benchmark_prompts(str(prompt_file or "embedded"), tokenizer, prompts + 1)
    encoded = [replace(prompt, input_ids=prompt.input_ids.to(target.device)) for prompt in chosen]
    own_output: dict[str, float] | None = None
    if adapter is not None:
        from peft import PeftModel

        adapted: Any = PeftModel.from_pretrained(target, adapter).eval()
        own_output = moved(adapted, encoded)
        target = adapted.merge_and_unload()
        print("the target's own output on the prompts:", own_output)
    methods = [Method(HF_GENERATE, lambda: target), Contender(OFF, lambda: None).method(target)]
    for variant, make in variants(loaded).items():
        methods.append(Contender(f"medusa, {variant}", make, whole=whole).method(target))
    console, results = Console(), {}
    for part, settings in {
        "greedy": Settings.of(tokens),
        "sampled": Settings.of(tokens, do_sample=True, temperature=1.0, seed=seed),
    }.items():
        result = measure_with_progress(part, methods, encoded, target, settings, repeats)
        console.print(summary_table(result, f"{part}, {tokens} tokens, batch 1, {len(encoded) - 1} prompts"))
        results[part] = result.to_dict()
    figures: dict[str, Any] = {"models": {"target": model_info(model, target)}, "parts": results}
    figures["own_output"] = own_output
    figures["heads"] = vars(loaded.config) | {"calibration": vars(loaded.calibration) if loaded.calibration else None}
    shape = {"batch": 1, "num_prompts": len(encoded) - 1, "repeats": repeats}
    write_json(RESULTS / f"{name}.json", {**circumstances(), **shape, **figures})
    console.print(f"written to {RESULTS / name}.json", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
