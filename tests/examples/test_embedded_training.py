"""The training of the embedded models: resumable to the bit, exported so that transformers loads it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.examples.scripts import imported

NAMES = ("answers", "corpus", "muon", "trainer", "export", "train")
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
}
FUNCTION = '''def {name}(values, start={start}):
    """Adds the values to the start."""
    total = start
{body}
    return total


'''


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    with imported(["embedded"], NAMES) as modules:
        yield modules


@pytest.fixture(scope="module")
def work(scripts: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the corpus and tokenizer commands have run on fifty small files."""
    folder = tmp_path_factory.mktemp("embedded")
    source = folder / "source"
    source.mkdir()
    for number in range(50):
        body = "\n".join(f"    total += values[{i}] * weight_{number}" for i in range(60))
        text = "".join(FUNCTION.format(name=f"add_{number}_{part}", start=part, body=body) for part in range(2))
        (source / f"module_{number}.py").write_text(text)
    scripts["train"].corpus_command(work=folder, source=source)
    scripts["train"].tokenizer_command(work=folder)
    return folder


def start(scripts: dict[str, ModuleType], work: Path, folder: Path, tokens: int = 12 * 64) -> tuple[Any, bool]:
    """Trains a tiny model in `folder`; returns its run and whether it is complete."""
    trainer = scripts["trainer"]
    settings = trainer.Settings(tokens=tokens, decay_tokens=4 * 64, batch=2, window=32, warmup_steps=2)
    run = trainer.Run.fresh(TINY, len(AutoTokenizer.from_pretrained(work / "tokenizer")), settings)
    streams = (np.load(work / "train.npy"), np.load(work / "heldout.npy"))
    return run, trainer.train(run, *streams, settings, folder)


def test_split_is_disjoint_and_moves_no_file(scripts: dict[str, ModuleType], work: Path) -> None:
    corpus = scripts["corpus"]
    train_paths = {d.path for d in corpus.read_jsonl(work / "train.jsonl")}
    held_out_paths = {d.path for d in corpus.read_jsonl(work / "heldout.jsonl")}
    assert held_out_paths
    assert train_paths.isdisjoint(held_out_paths)
    assert len(train_paths | held_out_paths) == 50


