"""Measures every source of drafts, every pair, and "auto" on a mixture of prompts of four kinds, against drafting off.

    python benchmarks/bench_sources.py greedy-1 sampled-1
    python benchmarks/bench_sources.py greedy-4 greedy-8 sampled-4 sampled-8 --only lookahead,auto
    python benchmarks/bench_sources.py nodes-16

A part is one interleaved run: on each prompt all settings run in turn, beginning with another one each time; prompts of
the four kinds alternate. Each setting has one drafter, which goes on from prompt to prompt and meets each of them once.
Running a part again, in a new process, adds a run over the same prompts, with new drafters; of each prompt and setting
the median over all runs counts, and figures are of the sums of these. Machines are noisy: in "usual" figures, each
target pass counts as long as those in the run of the same kind of prompt, rows and nodes, after a draft or not, are
while the machine is quiet (a quarter of them is shorter), each prefill as long as those of prompts of its kind and
length, and the rest of a call as many times less or more as its passes do. `off again` is drafting off once more: how
far it is from 1 is what the figures of the others are good to. `sampled-4` is temperature 1 in batches of four. In
`nodes-16` every source is asked in every step and drafts of up to 16 nodes are verified whole, so that tokens per pass
can be compared at one node count; its times mean nothing.

Kinds: `completion`, held-out code; `edit`, held-out code whose beginning stands there once more, to be gone on with;
`questions`, a few texts that come again with another question each time; `incompressible`, random ids gone on with at
temperature 5 in every part. Runs are kept in a file of their own (`--raw`); the results file holds figures over them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from specdec.api import SpeculativeModel, accelerate
from specdec.budget import Budget
from specdec.common.embedded import heldout_prompts, load_embedded
from specdec.common.provenance import circumstances, write_json
from specdec.drafters import AutoDrafter, Drafter, DraftModelDrafter, LookaheadDrafter, MergedDrafter, RecyclingDrafter
from specdec.drafters.medusa import MedusaDrafter, own_heads
from specdec.drafters.merging.known import SourceWorth
from specdec.report import SpeculationReport
from specdec.target import TreeTarget
from specdec.tree import TokenTree

RESULTS = Path(__file__).parent / "results"
KINDS = ("completion", "edit", "questions", "incompressible")
OFF, AGAIN, AUTO, ALL = "off", "off again", "auto", "auto+draft"
TEXTS_ASKED, HOT = 3, 5.0
LIKE_PASSES, QUIET = 5, 0.25
"""Passes of one kind from which on the usual one is looked for, and the share of them that is supposed to be quiet."""

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, add_completion=False)


def texts_of(kind: str, first: int, count: int) -> list[str]:
    """Prompts of a kind; for incompressible ones there is no text."""
    heldout = [prompt.text for prompt in heldout_prompts()]
    if kind == "completion":
        return [heldout[i % len(heldout)] for i in range(first, first + count)]
    if kind == "edit":
        chosen = [heldout[-1 - i % len(heldout)] for i in range(first, first + count)]
        return [f"{text}\n\n\n# The same once more\n{text[: len(text) // 4]}" for text in chosen]
    asked = [heldout[(len(heldout) // 2 + first + i) % len(heldout)] for i in range(min(TEXTS_ASKED, -(-count // 2)))]
    return [f"# Question {i}\n{asked[i % len(asked)]}" for i in range(count)]


def prompts_of(
    kind: str, first: int, count: int, batch: int, tokenizer: Any, vocab: int
) -> list[dict[str, torch.Tensor]]:
    """Batches of prompts, padded on the left, as keyword arguments of `generate`."""
    if kind == "incompressible":
        ids = np.random.default_rng(first).integers(2, vocab, (count, batch, 64))
        return [{"input_ids": torch.from_numpy(rows), "attention_mask": torch.ones(batch, 64).long()} for rows in ids]
    texts = texts_of(kind, first, count + batch - 1)
    return [dict(tokenizer(texts[i : i + batch], return_tensors="pt", padding=True)) for i in range(count)]


def settings_of(model: Any, draft_model: Any, only: str) -> dict[str, Callable[[], Drafter | None]]:
    """Makers of drafters by name: off, every source, every pair, and what chooses by itself."""
    sources: dict[str, Callable[[], Drafter]] = {
        "lookahead": LookaheadDrafter,
        "recycling": RecyclingDrafter,
        "draft": lambda: DraftModelDrafter(draft_model),
    }
    if own_heads(model) is not None:
        sources["medusa"] = MedusaDrafter
    made: dict[str, Callable[[], Drafter | None]] = {OFF: lambda: None, AGAIN: lambda: None, **sources}
    for one, two in itertools.combinations(sources, 2):
        made[f"{one}+{two}"] = lambda one=one, two=two: MergedDrafter([sources[one](), sources[two]()])
    made[AUTO] = AutoDrafter
    made[ALL] = lambda: AutoDrafter(more=[DraftModelDrafter(draft_model)])
    wanted = {name.strip() for name in only.split(",") if name.strip()}
    if unknown := wanted - set(made):
        raise typer.BadParameter(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(made)}")
    return {name: make for name, make in made.items() if not wanted or name in wanted | {OFF, AGAIN}}


def run_part(
    model: Any,
    tokenizer: Any,
    made: dict[str, Callable[[], Drafter | None]],
    part: str,
    first: int,
    count: int,
    new_tokens: int,
) -> list[dict[str, Any]]:
    """Samples of one run over `count` prompts of each kind, from the `first` one on, with new drafters."""
    mode, size = part.split("-")
    if mode == "nodes":  # however long a source takes
        SourceWorth.skips = lambda self: False  # type: ignore[method-assign]
    batch = 1 if mode == "nodes" else int(size)
    prompts = {kind: prompts_of(kind, first, count, batch, tokenizer, model.config.vocab_size) for kind in KINDS}
    fast: dict[str, SpeculativeModel] = {}
    for name, make in made.items():
        budget = Budget(int(size), fixed=True) if mode == "nodes" else Budget(64, owner=(part, name))
        fast[name] = accelerate(model, make(), budget=budget, strict=True)
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0} if mode == "sampled" else {"do_sample": False}
        accelerate(model, make(), budget=budget).generate(
            **prompts_of("completion", first + count, 1, batch, tokenizer, 0)[0],
            max_new_tokens=new_tokens // 2,
            **sampling,
        )
    samples: list[dict[str, Any]] = []
    passes = Passes()
    for number, (i, kind) in enumerate(itertools.product(range(count), KINDS)):
        how = {"do_sample": True, "temperature": HOT, "top_k": 0} if kind == "incompressible" else sampling
        names = list(made)
        turn = number % len(names)
        outputs = {}
        for name in names[turn:] + names[:turn]:
            torch.manual_seed(number)
            passes.begin(kind)
            started = perf_counter()
            outputs[name] = fast[name].generate(**prompts[kind][i], max_new_tokens=new_tokens, **how)
            seconds = perf_counter() - started
            passes.end()
            samples.append(
                {"setting": name, "kind": kind, "number": first + i, **figures_of(fast[name].report, seconds)}
            )
        for name in names:
            if not torch.equal(outputs[name], outputs[OFF]):
                raise SystemExit(f"{part}, {kind} {i}: {name} gave other tokens than {OFF}")
    passes.close()
    for sample, seconds in zip(samples, passes.usual([sample["seconds"] for sample in samples]), strict=True):
        sample["usual_seconds"] = round(seconds, 5)
    return samples


def figures_of(report: SpeculationReport, seconds: float) -> dict[str, float]:
    """What is kept of a call that took so many seconds."""
    return {
        "seconds": round(seconds, 5),
        "tokens": report.num_generated_tokens,
        "passes": report.num_row_passes,
        "drafts": report.num_drafts,
    }


class Passes:
    """How long target passes took, call by call."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[tuple[Any, ...], float]]] = []
        self.kind, self.is_on, self.is_after_draft = "", False, False
        self.forward, self.prefill = forward, prefill = TreeTarget.forward, TreeTarget.prefill

        def timed_forward(target: TreeTarget, tree: TokenTree) -> torch.Tensor:
            started = perf_counter()
            logits = forward(target, tree)
            if self.is_on:
                key = self.kind, self.is_after_draft, *tree.tokens.shape
                self.calls[-1].append((key, perf_counter() - started))
                self.is_after_draft = tree.num_nodes > 1
            return logits

        def timed_prefill(target: TreeTarget, input_ids: torch.Tensor) -> torch.Tensor:
            started = perf_counter()
            logits = prefill(target, input_ids)
            if self.is_on:
                self.calls[-1].append(((self.kind, "prefill", *input_ids.shape), perf_counter() - started))
            return logits

        TreeTarget.forward, TreeTarget.prefill = timed_forward, timed_prefill  # type: ignore[method-assign]

    def begin(self, kind: str) -> None:
        """Notes the passes that follow as those of a new call."""
        self.calls.append([])
        self.kind, self.is_on, self.is_after_draft = kind, True, False

    def end(self) -> None:
        """Notes no more."""
        self.is_on = False

    def close(self) -> None:
        """Leaves the loop as it was."""
        TreeTarget.forward, TreeTarget.prefill = self.forward, self.prefill  # type: ignore[method-assign]

    def usual(self, seconds: Sequence[float]) -> list[float]:
        """By call, of the seconds that each of them took, those that it would have taken on a quiet machine."""
        like: dict[tuple[Any, ...], list[float]] = {}
        for key, taken in itertools.chain(*self.calls):
            like.setdefault(key, []).append(taken)
        quiet = {key: float(np.quantile(taken, QUIET)) for key, taken in like.items() if len(taken) >= LIKE_PASSES}
        out = []
        for total, call in zip(seconds, self.calls, strict=True):
            known = [(taken, quiet[key]) for key, taken in call if key in quiet]
            taken, usual = (sum(times) for times in zip(*known, strict=True)) if known else (1.0, 1.0)
            out.append(usual + (total - taken) * usual / taken)
        return out


