"""Trains the pair of the reasoning test bed: a target that reasons and judges, and a draft that reasons.

Run the commands in this order; nothing is downloaded, and all that passes between them lies in the folder --work:

    tokenizer, train draft, chains, train base, grow, train solver, grow target, train target, export

The README has them with their settings.
"""

from __future__ import annotations

import json
import os
import random

os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path
from typing import Annotated

import chains
import learn
import packing
import scoring
import solving
import torch
import typer
from learn import SHAPES, Run, Settings
from rich.console import Console
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

WORK = Path("/tmp/reasoning")
MODELS = Path(__file__).parent / "models"
SHIPPED = ("target", "draft")
WorkOption = Annotated[Path, typer.Option(help="Folder of the tokenizer, the checkpoints and the draft's chains.")]
GROWN_FROM = {"solver": "base", "target": "solver"}
WINDOWS = {"base": 320, "solver": 384, "target": 384, "draft": 320}
TOKENS = {"base": 5_000_000, "solver": 8_700_000, "target": 12_000_000, "draft": 4_000_000}
BATCHES = {"base": 16, "solver": 8, "target": 8, "draft": 16}
FROZEN = 2
"""Of the target's layers, those in which it solves the problems: they are the base's, and stay as the solver's."""

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)


def check_model(which: str) -> None:
    if which not in SHAPES:
        raise typer.BadParameter(f"{which!r} is not a model; choose one of {', '.join(SHAPES)}")


@app.command("tokenizer")
def tokenizer_command(work: WorkOption = WORK) -> None:
    """Train the tokenizer on examples of the task."""
    tokenizer = chains.make_tokenizer(work / "tokenizer")
    print(f"{len(tokenizer)} tokens in {work / 'tokenizer'}")


