"""Measures a draft model on held-out prompts: HF's assisted generation against each growth of a draft.

    python benchmarks/bench_draft_model.py
    python benchmarks/bench_draft_model.py --model Qwen/Qwen3-8B --draft-model Qwen/Qwen3-0.6B --name draft-qwen3

All methods complete each prompt in turn with HF generate; the figures are medians over the prompts. The best setting of
HF's assisted generation is found beforehand, in a short run of its own on other prompts. Methods that keep the
distribution, but not the tokens, run in turn with the others and have a table of their own. Where the drafting time
goes is measured after that, with timing wrappers, and without them nothing is timed but whole calls.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer
from draft_profile import profile
from rich.console import Console
from rich.table import Table

from specdec.api import SpeculativeModel, accelerate
from specdec.benchmark.display import measure_with_progress, summary_table
from specdec.benchmark.measuring import EncodedPrompt, Measurement, Method, Settings
from specdec.benchmark.methods import HF_ASSISTED, HF_GENERATE, OFF, CompiledGenerate, Contender, assisted_kwargs
from specdec.benchmark.prompts import read_benchmark_prompts
from specdec.commands import options
from specdec.common.errors import UserError, with_short_errors
from specdec.common.loading import EMBEDDED, load_model, own_draft_model, prepare_torch
from specdec.common.provenance import circumstances, model_info, write_json
from specdec.drafters.draft_model import DraftModelDrafter

RESULTS = Path(__file__).parent / "results"
GROWTHS = ("chain", "dynamic")
ASSISTED_TOKENS = (2, 3, 5, 8)
ASSISTED_THRESHOLDS = (0.0, 0.4)
BEST = f"{HF_ASSISTED}, best setting"
SHOWN_DEPTHS = 8

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, add_completion=False)


@dataclass
class Pair:
    """A target and its draft model.

    Args:
        target: The target.
        draft: The draft model.
        assisted: What HF's assisted generation needs besides.
        compiled: Growths that are measured with the draft model compiled too.
        runs: Ours by method, in the order of the runs, the warm-up's first; their reports stay with them.
    """

    target: Any
    draft: Any
    assisted: dict[str, Any]
    compiled: Sequence[str] = ()
    runs: dict[str, list[SpeculativeModel]] = field(default_factory=lambda: defaultdict(list))

    def ours(self, name: str, verifier: str = "exact", target_compiled: bool = False, **settings: Any) -> Method:
        """A draft model with these settings, made anew for each run."""

        def prepare() -> SpeculativeModel:
            drafter = DraftModelDrafter(self.draft, **settings)
            fast = accelerate(self.target, drafter, verifier, compiled=target_compiled)
            self.runs[name].append(fast)
            return fast

        return Method(name, prepare)

    def hf_assisted(self, name: str = HF_ASSISTED, tokens: int | None = None, threshold: float = 0.0) -> Method:
        """HF's assisted generation: as it comes, or with so many draft tokens at most and this confidence threshold."""
        # A copy shares all weights; what HF writes into its settings stays with this method. With another tokenizer it
        # writes into the model itself.
        draft = copy.deepcopy(self.draft) if self.assisted else copy.copy(self.draft)
        draft.generation_config = copy.deepcopy(self.draft.generation_config)
        if tokens is not None:
            draft.generation_config.num_assistant_tokens = tokens
            draft.generation_config.num_assistant_tokens_schedule = "constant"
            draft.generation_config.assistant_confidence_threshold = threshold
        return Method(name, lambda: self.target, {"assistant_model": draft, **self.assisted}, optional=True)

    def exact_methods(self, is_sampled: bool) -> list[Method]:
        """Each growth; under sampling without the target's noise too."""
        methods = [self.ours(f"draft model, {growth}", growth=growth) for growth in GROWTHS]
        methods += [self.ours(f"{growth}, compiled", growth=growth, compiled=True) for growth in self.compiled]
        methods += [
            self.ours(f"{growth}, both compiled", growth=growth, compiled=True, target_compiled=True)
            for growth in self.compiled
        ]
        if is_sampled:
            methods += [self.ours(f"{growth}, uncoupled", growth=growth, coupled=False) for growth in GROWTHS]
        return methods

    def distribution_methods(self) -> list[Method]:
        """Drawn drafts, chains by block and trees by traversal verification: the same distribution, other tokens."""
        return [
            self.ours("chain, block", "block", growth="chain"),
            self.ours("dynamic, traversal", "traversal", growth="dynamic"),
        ]

    def best_assisted(self, prompts: Sequence[EncodedPrompt], settings: Settings) -> tuple[Method, Measurement]:
        """The fastest of HF's settings in a short run, and that run."""
        tried = {
            f"{tokens} tokens, threshold {threshold:g}": (tokens, threshold)
            for tokens in ASSISTED_TOKENS
            for threshold in ASSISTED_THRESHOLDS
        }
        methods = [self.hf_assisted(name, *setting) for name, setting in tried.items()]
        result = measure_with_progress("HF's settings", [self.plain(), *methods], prompts, self.target, settings, 1)
        rows = [row for row in result.rows() if row.method in tried]
        if not rows:
            raise UserError(f"HF's assisted generation cannot run with this pair: {result.failed}")
        best = max(rows, key=lambda row: row.speedup).method
        return self.hf_assisted(BEST, *tried[best]), result

    def plain(self) -> Method:
        """What the others are compared with."""
        return Method(HF_GENERATE, lambda: self.target)

    def acceptance(self, methods: Iterable[Method]) -> dict[str, dict[str, Any]]:
        """Of our methods, the warm-up left out: counts, and the share of drafts accepted to at least each depth."""
        return {m.name: _acceptance(self.runs[m.name][1:]) for m in methods if m.name in self.runs}