def summary(runs: list[list[dict[str, Any]]]) -> dict[str, dict[str, dict[str, float]]]:
    """By kind and setting: speed-up over drafting off, tokens per pass, share of passes with a draft."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    names = list(dict.fromkeys(sample["setting"] for sample in runs[0]))
    for kind in (*KINDS, "mixture"):
        taken = {}
        for name in names:
            repeats: dict[tuple[str, int], list[dict[str, Any]]] = {}
            for s in itertools.chain(*runs):
                if s["setting"] == name and kind in (s["kind"], "mixture"):
                    repeats.setdefault((s["kind"], s["number"]), []).append(s)
            seconds, usual, tokens, passes, drafts = (
                sum(float(np.median([s[key] for s in same])) for same in repeats.values())
                for key in ("seconds", "usual_seconds", "tokens", "passes", "drafts")
            )
            taken[name] = {"tokens_per_second": tokens / seconds, "tokens_per_pass": tokens / passes}
            taken[name]["usual_tokens_per_second"] = tokens / usual
            taken[name]["drafted_passes"] = drafts / passes
        for figures in taken.values():
            for usual in ("", "usual_"):
                rate = f"{usual}tokens_per_second"
                figures[f"{usual}speedup"] = figures[rate] / taken[OFF][rate]
        out[kind] = {name: {key: round(value, 4) for key, value in row.items()} for name, row in taken.items()}
    return out


def table(results: dict[str, dict[str, dict[str, float]]], part: str) -> Table:
    figure = "tokens_per_pass" if part.startswith("nodes") else "usual_speedup"
    out = Table("setting", *results, title=f"{part}: {figure.replace('_', ' ')}", title_justify="left")
    for name in results["mixture"]:
        out.add_row(name, *(f"{results[kind][name][figure]:.2f}" for kind in results))
    return out


@app.command(help=__doc__)
def main(
    parts: Annotated[list[str], typer.Argument(help="greedy-N or sampled-N with N rows, or nodes-N.")],
    count: Annotated[int, typer.Option(min=1, help="Prompts, or batches of them, of each kind.")] = 3,
    first: Annotated[int, typer.Option(min=0, help="Number of the first one.")] = 0,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated.")] = 128,
    only: Annotated[str, typer.Option(help="Names with commas between; all by default.")] = "",
    output: Annotated[Path, typer.Option(help="JSON file of the figures.")] = RESULTS / "sources.json",
    raw: Annotated[Path, typer.Option(help="JSON file that keeps the runs, so that more can be added.")] = Path(
        "sources_runs.json"
    ),
) -> None:
    """Measures parts, prints them and adds them to the results."""
    console = Console()
    model, tokenizer = load_embedded()
    tokenizer.padding_side = "left"
    made = settings_of(model, load_embedded("draft")[0], only)
    for part in parts:
        known, kept = (json.loads(file.read_text("utf-8")) if file.exists() else {} for file in (output, raw))
        runs = kept.setdefault(part, [])
        runs.append(run_part(model, tokenizer, made, part, first, count, new_tokens))
        results = summary(runs)
        console.print(table(results, f"{part}, {len(runs)} runs"))
        settings = {"count": count, "new_tokens": new_tokens}
        known[part] = {**circumstances(), "settings": settings, "num_runs": len(runs), "results": results}
        write_json(raw, kept)
        write_json(output, known)
    console.print(f"written to {output.name}")


if __name__ == "__main__":
    app()
