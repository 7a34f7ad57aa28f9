"""Measures what features and constants of drafting are worth: without against with, in turn.

    python benchmarks/ablation.py --prompts prompts.jsonl --limit 6 --only "asking by worth,budget.DECAY"

On each prompt the unchanged setting (A) and the changed one (B) run in turn, A B A B, each with what its own runs have
learned. The ratio is B's seconds per token over A's: above 1, the feature or value is worth keeping. Constants are
halved and doubled. The entry `A again` changes nothing: what is not further from 1 than it is noise.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch as mock_patch
from weakref import WeakKeyDictionary

import torch
import typer
from rich.console import Console
from rich.table import Table

from specdec.api import accelerate
from specdec.benchmark.prompts import spread_over
from specdec.benchmark.runs import spread
from specdec.budget import Budget
from specdec.common.loading import load_model, prepare_torch
from specdec.common.provenance import circumstances, model_info, write_json
from specdec.drafters import AutoDrafter

RESULTS = Path(__file__).parent / "results"
CONSTANTS = (
    "budget.DECAY",
    "budget.IDLE_DECAY",
    "budget.PRIOR_WEIGHT",
    "budgeting.ledger.PATIENCE",
    "budgeting.ledger.LONGEST_PAUSE",
    "budgeting.ledger.TRIAL_SHARE",
    "budgeting.pass_times.DRIFT",
    "budgeting.pass_times.CLIP",
    "budgeting.pass_times.LEAST_RATE",
    "budgeting.pass_times.FIRST_LENGTH",
    "drafting.RANKED_NODES",
    "drafters.merging.known.RATE",
    "drafters.merging.known.CLIP",
    "drafters.merging.known.IDLE_DECAY",
    "drafters.merging.session.UNKNOWN_SCORE",
    "drafters.merging.session.MOST_CONTINUED",
)
"""Each is halved and doubled. Those that compiled kernels read cannot be changed by themselves."""
LEARNED = (
    ("budget", "LEARNED"),
    ("budgeting.profiles", "LEARNED"),
    ("budgeting.pass_times", "TIMES"),
    ("budgeting.profiles", "TIMES"),
    ("drafters.merging.known", "_KNOWN"),
)
"""Where the package keeps what runs with a model have taught it."""

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, add_completion=False)


@dataclass(frozen=True)
class Ablation:
    """One change.

    Args:
        name: What is changed.
        patch: Makes the change and takes it back.
        drafter: Makes what is measured.
        fixed: Whether all that is proposed is verified.
        arguments: Of `accelerate`.
    """

    name: str
    patch: Callable[[], AbstractContextManager[Any]] = nullcontext
    drafter: Callable[[], Any] = AutoDrafter
    fixed: bool = False
    arguments: tuple[tuple[str, Any], ...] = ()


def changed(path: str, name: str, value: Any) -> Callable[[], AbstractContextManager[Any]]:
    """Gives a name of a module, or of a class in it, another value."""
    module, _, kind = path.partition(":")
    owner = importlib.import_module(f"specdec.{module}")
    return partial(mock_patch.object, getattr(owner, kind) if kind else owner, name, value)


def ablations() -> Iterator[Ablation]:
    """All changes: features first, then constants."""
    yield Ablation("A again")
    yield Ablation("drafting off", drafter=lambda: None)
    for source in ("lookahead", "recycling", "medusa"):
        yield Ablation(f"{source} alone", drafter=partial(str, source))
    yield Ablation("budget fixed", fixed=True)
    yield Ablation("deterministic", arguments=(("deterministic", True),))
    yield Ablation("pauses", changed("budgeting.ledger:Backoff", "skips", lambda self: False))
    yield Ablation("asking by worth", changed("drafters.merging.known:SourceWorth", "skips", lambda self: False))
    yield Ablation("chaining", drafter=lambda: AutoDrafter(chained=False))
    yield Ablation("counts of merged nodes", drafter=lambda: AutoDrafter(prior_weight=1e9))
    for key in CONSTANTS:
        path, name = key.rsplit(".", 1)
        usual = getattr(importlib.import_module(f"specdec.{path}"), name)
        half, double = usual / 2, usual * 2
        if 0.9 < usual < 1.0:  # a decay: its memory is halved and doubled
            half, double = 1 - 2 * (1 - usual), 1 - (1 - usual) / 2
        for how, value in (("half", half), ("double", double)):
            yield Ablation(f"{key} {how}", changed(path, name, type(usual)(value)))


@contextmanager
def in_use(memory: dict[str, WeakKeyDictionary[Any, Any]]) -> Iterator[None]:
    """Lets a setting learn and know apart from others."""
    with ExitStack() as changes:
        for path, name in LEARNED:
            changes.enter_context(changed(path, name, memory.setdefault(name, WeakKeyDictionary()))())
        yield


def run_once(
    model: Any, entry: Ablation, memory: dict[str, Any], prompt: torch.Tensor, tokens: int
) -> tuple[float, float, torch.Tensor]:
    """Seconds per token, tokens per pass and the output of a run."""
    with entry.patch(), in_use(memory):
        budget = Budget(64, fixed=entry.fixed)
        fast = accelerate(model, entry.drafter(), budget=budget, strict=True, **dict(entry.arguments))
        started = time.perf_counter()
        output = fast.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False)
        seconds = time.perf_counter() - started
    return seconds / fast.report.num_generated_tokens, fast.report.tokens_per_pass, output


def measure(model: Any, entry: Ablation, prompts: Sequence[torch.Tensor], tokens: int, rounds: int) -> dict[str, Any]:
    """A B A B on each prompt, or B A B A on every other one."""
    sides: list[tuple[Ablation, dict[str, Any]]] = [(Ablation("A"), {}), (entry, {})]
    ratios, passes, identical = [], [], 0
    for side in sides:
        run_once(model, *side, prompts[0], tokens)
    for number, prompt in enumerate(prompts):
        turn = -1 if number % 2 else 1
        runs = [[run_once(model, *side, prompt, tokens) for side in sides[::turn]][::turn] for _ in range(rounds)]
        ratios.append(median(b[0] for _, b in runs) / median(a[0] for a, _ in runs))
        passes.append((median(a[1] for a, _ in runs), median(b[1] for _, b in runs)))
        identical += torch.equal(runs[0][0][2], runs[0][1][2])
    return {
        "name": entry.name,
        "ratio": median(ratios),
        "ratio_quartiles": spread(ratios),
        "tokens_per_pass": median(a for a, _ in passes),
        "tokens_per_pass_changed": median(b for _, b in passes),
        "num_identical": identical,
        "num_prompts": len(prompts),
    }


def prompts_of(file: Path, tokenizer: Any, limit: int) -> list[torch.Tensor]:
    """Token ids of the tuning prompts of a JSONL file, spread over it."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    chosen = spread_over([line for line in lines if line.get("split", "tuning") == "tuning"], limit)
    chats = [line.get("messages") or [{"role": "user", "content": line["prompt"]}] for line in chosen]
    if not tokenizer.chat_template:
        return [tokenizer(messages[-1]["content"], return_tensors="pt").input_ids for messages in chats]
    kwargs = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return [tokenizer.apply_chat_template(messages, **kwargs).input_ids for messages in chats]