def _acceptance(runs: Sequence[SpeculativeModel]) -> dict[str, Any]:
    reports = [run.report for run in runs]
    drafts = sum(report.num_drafts for report in reports)
    per_run = [report.num_accepted_tokens_per_pos for report in reports]
    accepted = [sum(counts) for counts in zip_longest(*per_run, fillvalue=0)]
    return {
        "num_drafts": drafts,
        "num_draft_tokens": sum(report.num_draft_tokens for report in reports),
        "num_accepted_tokens": sum(accepted),
        "acceptance_per_depth": [count / max(drafts, 1) for count in accepted],
        "guarantee": reports[0].guarantee if reports else None,
    }


def only(result: Measurement, methods: Sequence[Method]) -> Measurement:
    """The part of a measurement that is about some methods, and the one they are compared with."""
    names = {result.reference, *(method.name for method in methods)}
    return replace(
        result,
        samples=[sample for sample in result.samples if sample.method in names],
        failed={name: reason for name, reason in result.failed.items() if name in names},
    )


def acceptance_table(acceptance: dict[str, dict[str, Any]], title: str) -> Table:
    """One row per method, one column per depth."""
    table = Table(title=title, title_justify="left", caption="share of the drafts accepted to this depth at least")
    table.add_column("method", no_wrap=True)
    for name in ("drafts", *map(str, range(1, SHOWN_DEPTHS + 1))):
        table.add_column(name, justify="right")
    for method, counts in acceptance.items():
        rates = counts["acceptance_per_depth"][:SHOWN_DEPTHS]
        cells = [f"{rate:.2f}" for rate in rates] + [""] * (SHOWN_DEPTHS - len(rates))
        table.add_row(method, str(counts["num_drafts"]), *cells)
    return table


def profile_table(profiles: dict[str, dict[str, Any]], title: str) -> Table:
    """One row per growth, one column per part of the drafting time."""
    table = Table(title=title, title_justify="left", caption="share of the drafting time; reading the prompt left out")
    names = list(next(iter(profiles.values()))["share"])
    for name in ("growth", "ms per draft", *names, "outside forwards"):
        table.add_column(name, justify="right" if name != "growth" else "left")
    for growth, split in profiles.items():
        shares = [f"{split['share'][name]:.1%}" for name in names]
        table.add_row(
            growth, f"{sum(split['ms_per_draft'].values()):.2f}", *shares, f"{split['share_outside_forwards']:.1%}"
        )
    return table


def growing(growth: str, compiled: bool = False) -> Callable[[Any], DraftModelDrafter]:
    """Makes a drafter of this growth for a draft model."""
    return lambda draft: DraftModelDrafter(draft, growth=growth, compiled=compiled)  # type: ignore[arg-type]


