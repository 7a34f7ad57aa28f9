"""Measures what each feature and each tuned constant of drafting is worth: without it against with it, in turn.

    python benchmarks/ablation.py --prompts prompts.jsonl --limit 2 --only budget.DECAY
    python benchmarks/ablation.py --prompts prompts.jsonl --model smollm2 --dtype bfloat16 --dtype float32

On each prompt the unchanged setting (A) and the changed one (B) run in turn, A B A B, each with what its own runs have
learned. The ratio is B's seconds per token over A's: above 1, the feature or value is worth keeping. A constant is
switched off where a value does that, and halved and doubled. `NOT_SWITCHED` says which constants cannot be changed by
themselves, and why. The entry `A again` changes nothing and shows how far from 1 noise alone goes. Entries that the
file of results has are not run again, unless model, settings, hardware, versions or commit differ.
"""

from __future__ import annotations

import importlib
import inspect
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
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
from specdec.drafters import AutoDrafter, DraftModelDrafter

RESULTS = Path(__file__).parent / "results"
MODULES = (
    "budget",
    "budgeting.ledger",
    "budgeting.pass_times",
    "passes.near_ties",
    "drafting",
    "drafters.merging.call",
    "drafters.merging.chain",
    "drafters.merging.growth",
    "drafters.merging.known",
    "drafters.merging.worth",
    "drafters.merged",
    "drafters.ngrams.trie_growth",
    "drafters.lookahead",
    "drafters.small_model.calibration",
    "drafters.small_model.growth",
    "drafters.auto",
    "drafters.recycling",
)
"""Whose numeric constants are in `ABLATIONS` or in `NOT_SWITCHED`."""
FROZEN = "sizes the arrays of compiled kernels, or is built into them"
NOT_SWITCHED = {
    "budgeting.pass_times.TRIALS": "generation times no size by trial passes",
    "budgeting.ledger.SCORE_BINS": FROZEN,
    "drafters.merging.growth.DEPTH_CLASSES": FROZEN,
    "drafters.merging.growth.SCORE_BINS": FROZEN,
    "drafters.merging.growth.MOST_SURE": FROZEN,
    "drafters.merging.growth.LEAST_COUNTED": FROZEN,
    "drafters.small_model.calibration.PROB_CLASSES": FROZEN,
    "drafters.small_model.calibration.RANK_CLASSES": FROZEN,
    "drafters.small_model.calibration.MAX_DEPTH": FROZEN,
    "drafters.recycling.DEPTH_CLASSES": FROZEN,
    "drafters.recycling.LEAST_LIKELY": FROZEN,
    "drafters.merged.MAX_SOURCES": "a limit that no run reaches",
    "drafters.lookahead.SOURCES": FROZEN,
    "drafters.lookahead.PEERS": FROZEN,
    "drafters.lookahead.MIN_BYTES": "a limit of memory that no run reaches",
    "drafters.lookahead.MAX_SLOTS": "a limit of memory that no run reaches",
}
DEFAULTS = {
    "drafters.merging.worth.DEAR_SHARE": ("drafters.merging.worth", "Worth.is_dear", "share"),
    "budgeting.ledger.FIRST_CREDIT": ("budgeting.ledger", "Standing.__init__", "credit"),
    "budgeting.ledger.FIRST_SHORTENING": ("budgeting.ledger", "Standing.__init__", "shortening"),
}
"""Constants that are a parameter's default too, which holds the value from when the function was made."""
IMPORTED = {
    "drafters.merging.worth.HEAVY_SHARE": ("drafters.merged",),
    "drafters.merging.chain.MOST_NODES": ("drafters.merged",),
}
"""Modules that hold a constant under its name too."""
OFF: dict[str, float] = {
    "budget.DECAY": 1.0,
    "budget.IDLE_DECAY": 1.0,
    "budget.PRIOR_WEIGHT": 1e-6,
    "budget.LEAST_PROMISE": 1.0,
    "budget.TRUST_DECAY": 1.0,
    "budget.MOST_STALL": 1e9,
    "budget.PLAIN_STEPS_PER_LOOK": 1,
    "budgeting.ledger.PATIENCE": 1,
    "budgeting.ledger.MOST_LOST": 0.0,
    "budgeting.ledger.FIRST_CREDIT": 0.0,
    "budgeting.ledger.MOST_CREDIT": 1e9,
    "budgeting.ledger.MOST_DEBT": 0.0,
    "budgeting.ledger.DEBT_KEPT": 1.0,
    "budgeting.ledger.DEBT_MARGIN": 0.0,
    "budgeting.ledger.LEAST_TRUST": 1.0,
    "budgeting.ledger.MOST_TRUST": 1.0,
    "budgeting.ledger.TRUST_PRIOR": 1e9,
    "budgeting.ledger.FORGIVEN": 0.0,
    "budgeting.ledger.TRIAL_SHARE": 1e9,
    "budgeting.ledger.LONGEST_REST": 0,
    "budgeting.ledger.FIRST_RESTS": 0,
    "budgeting.ledger.LEAST_SHORTENING": 1e9,
    "budgeting.ledger.SHORTENING_RATE": 0.0,
    "budgeting.ledger.FIRST_SHORTENING": 1.0,
    "budgeting.ledger.SHORTENING_DOUBT": 0.0,
    "budgeting.pass_times.DRIFT": 0.0,
    "budgeting.pass_times.UPDATES_PER_LOOK": 1,
    "budgeting.pass_times.CLIP": 1e9,
    "budgeting.pass_times.LEAST_RATE": 0.0,
    "budgeting.pass_times.FIRST_LENGTH": 2**30,
    "drafting.RANKED_NODES": 1,
    "drafting.MOST_RESTED": 0,
    "drafters.merging.chain.LEAST_LIKELY": 0.0,
    "drafters.merging.chain.MOST_NODES": 64,
    "drafters.merging.known.FEW_CALLS": 0,
    "drafters.merging.known.MANY_CALLS": 2**30,
    "drafters.merging.worth.DEAR_SHARE": 1e9,
    "drafters.merging.worth.HEAVY_SHARE": 1e9,
    "drafters.merging.worth.FIRST_WORTH": 0.0,
    "drafters.merging.worth.LEARNING_RATE": 0.0,
    "drafters.merging.worth.FIRST_STANDING": 0.0,
    "drafters.merging.worth.STANDING_RATE": 0.0,
    "drafters.merging.worth.STANDING_SHARE": 0.0,
    "drafters.merging.worth.IDLE_DECAY": 1.0,
    "drafters.merging.worth.TRIAL_SHARE": 0.0,
    "drafters.merging.worth.CHAIN_TRIAL_SHARE": 0.0,
    "drafters.merging.worth.STEPS": 1,
    "drafters.merged.UNKNOWN_SCORE": 1.0,
    "drafters.lookahead.FIRST_SLOTS": 2**16,
    "drafters.small_model.calibration.FIRST_HIT_RATE": 1.0,
    "drafters.small_model.calibration.RECENT_LEVELS": 1,
}
"""Constants, and the value that takes each out of play: no decay, no margin, no limit, no rest."""
SETTINGS: dict[str, tuple[tuple[str, float | int | bool], ...]] = {
    "drafters.auto.AutoDrafter": (("prior_weight", 0.01), ("memory", 1e9), ("chained", False)),
    "drafters.lookahead.LookaheadDrafter": (
        ("max_nodes", 16),
        ("max_depth", 16),
        ("max_match", 8),
        ("max_hits", 4),
        ("growth", 1.0),
        ("full_match", 1),
        ("recency", 1.0),
        ("discount", 0.0),
        ("smoothing", 0.01),
        ("shared_weight", 1.0),
        ("share_outputs", False),
    ),
    "drafters.recycling.RecyclingDrafter": (
        ("max_nodes", 16),
        ("max_depth", 4),
        ("top_k", 4),
        ("last_list", False),
        ("prior_weight", 0.01),
        ("memory", 1e9),
    ),
    "drafters.medusa.MedusaDrafter": (
        ("dynamic", False),
        ("top_k", 5),
        ("prior_weight", 0.01),
        ("memory", 1e9),
    ),
}
"""Settings of drafters, and the value without the feature."""
DRAFT_SETTINGS: tuple[tuple[str, Any], ...] = (
    ("growth", "chain"),
    ("top_k", 3),
    ("beam", 4),
    ("coupled", False),
    ("min_confidence", 0.0),
    ("prior_weight", 0.01),
    ("memory", 1e9),
)
LEARNED = (
    ("budgeting.ledger", "LEARNED"),
    ("budget", "LEARNED"),
    ("budgeting.pass_times", "TIMES"),
    ("drafters.merging.known", "_KNOWN"),
)
"""Where the package keeps what runs with a model have taught it."""
AUTO, DRAFT = "auto", "draft"

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, add_completion=False)