@app.command(help=__doc__)
def main(
    prompts: Annotated[Path, typer.Option(help="JSONL with messages or prompt, split or not.")],
    model: Annotated[str, typer.Option(help="A name that specdec bench takes, or a folder.")] = "smollm2",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    only: Annotated[str, typer.Option(help="Names with commas between, or how they begin.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="Prompts, spread over the file.")] = 12,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens generated.")] = 96,
    rounds: Annotated[int, typer.Option(min=1, help="A B pairs per prompt.")] = 2,
    output: Annotated[Path, typer.Option(help="JSON file; the part of this dtype is replaced.")] = RESULTS
    / "ablation.json",
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch.")] = None,
) -> None:
    """Measures entries, prints them, and writes each as it ends."""
    console = Console()
    prepare_torch(threads)
    starts = tuple(name.strip() for name in only.split(",") if name.strip()) or ("",)
    chosen = [entry for entry in ablations() if entry.name.startswith(starts)]
    if not chosen:
        raise typer.BadParameter(f"--only {only}: no entry begins so; see ablations() for the names")
    known = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    target, tokenizer = load_model(model, dtype, "cpu")
    asked, rows = prompts_of(prompts, tokenizer, limit), []
    settings = {"limit": limit, "tokens": tokens, "rounds": rounds, "prompts": prompts.name}
    table = Table("entry", "ratio", "quartiles", "tokens/pass", title=f"{Path(model).name}, {dtype}: without / with")
    for entry in chosen:
        row = measure(target, entry, asked, tokens, rounds)
        rows.append(row)
        low, high = row["ratio_quartiles"]
        passes = f"{row['tokens_per_pass']:.2f} → {row['tokens_per_pass_changed']:.2f}"
        table.add_row(entry.name, f"{row['ratio']:.3f}", f"{low:.3f}–{high:.3f}", passes)
        info = model_info(Path(model).name, target)
        known[dtype] = {**circumstances(), "model": info, "settings": settings, "rows": rows}
        write_json(output, known)
    console.print(table)


if __name__ == "__main__":
    app()