def test_corpus_drops_tables_duplicates_and_foreign_encodings(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    code = "def nothing():\n    return None\n" * 20
    (tmp_path / "kept.py").write_text(code)
    (tmp_path / "same.py").write_text(code)
    (tmp_path / "short.py").write_text("x = 1\n")
    (tmp_path / "table.py").write_text("TABLE = [" + "1234567, " * 100 + "]\n")
    (tmp_path / "latin.py").write_bytes(code.encode() + b"# \xe9\n")
    (tmp_path / "encodings").mkdir()
    (tmp_path / "encodings" / "cp1.py").write_text(code + "#")
    assert [d.path for d in scripts["corpus"].collect(tmp_path)] == ["kept.py"]


def test_tokenizer_joins_newline_and_indentation_and_loses_nothing(work: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    assert tokenizer.padding_side == "left"
    assert tokenizer.model_max_length == 2048
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == ("<|endoftext|>",) * 2 + ("<|pad|>",)
    assert len(tokenizer.encode("\n    ")) == 1
    for text in ("if a :\n\n\treturn , b\r\n  ", "é ∑ 😀 \x00", "x  =  1 . 2 !", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_other_draft_has_a_tokenizer_of_its_own(scripts: dict[str, ModuleType], work: Path) -> None:
    before = (work / "train.npy").read_bytes()
    scripts["train"].tokenizer_command(which="other-draft", work=work)
    one, other = (AutoTokenizer.from_pretrained(work / name) for name in ("tokenizer", "other-tokenizer"))
    text = "def add(values):\n    return total + 12345\n"
    assert one.tokenize(text) != other.tokenize(text)
    assert other.decode(other(text)["input_ids"]) == text
    assert len(other) <= scripts["corpus"].OTHER["vocab_size"]
    assert (work / "train.npy").read_bytes() == before
    assert len(np.load(work / "train-other.npy")) > 0


def test_interrupted_run_ends_with_the_bits_of_an_uninterrupted_one(
    scripts: dict[str, ModuleType], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, complete = start(scripts, work, tmp_path / "whole")
    assert complete

    trainer = scripts["trainer"]
    take_step = trainer.train_step

    def stop_at_five(run, *arguments):
        loss = take_step(run, *arguments)
        if run.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(trainer, "train_step", stop_at_five)
    stopped, complete = start(scripts, work, tmp_path / "stopped")
    assert not complete
    assert stopped.step == 5

    torch.manual_seed(99)
    resumed, complete = start(scripts, work, tmp_path / "stopped")
    assert complete
    assert resumed.losses == whole.losses
    for name, weights in whole.model.state_dict().items():
        assert torch.equal(weights, resumed.model.state_dict()[name]), name


def test_card_commands_repeat_a_run_whose_settings_changed(scripts: dict[str, ModuleType], work: Path) -> None:
    trainer = scripts["trainer"]
    run = trainer.Run.fresh(TINY, 64, trainer.Settings())
    run.begin_phase(trainer.Settings(tokens=40_000, decay_tokens=1000, batch=16), compiled=False)
    run.step, run.tokens = 3, 3000
    run.begin_phase(trainer.Settings(tokens=30_000, decay_tokens=1000, batch=16), compiled=False)
    assert [phase["from_step"] for phase in run.phases] == [0]
    run.begin_phase(trainer.Settings(tokens=6000, decay_tokens=1000, batch=8), compiled=False)
    state = {"phases": run.phases, "tokens": 6000}
    commands = [command.split(" --muon-lr")[0] for command in scripts["export"]._commands("draft", state)]
    start = "python examples/embedded/train.py train draft --tokens"
    assert commands == [
        f"{start} 3000 --decay-tokens 0 --batch 16 --window 256",
        f"{start} 6000 --decay-tokens 1000 --batch 8 --window 256",
    ]


def test_constant_phase_does_not_depend_on_the_total(scripts: dict[str, ModuleType]) -> None:
    settings = scripts["trainer"].Settings
    short, long = settings(tokens=5_000_000), settings(tokens=40_000_000)
    assert [short.scale(step, step * 4096) for step in range(600)] == [
        long.scale(step, step * 4096) for step in range(600)
    ]
    assert short.scale(900, 3_750_000) == 0.5
    assert short.scale(900, 5_000_000) == 0


def test_training_lowers_the_loss(scripts: dict[str, ModuleType], work: Path, tmp_path: Path) -> None:
    run, _ = start(scripts, work, tmp_path / "run", tokens=40 * 64)
    assert np.mean(run.losses[-5:]) < run.losses[0] - 1


def test_orthogonalise_brings_singular_values_near_one(scripts: dict[str, ModuleType]) -> None:
    matrices = torch.randn(3, 48, 16, generator=torch.Generator().manual_seed(0))
    result = scripts["muon"].orthogonalise(matrices)
    assert result.shape == matrices.shape
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_exported_folder_loads_and_is_greedy(scripts: dict[str, ModuleType], work: Path, tmp_path: Path) -> None:
    run, _ = start(scripts, work, work / "draft")
    scripts["train"].export_command(work=work, out=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "draft")
    for name, weights in run.model.state_dict().items():
        assert torch.equal(weights.bfloat16().float(), model.state_dict()[name]), name
    config = model.generation_config
    assert (config.do_sample, config.eos_token_id, config.pad_token_id) == (False, 0, 1)
    assert "held-out loss" in (tmp_path / "draft" / "README.md").read_text()

    prompts = [json.loads(line) for line in (tmp_path / "heldout.jsonl").read_text().splitlines()]
    held_out = {d.path: d.text for d in scripts["corpus"].read_jsonl(work / "heldout.jsonl")}
    assert prompts
    for prompt in prompts:
        assert prompt["prompt"] in held_out[prompt["id"].split(":")[0]]
        assert 100 <= len(tokenizer.encode(prompt["prompt"])) <= 120
    inputs = tokenizer([prompt["prompt"] for prompt in prompts[:2]], return_tensors="pt", padding=True)
    assert model.generate(**inputs, max_new_tokens=3).shape[0] == 2


def test_export_keeps_better_weights(scripts: dict[str, ModuleType], work: Path, tmp_path: Path) -> None:
    start(scripts, work, work / "draft", tokens=20 * 64)
    scripts["train"].export_command(work=work, out=tmp_path)
    before = (tmp_path / "draft" / "model.safetensors").read_bytes()
    (work / "draft" / "checkpoint.pt").unlink()
    start(scripts, work, work / "draft", tokens=2 * 64)
    scripts["train"].export_command(work=work, out=tmp_path, only_if_better=True)
    assert (tmp_path / "draft" / "model.safetensors").read_bytes() == before


def test_run_goes_on_from_an_exported_model(scripts: dict[str, ModuleType], work: Path, tmp_path: Path) -> None:
    trainer = scripts["trainer"]
    run, _ = start(scripts, work, work / "draft")
    out = tmp_path / "exported"
    scripts["train"].export_command(models=["draft"], work=work, out=out)

    settings = trainer.Settings(tokens=20 * 64, decay_tokens=4 * 64, batch=2, window=32, warmup_steps=2)
    streams = (np.load(work / "train.npy"), np.load(work / "heldout.npy"))
    go_on = trainer.Run.fresh(TINY, run.model.config.vocab_size, settings)
    assert trainer.train(go_on, *streams, settings, tmp_path / "draft", start_from=out / "draft")
    assert (go_on.step, go_on.tokens, go_on.optimizers_from) == (20, 20 * 64, 12)
    assert go_on.losses[0] < run.losses[0] - 0.5

    # The checkpoint is further by now: the same command changes nothing any more.
    again = trainer.Run.fresh(TINY, run.model.config.vocab_size, settings)
    assert trainer.train(again, *streams, settings, tmp_path / "draft", start_from=out / "draft")
    assert again.losses == go_on.losses
    commands = scripts["export"]._commands("draft", {"phases": again.phases, "tokens": again.tokens})
    assert commands[-2] == "python examples/embedded/train.py export draft"
    assert commands[-1].endswith("--start-from specdec/assets/embedded/draft")


def test_draft_learns_what_its_teacher_says(scripts: dict[str, ModuleType], work: Path, tmp_path: Path) -> None:
    trainer = scripts["trainer"]
    start(scripts, work, work / "draft", tokens=12 * 64)
    scripts["train"].export_command(models=["draft"], work=work, out=tmp_path)
    streams = (np.load(work / "train.npy"), np.load(work / "heldout.npy"))
    settings = trainer.Settings(tokens=40 * 64, decay_tokens=64, batch=2, window=32, teacher=str(tmp_path / "draft"))
    vocab = len(AutoTokenizer.from_pretrained(work / "tokenizer"))
    run = trainer.Run.fresh(TINY, vocab, settings)
    torch.manual_seed(1)
    for parameter in run.model.parameters():  # not the weights with which the teacher began
        torch.nn.init.normal_(parameter, std=0.02) if parameter.ndim == 2 else None
    teacher = trainer._teacher(settings.teacher, run.model)
    windows = trainer.draw_windows(streams[1], 0, settings)
    before = trainer.divergence(run.model, teacher, windows).item()
    assert trainer.train(run, *streams, settings, tmp_path / "taught")
    assert trainer.divergence(teacher, teacher, windows).item() == pytest.approx(0.0, abs=1e-6)
    assert trainer.divergence(run.model, teacher, windows).item() < 0.8 * before
    commands = scripts["export"]._commands("draft", {"phases": run.phases, "tokens": run.tokens})
    assert f" --teacher {settings.teacher}" in commands[-1]
    with pytest.raises(ValueError, match="another vocabulary"):
        trainer._teacher(settings.teacher, trainer.Run.fresh(TINY, vocab + 1, settings).model)


def test_prompts_for_distillation_are_cut_from_training_files_alone(scripts: dict[str, ModuleType], work: Path) -> None:
    scripts["train"].prompts_command(work=work, per_file=1)
    prompts = [json.loads(line) for line in (work / "prompts.jsonl").read_text().splitlines()]
    texts = {d.path: d.text for d in scripts["corpus"].read_jsonl(work / "train.jsonl")}
    files = [prompt["id"].split(":")[0] for prompt in prompts]
    assert files
    assert len(files) == len(set(files))
    assert all(prompt["prompt"] in texts[file] for prompt, file in zip(prompts, files, strict=True))


def test_layers_that_a_model_lacks_begin_as_the_identity(
    scripts: dict[str, ModuleType], work: Path, tmp_path: Path
) -> None:
    trainer = scripts["trainer"]
    run, _ = start(scripts, work, work / "draft")
    scripts["train"].export_command(models=["draft"], work=work, out=tmp_path)
    settings = trainer.Settings(layers=3)
    deeper = trainer.Run.fresh(TINY | {"num_hidden_layers": 3}, run.model.config.vocab_size, settings)
    deeper.start_from(tmp_path / "draft")
    ids = torch.arange(12)[None]
    shallow = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    with torch.no_grad():
        assert torch.equal(deeper.model(ids).logits, shallow(ids).logits)
    deeper.begin_phase(settings, compiled=False)
    commands = scripts["export"]._commands("draft", {"phases": deeper.phases, "tokens": deeper.tokens})
    assert " --layers 3 " in commands[-1]


def test_answers_go_on_from_their_prompts_and_end(scripts: dict[str, ModuleType], work: Path, tmp_path: Path) -> None:
    answers, eos = scripts["answers"], 0
    start(scripts, work, work / "draft")
    scripts["train"].export_command(models=["draft"], work=work, out=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "draft")
    texts = ["x = 1\n", *(d.text for d in scripts["corpus"].read_jsonl(work / "train.jsonl")[:3])]
    prompts = answers.prompt_ids(texts, tokenizer, 8)
    assert prompts.shape == (3, 8)  # the short one is left out
    stream = answers.answer(model, prompts, 5)
    assert np.array_equal(stream, answers.answer(model, prompts, 5))
    ends = np.flatnonzero(stream == eos)
    assert len(ends) == 3
    greedy = model.generate(torch.from_numpy(prompts[:1]), max_new_tokens=5)[0].numpy()
    assert np.array_equal(stream[: ends[0]], greedy[greedy != eos])


def test_windows_are_drawn_from_answers_in_their_share(scripts: dict[str, ModuleType]) -> None:
    trainer = scripts["trainer"]
    text, own = np.zeros(500, np.uint16), np.ones(500, np.uint16)
    settings = trainer.Settings(batch=8, window=16, answers=0.25)
    windows = trainer.draw_windows(text, 3, settings, own)
    assert windows.float().mean(1).sum() == 2
    assert torch.equal(trainer.draw_windows(text, 3, settings), torch.zeros_like(windows))
