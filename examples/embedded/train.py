"""Trains the two small models that specdec ships, on the standard library of the running Python.

Run the commands in this order; nothing is downloaded, and all that passes between them lies in
the folder --work:

    corpus, tokenizer, train target, export target, answers, train draft, export draft

A second draft model, whose tokenizer is another one, is trained with

    tokenizer other-draft, train other-draft, export other-draft
"""

from __future__ import annotations

import json
import os
import platform

os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path
from typing import Annotated

import answers as answering
import corpus as corpora
import export as exporting
import numpy as np
import torch
import typer
from trainer import SHAPES, Run, Settings, train
from transformers import AutoModelForCausalLM, AutoTokenizer

ASSETS = Path(__file__).parents[2] / "specdec" / "assets" / "embedded"

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
WorkOption = Annotated[Path, typer.Option(help="Folder of the corpus, the tokenizer and the checkpoints.")]
WORK = Path("/tmp/embedded")
SHIPPED = ("target", "draft")
ANSWERED_TOKENS = 64
"""Tokens of a prompt that its answer is written to."""


def check_model(which: str) -> None:
    if which not in SHAPES:
        raise typer.BadParameter(f"{which!r} is not a model; choose one of {', '.join(SHAPES)}")


@app.command("corpus")
def corpus_command(
    work: WorkOption = WORK,
    source: Annotated[
        Path | None, typer.Option(help="Folder of .py files to use in place of the standard library.")
    ] = None,
) -> None:
    """Collect the standard library's source and split it into training and held-out files."""
    work.mkdir(parents=True, exist_ok=True)
    documents = corpora.collect(source)
    for name, held_out in (("train", False), ("heldout", True)):
        chosen = [d for d in documents if corpora.is_held_out(d) == held_out]
        corpora.write_jsonl(chosen, work / f"{name}.jsonl")
        print(f"{name}: {len(chosen)} files, {sum(len(d.text) for d in chosen):,} characters")
    (work / "corpus.json").write_text(json.dumps({"python": platform.python_version()}) + "\n")


@app.command("tokenizer")
def tokenizer_command(
    which: Annotated[str, typer.Argument(help="The model it is for: target, draft (the same) or other-draft.")] = (
        "target"
    ),
    work: WorkOption = WORK,
) -> None:
    """Train the byte-level BPE tokenizer on the training files and encode all files."""
    check_model(which)
    training = corpora.read_jsonl(work / "train.jsonl")
    settings = corpora.OTHER if which == corpora.OTHER_DRAFT else {}
    tokenizer = corpora.train_tokenizer((d.text for d in training), corpora.tokenizer_folder(which, work), **settings)
    for name in ("train", "heldout"):
        documents = corpora.read_jsonl(work / f"{name}.jsonl")
        stream = corpora.encode(documents, tokenizer)
        np.save(corpora.stream_file(name, which, work), stream)
        print(f"{name}: {len(stream):,} tokens")