def run_part(
    console: Console,
    part: str,
    pair: Pair,
    prompts: Sequence[EncodedPrompt],
    tuning: Sequence[EncodedPrompt],
    settings: Settings,
    repeats: int,
) -> dict[str, Any]:
    """Measures greedy or sampled decoding; figures by their name in the result file."""
    is_sampled = bool(settings.arguments["do_sample"])
    title = f"{settings.arguments['max_new_tokens']} tokens, batch 1, {len(prompts) - 1} prompts"
    best, tried = pair.best_assisted([*tuning, prompts[-1]], settings)
    pair.runs.clear()
    off = Contender(OFF, lambda: None).method(pair.target)
    exact = [pair.hf_assisted(), best, off, *pair.exact_methods(is_sampled)]
    if pair.compiled:
        longest = max(prompt.input_ids.shape[1] for prompt in prompts)
        fastest = CompiledGenerate(pair.target, 1, longest, dict(settings.arguments))
        compiled_off = Contender(f"{OFF}, compiled", lambda: None, compiled=True).method(pair.target)
        exact[0:0] = [fastest.method(), compiled_off]
    loose = pair.distribution_methods() if is_sampled else []
    result = measure_with_progress(part, [pair.plain(), *exact, *loose], prompts, pair.target, settings, repeats)
    parts = {part: only(result, exact)} | ({"distribution": only(result, loose)} if loose else {})
    for name, of_part in parts.items():
        console.print(summary_table(of_part, f"{name}, {title}"))
    console.print(f"{BEST}: {setting_of(best)}", highlight=False, soft_wrap=True)
    acceptance = pair.acceptance([*exact, *loose])
    console.print(acceptance_table(acceptance, f"{part}, acceptance by depth"))
    makers = {growth: growing(growth) for growth in GROWTHS}
    makers |= {f"{growth}, compiled": growing(growth, compiled=True) for growth in pair.compiled}
    profiles = {name: profile(make, pair.draft, pair.target, prompts, settings) for name, make in makers.items()}
    console.print(profile_table(profiles, f"{part}, where the drafting time goes"))
    return {
        "parts": {name: of_part.to_dict() for name, of_part in parts.items()},
        "acceptance": {part: acceptance},
        "profile": {part: profiles},
        "hf_assisted_settings": {part: {"best": setting_of(best), **tried.to_dict()}},
    }


def setting_of(best: Method) -> dict[str, Any]:
    """The setting that was found for HF's assisted generation."""
    config = best.kwargs["assistant_model"].generation_config
    names = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")
    return {name: getattr(config, name) for name in names}


@app.command()
@with_short_errors
def main(
    name: Annotated[str, typer.Option(help="Of the file in benchmarks/results.")] = "draft_model",
    model: options.Model = EMBEDDED,
    draft_model: options.DraftModel = None,
    prompt_file: Annotated[Path | None, typer.Option(help='JSONL, {"prompt": "..."} a line.')] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts per part.")] = 20,
    tuning_prompts: Annotated[int, typer.Option(min=1, help="Further ones, to find HF's best setting.")] = 4,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per completion.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Runs per prompt and method.")] = 1,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="Measure the draft model, and both models, compiled too; some minutes of warm-up."
        ),
    ] = False,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Measure and write benchmarks/results/NAME.json."""
    count = prompts + tuning_prompts + 1
    draft_name = draft_model or own_draft_model(model)
    if draft_name is None:
        raise UserError("a draft model is needed; name one with --draft-model")
    prepare_torch(threads)
    target, tokenizer = load_model(model, dtype, device)
    chosen = read_benchmark_prompts(str(prompt_file or "embedded"), tokenizer, count)
    if len(chosen) < count:
        raise UserError(f"{count} prompts are needed, there are {len(chosen)}; lower --prompts or --tuning-prompts")
    draft, draft_tokenizer = load_model(draft_name, dtype, device)
    encoded = [replace(prompt, input_ids=prompt.input_ids.to(target.device)) for prompt in chosen]
    tuning = [encoded[i * len(encoded) // tuning_prompts] for i in range(tuning_prompts)]
    measured = [prompt for prompt in encoded if prompt.id not in {p.id for p in tuning}]
    pair = Pair(target, draft, assisted_kwargs(tokenizer, draft_tokenizer), GROWTHS if compiled else ())
    figures: dict[str, Any] = defaultdict(dict)
    for part, settings in {
        "greedy": Settings.of(tokens),
        "sampled": Settings.of(tokens, do_sample=True, temperature=1.0, seed=seed),
    }.items():
        for figure, value in run_part(Console(), part, pair, measured, tuning, settings, repeats).items():
            figures[figure] |= value
    models = {"target": model_info(model, target), "draft": model_info(draft_name, draft)}
    shape = {"batch": 1, "num_prompts": len(measured) - 1, "repeats": repeats}
    write_json(RESULTS / f"{name}.json", {**circumstances(), "models": models, **shape, **figures})
    Console().print(f"written to {RESULTS / f'{name}.json'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