@dataclass(frozen=True)
class Ablation:
    """One change.

    Args:
        name: What is changed, and to what.
        what: What the change takes away.
        patch: Makes the change and takes it back.
        on: The drafter that it is measured with.
        arguments: Of `accelerate`, for what is no constant.
    """

    name: str
    what: str
    patch: Callable[[], AbstractContextManager[Any]]
    on: str = AUTO
    arguments: tuple[tuple[str, Any], ...] = ()


def module_of(name: str) -> Any:
    """A module of the package."""
    return importlib.import_module(f"specdec.{name}")


@contextmanager
def default_changed(path: str, function: str, parameter: str, value: Any) -> Iterator[None]:
    """Changes the default of a parameter."""
    owner: Any = module_of(path)
    for part in function.split("."):
        owner = getattr(owner, part)
    signature = inspect.signature(owner)
    with_default = [p for p in signature.parameters.values() if p.default is not p.empty]
    keyword = signature.parameters[parameter].kind is inspect.Parameter.KEYWORD_ONLY
    if keyword:
        changed: Any = {**owner.__kwdefaults__, parameter: value}
    else:
        positional = [p for p in with_default if p.kind is not p.KEYWORD_ONLY]
        changed = tuple(value if p.name == parameter else p.default for p in positional)
        if len(owner.__defaults__) != len(positional):
            raise ValueError(f"{function} has other defaults than its signature says")
    with mock_patch.object(owner, "__kwdefaults__" if keyword else "__defaults__", changed):
        yield