@app.command("train")
def train_command(
    which: Annotated[str, typer.Argument(help="base, solver, target or draft.")],
    work: WorkOption = WORK,
    tokens: Annotated[int | None, typer.Option(help="Training tokens in all, padding included.")] = None,
    decay_share: Annotated[float, typer.Option(help="Share of the tokens over which the learning rate falls.")] = 0.4,
    muon_lr: Annotated[float, typer.Option(help="Learning rate of the hidden matrices.")] = 6e-3,
    adam_lr: Annotated[float, typer.Option(help="Learning rate of the embedding and the norms.")] = 3e-3,
    by_draft: Annotated[float, typer.Option(help="Solver, target: share of chains that the draft wrote.")] = 0.3,
    wrong_chains: Annotated[float, typer.Option(help="Solver, target: share of the others with wrong steps.")] = 0.6,
    wrong: Annotated[float, typer.Option(help="Solver, target: share of the steps in these that are wrong.")] = 0.4,
    judge_weight: Annotated[float, typer.Option(help="Target: weight of a score in the loss.")] = 1.0,
    keep_weight: Annotated[float, typer.Option(help="Target: weight of what keeps it by the solver's words.")] = 1.0,
    short: Annotated[float, typer.Option(help="Solver, target: share of the steps that are in short.")] = 0.3,
    window: Annotated[int | None, typer.Option(help="Tokens of a row.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of a step.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and of the examples.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the model; needs a C++ compiler.")] = False,
) -> None:
    """Train a model. Ctrl-C saves and stops; the same command goes on from there."""
    check_model(which)
    torch.set_num_threads(threads)
    total = tokens or TOKENS[which]
    settings = Settings(
        tokens=total,
        decay_tokens=int(total * decay_share),
        batch=batch or BATCHES[which],
        window=window or WINDOWS[which],
        muon_lr=muon_lr,
        adam_lr=adam_lr,
        seed=seed,
        save_every=100,
        eval_every=200,
        mixture=chains.Mixture(by_draft, wrong_chains, wrong, which == "target", short),
        judge_weight=judge_weight,
        keep_weight=keep_weight,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    writer = chains.Writer(tokenizer, chains.read_chains(work / "chains.jsonl"), settings.mixture)
    run = Run.fresh(SHAPES[which], len(tokenizer), settings, device)
    teacher = None
    if which == "target":
        learn.learns_to_judge(run, FROZEN)
        teacher = load_checkpoint(work / GROWN_FROM[which]).requires_grad_(False).to(device)
    print(f"{which}: {run.model.num_parameters():,} parameters on {device}, {settings}", flush=True)
    learn.learn(run, writer, which, settings, work / which, compiled, teacher)


@app.command("grow")
def grow_command(
    which: Annotated[str, typer.Argument(help="solver or target.")],
    work: WorkOption = WORK,
) -> None:
    """Make a first checkpoint out of another model: the solver's, with layers that do nothing yet, or the target's."""
    if which not in GROWN_FROM:
        raise typer.BadParameter(f"{which!r} does not grow out of another; choose one of {', '.join(GROWN_FROM)}")
    state = torch.load(work / GROWN_FROM[which] / "checkpoint.pt", weights_only=True, map_location="cpu")
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    run = Run.fresh(SHAPES[which], len(tokenizer), Settings())
    run.model.load_state_dict(state["model"], strict=False)
    for layer in run.model.model.layers[state["config"]["num_hidden_layers"] :]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    if which == "target":
        learn.learns_to_judge(run, FROZEN)
    run.tokens, run.phases = state["tokens"], state["phases"]
    run.step = run.optimizers_from = state["step"]
    run.save(work / which / "checkpoint.pt")
    print(f"{run.model.num_parameters():,} parameters, {run.model.config.num_hidden_layers} layers")


def load_checkpoint(folder: Path) -> LlamaForCausalLM:
    """The model in training in `folder`, with the weights that an export would hold."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")
    model = LlamaForCausalLM(LlamaConfig.from_dict(state["config"]))
    model.load_state_dict({name: value for name, value in state["model"].items() if not name.startswith("hints.")})
    return model.bfloat16().float().eval()


@app.command("chains")
def chains_command(
    work: WorkOption = WORK,
    count: Annotated[int, typer.Option(help="Problems that the draft writes to.")] = 2000,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Let the trained draft write chains, so that the target learns to judge what the draft really gets wrong."""
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    rng = random.Random("chains 0")
    problems = [chains.training_problem(rng) for _ in range(count)]
    written = list(solving.draft_chains(load_checkpoint(work / "draft"), tokenizer, problems))
    (work / "chains.jsonl").write_text("".join(json.dumps(chain) + "\n" for chain in written))
    print(f"{len(written)} chains in {work / 'chains.jsonl'}")


@app.command("evaluate")
def evaluate_command(
    which: Annotated[str, typer.Argument(help="base, solver, target or draft.")],
    work: WorkOption = WORK,
    count: Annotated[int, typer.Option(help="Held-out problems.")] = 200,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Print the share of held-out problems that a checkpoint solves."""
    check_model(which)
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    share = solving.accuracy(load_checkpoint(work / which), tokenizer, chains.problems(count))
    print(f"{which}: {share:.1%} of {count} problems")


@app.command("judge")
def judge_command(
    models: Annotated[Path, typer.Option(help="Folder of target/ and draft/.")] = MODELS,
    first: Annotated[int, typer.Option(help="Number of the first held-out problem.")] = 200,
    count: Annotated[int, typer.Option(help="Held-out problems that the draft writes to.")] = 200,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Print how well each judge tells the draft's right steps from its wrong ones."""
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(models / "target")
    target, draft = (LlamaForCausalLM.from_pretrained(models / name).eval() for name in SHIPPED)
    written = solving.draft_chains(draft, tokenizer, list(chains.problems(count, first)))
    steps = list(scoring.judged_steps(target, chains.Writer(tokenizer), written))
    wrong = sum(points != scoring.RIGHT for points, _ in steps)
    title = f"{len(steps)} steps of the draft, {wrong} of them wrong, problems {first} to {first + count - 1}"
    Console().print(scoring.table(scoring.figures_of(steps, scoring.judges_of(tokenizer)), title))


@app.command("export")
def export_command(
    models: Annotated[list[str] | None, typer.Argument(help="Which models; both by default.")] = None,
    work: WorkOption = WORK,
    out: Annotated[Path, typer.Option(help="Folder for target/ and draft/.")] = MODELS,
    count: Annotated[int, typer.Option(help="Held-out problems that the card's accuracy is measured on.")] = 200,
) -> None:
    """Write weights, tokenizer and model card of the trained models."""
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    for which in models or SHIPPED:
        check_model(which)
        state = torch.load(work / which / "checkpoint.pt", weights_only=True, map_location="cpu")
        model = load_checkpoint(work / which)
        share = solving.accuracy(model, tokenizer, chains.problems(count))
        packing.write(which, model, tokenizer, state, share, count, out / which)
        print(f"{which}: {state['tokens']:,} tokens, {share:.1%} of {count} problems, written to {out / which}")


if __name__ == "__main__":
    app()