@app.command("train")
def train_command(
    which: Annotated[str, typer.Argument(help="target, draft or other-draft.")],
    work: WorkOption = WORK,
    tokens: Annotated[
        int,
        typer.Option(help="Training tokens in all. A run that was stopped may be resumed with another number."),
    ] = Settings.tokens,
    decay_tokens: Annotated[
        int, typer.Option(help="The learning rate falls linearly to zero over this many last tokens.")
    ] = Settings.decay_tokens,
    batch: Annotated[int, typer.Option(help="Windows a step.")] = Settings.batch,
    window: Annotated[int, typer.Option(help="Tokens a window.")] = Settings.window,
    muon_lr: Annotated[float, typer.Option(help="Learning rate of the hidden matrices.")] = Settings.muon_lr,
    adam_lr: Annotated[float, typer.Option(help="Learning rate of the embedding and the norms.")] = Settings.adam_lr,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    teacher: Annotated[
        str | None,
        typer.Option(help="Exported model of the same tokenizer, whose distributions are learned instead of the text."),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="Layers, if not the usual ones. With --start-from, new ones begin as the identity."),
    ] = None,
    answers: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Share of the windows from the target's own answers (command answers)."),
    ] = Settings.answers,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Passes in bfloat16: faster on GPUs and on CPUs with AVX512-BF16 or AMX.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the model: 1.5 times as fast, needs a C++ compiler.")
    ] = False,
    start_from: Annotated[
        Path | None,
        typer.Option(help="Exported model to go on from, with new optimizers, unless the checkpoint is further."),
    ] = None,
) -> None:
    """Train a model. Ctrl-C saves and stops; the same command goes on from there."""
    check_model(which)
    torch.set_num_threads(threads)
    settings = Settings(
        tokens=tokens,
        decay_tokens=decay_tokens,
        batch=batch,
        window=window,
        muon_lr=muon_lr,
        adam_lr=adam_lr,
        teacher=teacher,
        layers=layers,
        answers=answers,
        bf16=bf16,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vocab_size = len(AutoTokenizer.from_pretrained(corpora.tokenizer_folder(which, work)))
    shape = SHAPES[which] | ({} if layers is None else {"num_hidden_layers": layers})
    run = Run.fresh(shape, vocab_size, settings, device)
    print(f"{which}: {run.model.num_parameters():,} parameters on {device}, {settings}", flush=True)
    streams = [np.load(corpora.stream_file(name, which, work)) for name in ("train", "heldout")]
    own = np.load(corpora.stream_file("answers", which, work)) if answers else None
    train(run, *streams, settings, work / which, compiled, start_from, own)


@app.command("export")
def export_command(
    models: Annotated[list[str] | None, typer.Argument(help="Which models; target and draft by default.")] = None,
    work: WorkOption = WORK,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for target/, draft/ and heldout.jsonl; the package's, but --work for other-draft."),
    ] = None,
    only_if_better: Annotated[
        bool, typer.Option(help="Leave a model alone whose exported weights have the lower held-out loss.")
    ] = False,
) -> None:
    """Write weights, tokenizer and model card of the trained models, and the held-out prompts."""
    for which in models or SHIPPED:
        check_model(which)
        tokenizer = AutoTokenizer.from_pretrained(corpora.tokenizer_folder(which, work))
        held_out = np.load(corpora.stream_file("heldout", which, work))
        if (work / which / "checkpoint.pt").exists():
            folder = (out or (ASSETS if which in SHIPPED else work / "exported")) / which
            print(exporting.export_model(which, work, folder, tokenizer, held_out, only_if_better))
    if models == [corpora.OTHER_DRAFT]:
        return
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    prompts = exporting.cut_prompts(corpora.read_jsonl(work / "heldout.jsonl"), tokenizer)
    path = (out or ASSETS) / "heldout.jsonl"
    exporting.write_prompts(prompts, path)
    print(f"{len(prompts)} prompts in {path}")


@app.command("prompts")
def prompts_command(
    work: WorkOption = WORK,
    per_file: Annotated[int, typer.Option(min=1, help="Functions and classes of a file at most.")] = 8,
) -> None:
    """Cut prompts out of the training files, for the target to answer: heads are trained on its own answers."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "target")
    prompts = exporting.cut_prompts(corpora.read_jsonl(work / "train.jsonl"), tokenizer, per_file)
    exporting.write_prompts(prompts, work / "prompts.jsonl")
    print(f"{len(prompts)} prompts in {work / 'prompts.jsonl'}")


@app.command("answers")
def answers_command(
    work: WorkOption = WORK,
    per_file: Annotated[int, typer.Option(min=1, help="Functions and classes of a file at most.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per answer.")] = 160,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Let the shipped target continue prompts from the training files, for `train draft --answers`."""
    torch.set_num_threads(threads)
    target = AutoModelForCausalLM.from_pretrained(ASSETS / "target", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "target")
    prompts = exporting.cut_prompts(corpora.read_jsonl(work / "train.jsonl"), tokenizer, per_file)
    ids = answering.prompt_ids([prompt["prompt"] for prompt in prompts], tokenizer, ANSWERED_TOKENS)
    stream = answering.answer(target, ids, tokens)
    np.save(corpora.stream_file("answers", "draft", work), stream)
    print(f"{len(ids)} answers, {len(stream):,} tokens with their prompts")


if __name__ == "__main__":
    app()