@contextmanager
def constant_changed(key: str, value: Any) -> Iterator[None]:
    """Changes a module's constant wherever it is held."""
    path, name = key.rsplit(".", 1)
    with ExitStack() as changes:
        for holder in (path, *IMPORTED.get(key, ())):
            changes.enter_context(mock_patch.object(module_of(holder), name, value))
        if key in DEFAULTS:
            changes.enter_context(default_changed(*DEFAULTS[key], value))
        yield


def constant_entries() -> Iterator[Ablation]:
    """Each constant out of play, halved and doubled."""
    for key, off in OFF.items():
        path, name = key.rsplit(".", 1)
        usual = getattr(module_of(path), name, None)
        if usual is None:  # it is gone, which the test of this table tells
            continue
        kind = type(usual)
        values = {"off": off, "half": kind(usual * 0.5), "double": kind(usual * 2)}
        if usual > 0.9 and usual < 1.0:  # a decay: its memory is halved and doubled
            values |= {"half": 1.0 - 2.0 * (1.0 - usual), "double": 1.0 - 0.5 * (1.0 - usual)}
        on = DRAFT if path == "drafters.small_model.calibration" else AUTO
        for how, value in values.items():
            if how == "off" or (value != usual and value != off and value > 0):
                yield Ablation(
                    f"{key} {how}", f"{usual} becomes {value}", lambda k=key, v=value: constant_changed(k, v), on
                )


def setting_entries() -> Iterator[Ablation]:
    """Each setting of a drafter without its feature."""
    chosen = [(path, name, value, AUTO) for path, pairs in SETTINGS.items() for name, value in pairs]
    chosen += [("drafters.draft_model.DraftModelDrafter", name, value, DRAFT) for name, value in DRAFT_SETTINGS]
    for path, name, value, on in chosen:
        module, kind = path.rsplit(".", 1)
        yield Ablation(
            f"{kind}.{name}={value}",
            f"the setting {name} becomes {value}",
            lambda m=module, k=kind, n=name, v=value: default_changed(m, f"{k}.__init__", n, v),
            on,
        )


@contextmanager
def nothing_changed() -> Iterator[None]:
    """For what `accelerate` is asked for."""
    yield


def method_changed(path: str, kind: str, name: str, result: Any) -> Callable[[], AbstractContextManager[Any]]:
    """Makes a method or property return the same thing always."""

    def change() -> AbstractContextManager[Any]:
        owner = getattr(module_of(path), kind)
        is_property = isinstance(inspect.getattr_static(owner, name), property)
        made = property(lambda self: result) if is_property else lambda self, *args, **kwargs: result
        return mock_patch.object(owner, name, made)

    return change


def feature_entries() -> Iterator[Ablation]:
    """Features that are no single constant."""
    yield Ablation("A again", "nothing: what the figures are good to", nothing_changed)
    yield Ablation("drafting off", "all drafts", nothing_changed, "none")
    for source in ("lookahead", "recycling", "medusa"):
        yield Ablation(f"{source} alone", "the other sources, and merging", nothing_changed, source)
    yield Ablation("budget fixed", "the choice of the size: 64 nodes always", nothing_changed, "fixed")
    yield Ablation("deterministic", "choices by the clock", nothing_changed, AUTO, (("deterministic", True),))
    yield Ablation("passes.compiled", "adds compiled passes", nothing_changed, AUTO, (("passes.compiled", True),))
    yield Ablation(
        "rests", "resting while drafting does not pay", method_changed("budgeting.ledger", "Standing", "lose", None)
    )
    yield Ablation(
        "margin", "the margin that debts ask for", method_changed("budgeting.ledger", "Standing", "margin", 1.0)
    )
    yield Ablation("trust", "the factor of kept promises", method_changed("budgeting.ledger", "Learned", "trust", 1.0))
    worth = "drafters.merging.worth"
    yield Ablation("asking by worth", "every source is asked", method_changed(worth, "Worth", "is_asked", True))
    yield Ablation("chain by worth", "chaining always", method_changed(worth, "Worth", "pays", True))
    yield Ablation("idle sources", "no source sits calls out", method_changed(worth, "Worth", "idle_among", set()))


ABLATIONS: tuple[Ablation, ...] = (*feature_entries(), *setting_entries(), *constant_entries())


def drafter_of(on: str) -> Any:
    """What is measured."""
    kinds = {AUTO: AutoDrafter, "fixed": AutoDrafter, DRAFT: lambda: DraftModelDrafter("self"), "none": lambda: None}
    return kinds[on]() if on in kinds else on


class Memory:
    """What one setting's runs have taught, apart from what the other one's have."""

    def __init__(self) -> None:
        made: dict[str, WeakKeyDictionary[Any, Any]] = {}
        self.kept = [(path, name, made.setdefault(name, WeakKeyDictionary())) for path, name in LEARNED]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        with ExitStack() as changes:
            for path, name, value in self.kept:
                changes.enter_context(mock_patch.object(module_of(path), name, value))
            yield


def run_once(
    model: Any, entry: Ablation, memory: Memory, prompt: torch.Tensor, tokens: int
) -> tuple[float, float, torch.Tensor]:
    """Seconds per token, tokens per pass and the output of a run."""
    with entry.patch(), memory.in_use():
        budget = Budget(64, fixed=entry.on == "fixed")
        fast = accelerate(model, drafter_of(entry.on), budget=budget, strict=True, **dict(entry.arguments))
        started = time.perf_counter()
        output = fast.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False)
        seconds = time.perf_counter() - started
    report = fast.report
    return (
        seconds / report.num_generated_tokens,
        report.num_generated_tokens / max(report.num_row_passes, 1),
        output,
    )


def measure(model: Any, entry: Ablation, prompts: Sequence[torch.Tensor], tokens: int, rounds: int) -> dict[str, Any]:
    """A B A B on each prompt, or B A B A on every other one."""
    usual = Ablation("A", "", nothing_changed, DRAFT if entry.on == DRAFT else AUTO)
    sides = [(usual, Memory()), (entry, Memory())]
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
        "what": entry.what,
        "ratio": median(ratios),
        "ratio_quartiles": spread(ratios),
        "tokens_per_pass": median(a for a, _ in passes),
        "tokens_per_pass_changed": median(b for _, b in passes),
        "num_identical": identical,
        "num_prompts": len(prompts),
    }


def prompts_of(file: Path, tokenizer: Any, limit: int) -> list[torch.Tensor]:
    """Token ids of the chats of a JSONL file, spread over it."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    lines = [line for line in lines if line.get("half", line.get("split", "tuning")) == "tuning"]
    made = []
    for line in spread_over(lines, limit):
        messages = line.get("messages") or [{"role": "user", "content": line["prompt"]}]
        if tokenizer.chat_template:
            kwargs = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
            made.append(tokenizer.apply_chat_template(messages, **kwargs).input_ids)
        else:
            made.append(tokenizer(messages[-1]["content"], return_tensors="pt").input_ids)
    return made


def table_of(rows: Sequence[dict[str, Any]], title: str) -> Table:
    out = Table("entry", "what is changed", "ratio", "quartiles", "tokens/pass", "identical", title=title)
    for row in sorted(rows, key=lambda row: -row.get("ratio", 0.0)):
        if "failed" in row:
            out.add_row(row["name"], row["what"], "–", row["failed"], "", "")
            continue
        low, high = row["ratio_quartiles"]
        passes = f"{row['tokens_per_pass']:.2f} → {row['tokens_per_pass_changed']:.2f}"
        same = f"{row['num_identical']} of {row['num_prompts']}"
        out.add_row(row["name"], row["what"], f"{row['ratio']:.3f}", f"{low:.3f}–{high:.3f}", passes, same)
    return out


@app.command(help=__doc__)
def main(
    prompts: Annotated[Path, typer.Option(help="JSONL with messages or prompt; of lines with a half, the tuning one.")],
    model: Annotated[str, typer.Option(help="A name that specdec bench takes, or a folder.")] = "smollm2",
    dtype: Annotated[list[str] | None, typer.Option(help="May be repeated. Default: bfloat16 and float32.")] = None,
    only: Annotated[str, typer.Option(help="Names with commas between, or how they begin.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="Prompts, spread over the file.")] = 12,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens generated.")] = 96,
    rounds: Annotated[int, typer.Option(min=1, help="A B pairs per prompt.")] = 2,
    output: Annotated[Path, typer.Option(help="JSON file; entries in it are not run again.")] = RESULTS
    / "ablation.json",
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch.")] = None,
) -> None:
    """Measures entries, prints them, and writes each as it ends."""
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    prepare_torch(threads)
    starts = tuple(name.strip() for name in only.split(",") if name.strip())
    chosen = [entry for entry in ABLATIONS if not starts or entry.name.startswith(starts)]
    if not chosen:
        raise typer.BadParameter(f"--only {only} is how no entry begins; see --help and ABLATIONS for the names")
    settings = {"limit": limit, "tokens": tokens, "rounds": rounds, "prompts": prompts.name}
    known = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    for kind in dtype or ["bfloat16", "float32"]:
        target, tokenizer = load_model(model, kind, "cpu")
        asked = prompts_of(prompts, tokenizer, limit)
        here = {**circumstances(), "model": model_info(Path(model).name, target), "settings": settings}
        part = known.get(kind, {})
        same = all(part.get(key) == here[key] for key in ("model", "settings", "versions", "hardware", "commit"))
        part = part if same else {**here, "rows": []}
        known[kind] = part
        ahead = [entry for entry in chosen if entry.name not in {row["name"] for row in part["rows"]}]
        if ahead:
            started = time.perf_counter()
            run_once(target, Ablation("A", "", nothing_changed), Memory(), asked[0], tokens)
            runs = len(ahead) * (2 + 2 * rounds * len(asked))
            minutes = runs * (time.perf_counter() - started) / 60
            console.print(f"{kind}: {len(ahead)} entries, {runs} runs, about {minutes:.0f} minutes")
        for entry in ahead:
            try:
                row = measure(target, entry, asked, tokens, rounds)
            except Exception as error:  # such as a source that the model has no heads for
                row = {"name": entry.name, "what": entry.what, "failed": f"{type(error).__name__}: {error}"[:200]}
            part["rows"].append(row)
            write_json(output, known)
        console.print(table_of(part["rows"], f"{Path(model).name}, {kind}: seconds per token without / with"))


if __name__ == "__main__":
    app()
