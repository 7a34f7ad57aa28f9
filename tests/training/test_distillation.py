"""The target's own answers: those of `generate`, whatever interrupts the run."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from specdec.cli import app
from specdec.common.loading import load_model
from specdec.training import distillation, pack, shards
from specdec.training.distillation import distill
from specdec.training.examples import load_examples
from specdec.training.prompts import load_prompts
from tests.training.tokenizers import CHATML, byte_tokenizer, runs

PROMPTS = ["def add(a, b):", "x = 1", "import os", "print(", "for i in range(", "class A:", "x = 1", "y"]
VOCAB = 260
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, bos_token_id=None, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # so that some answers come to an end
        model.lm_head.weight[0] += 0.02
    return model


def texts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for shard in sorted(folder.glob("shard-*")) for line in shard.read_text().split("\n")[:-1]]


@pytest.mark.parametrize("drafter", ["lookahead", None])
def test_answers_are_those_of_generate(model: Any, tmp_path: Path, drafter: str | None) -> None:
    tokenizer = byte_tokenizer()
    report = distill(model, tokenizer, PROMPTS, tmp_path / "out", max_new_tokens=24, batch_size=3, drafter=drafter)
    found = records(report.folder)
    assert sorted(record["prompt"] for record in found) == sorted({*PROMPTS})
    assert report.num_prompts == report.num_new_prompts == len(found) == 7
    num_tokens = 0
    for record in found:
        ids = torch.tensor([tokenizer(record["prompt"]).input_ids])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, pad_token_id=0)
        assert record["input_ids"] == expected[0].tolist()
        assert record["num_prompt_tokens"] == ids.shape[1]
        completion = record["input_ids"][ids.shape[1] :]
        assert record["completion"] == tokenizer.decode(completion, skip_special_tokens=True)
        num_tokens += len(completion)
    assert num_tokens == report.num_new_tokens
    assert report.tokens_per_pass >= 1.0
    assert "7 of them new" in str(report)


def test_sampled_batch_is_that_of_generate(model: Any, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    prompts = ["abcd", "efgh", "ij"]
    distill(model, tokenizer, prompts, tmp_path / "out", max_new_tokens=20, temperature=0.7, batch_size=3, seed=5)
    ids = torch.tensor([tokenizer(f"{p:>4}").input_ids for p in prompts])
    mask = (ids != tokenizer(" ").input_ids[0]).long()
    with shards.seeded(5, 0, model.device):
        expected = model.generate(
            ids, attention_mask=mask, max_new_tokens=20, do_sample=True, temperature=0.7, pad_token_id=0
        )
    for record, row in zip(records(tmp_path / "out"), expected[:, 4:].tolist(), strict=True):
        completion = record["input_ids"][record["num_prompt_tokens"] :]
        assert completion == row[: len(completion)]
        assert len(completion) == 20 or completion[-1] == 0


def test_answers_end_once(model: Any, tmp_path: Path) -> None:
    distill(model, byte_tokenizer(), PROMPTS, tmp_path / "out", max_new_tokens=100, temperature=1.0, batch_size=4)
    lengths = []
    for record in records(tmp_path / "out"):
        completion = record["input_ids"][record["num_prompt_tokens"] :]
        assert 0 not in completion[:-1] and (completion[-1] == 0 or len(completion) == 100)
        lengths.append(len(completion))
    assert min(lengths) < max(lengths)


class Killed(BaseException):
    """Ends the run as a signal would."""


def killed_at(number: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which ends the run at its call of this number."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise Killed
        return original(*args, **kwargs)

    return call


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    ("module", "function", "number"),
    [
        (distillation, "_answer", 1),
        (distillation, "_answer", 3),
        (distillation, "_records", 2),
        (os, "replace", 1),
        (os, "replace", 2),
        (os, "replace", 4),
        (os, "fsync", 3),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_interrupted_run_gives_the_same_files(
    model: Any, tmp_path: Path, temperature: float, module: Any, function: str, number: int
) -> None:
    def run(folder: Path) -> distillation.DistillationReport:
        return distill(
            model, byte_tokenizer(), PROMPTS, folder, max_new_tokens=16, temperature=temperature, batch_size=2, seed=3
        )

    whole = run(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, function, killed_at(number, getattr(module, function)))
        with pytest.raises(Killed):
            run(tmp_path / "parts")
    written = len(records(tmp_path / "parts"))
    rest = run(tmp_path / "parts")
    assert texts(tmp_path / "parts") == texts(tmp_path / "whole")
    assert rest.num_new_prompts == whole.num_new_prompts - written
    assert "all written before" in str(run(tmp_path / "parts"))


def test_drafter_knows_what_it_would_know_without_the_interruption(model: Any, tmp_path: Path) -> None:
    from specdec.drafters import LookaheadDrafter

    whole, first, second = (LookaheadDrafter() for _ in range(3))
    kwargs: dict[str, Any] = {"max_new_tokens": 16, "batch_size": 2}
    distill(model, byte_tokenizer(), PROMPTS, tmp_path / "whole", drafter=whole, **kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "_answer", killed_at(3, distillation._answer))
        with pytest.raises(Killed):
            distill(model, byte_tokenizer(), PROMPTS, tmp_path / "parts", drafter=first, **kwargs)
    distill(model, byte_tokenizer(), PROMPTS, tmp_path / "parts", drafter=second, **kwargs)
    assert second.stats()["shared"]["tokens"] == whole.stats()["shared"]["tokens"] > first.stats()["shared"]["tokens"]


def test_global_random_state_is_left_alone(model: Any, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    distill(model, byte_tokenizer(), PROMPTS[:2], tmp_path / "out", max_new_tokens=4, temperature=1.0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_examples_are_the_tokens_as_they_are(model: Any, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    distill(model, tokenizer, PROMPTS, tmp_path / "out", max_new_tokens=16, temperature=1.0)
    rows = load_examples(str(tmp_path / "out"), tokenizer)
    for row, record in zip(rows, records(tmp_path / "out"), strict=True):
        prompt = record["num_prompt_tokens"]
        assert row["input_ids"] == record["input_ids"]
        assert row["supervised"] == [False] * prompt + [True] * (len(record["input_ids"]) - prompt)
    assert pack(rows, 64)["supervised"][:].sum() == sum(map(sum, rows["supervised"][:]))


def test_incomplete_and_foreign_answers(model: Any, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    distill(model, tokenizer, PROMPTS, tmp_path / "out", max_new_tokens=4, batch_size=2)
    with pytest.raises(ValueError, match="of another tokenizer; distil with the model that is to be trained"):
        load_examples(str(tmp_path / "out"), byte_tokenizer(merges=(("a", "b"),)))
    (tmp_path / "out" / "shard-000002.jsonl").unlink()
    with pytest.warns(UserWarning, match="is not complete: 3 of 4 batches; run specdec distill again"):
        assert len(load_examples(str(tmp_path / "out"), tokenizer)) == 5


def test_folder_of_another_distillation(model: Any, tmp_path: Path) -> None:
    distill(model, byte_tokenizer(), PROMPTS, tmp_path / "out", max_new_tokens=4)
    for change, message in (
        ({"max_new_tokens": 5}, "max_new_tokens was 4 and is 5"),
        ({"seed": 9}, "seed was 0 and is 9"),
        ({"prompts": PROMPTS[1:]}, "prompts was .* num_prompts was 7 and is 6"),
    ):
        kwargs: dict[str, Any] = {"prompts": PROMPTS, "max_new_tokens": 4, **change}
        with pytest.raises(ValueError, match=f"holds another distillation: {message}"):
            distill(model, byte_tokenizer(), folder=tmp_path / "out", **kwargs)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="is not empty and not of a distillation"):
        distill(model, byte_tokenizer(), PROMPTS, tmp_path / "other", max_new_tokens=4)


def test_settings_and_prompts_that_do_not_work(model: Any, tmp_path: Path) -> None:
    def run(prompts: Any = PROMPTS, **kwargs: Any) -> Any:
        return distill(model, byte_tokenizer(), prompts, tmp_path / "out", **kwargs)

    for kwargs in ({"max_new_tokens": 0}, {"batch_size": 0}, {"temperature": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(kwargs))} must be"):
            run(**kwargs)
    for prompts in ([], [""]):
        with pytest.raises(ValueError, match="there is no prompt"):
            run(prompts)
    with pytest.warns(UserWarning, match="1 of 2 prompts are left out: .* model's 128 positions"):
        assert run(["x" * 125, "y"], max_new_tokens=4).num_prompts == 1


def write(folder: Path, *found: Any) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in found))
    return str(path)


def test_prompts_of_conversations_end_where_the_assistant_begins(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML)
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    source = write(
        tmp_path,
        {"messages": [user, answer]},
        {"messages": [user]},
        {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]},
        {"messages": [user, answer, user, answer]},
        {"prompt": "plain", "completion": "never read"},
    )
    first = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert [prompt.text for prompt in load_prompts(source, tokenizer)] == [
        first,
        first.replace("q", "h"),
        first[: -len("<|im_start|>assistant\n")] + "<|im_start|>assistant\na<|im_end|>\n" + first,
        "plain",
    ]
    asked = load_prompts(write(tmp_path, {"id": 7, "prompt": "q"}), tokenizer, chat=True)
    assert [(prompt.id, prompt.text) for prompt in asked] == [("7", first)]


def test_text_is_cut_into_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("abcdefghij" * 2 + "xyz")
    (tmp_path / "b.txt").write_text("short")
    prompts = load_prompts(str(tmp_path), byte_tokenizer(), prompt_tokens=10)
    assert [prompt.text for prompt in prompts] == ["abcdefghij", "short"]
    assert prompts[0].id == f"{tmp_path / 'a.py'}:0"
    assert len(load_prompts(str(tmp_path), byte_tokenizer(), prompt_tokens=5, limit=2)) == 2
    (tmp_path / "a.py").write_text("")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(ValueError, match="has no prompt in 2 records"):
        load_prompts(str(tmp_path), byte_tokenizer())
    with pytest.raises(ValueError, match="prompt_tokens must be at least 1"):
        load_prompts(str(tmp_path), byte_tokenizer(), prompt_tokens=0)


def test_prompts_from_a_source(model: Any, tmp_path: Path) -> None:
    source = write(tmp_path, {"prompt": "abc"})
    assert distill(model, byte_tokenizer(), source, tmp_path / "out", max_new_tokens=4).num_prompts == 1
    again = load_prompts(str(tmp_path / "out"), byte_tokenizer())
    assert [prompt.text for prompt in again] == ["abc"]


def test_progress_shows_speed(model: Any, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    distill(model, byte_tokenizer(), PROMPTS, tmp_path / "out", max_new_tokens=4, console=console)
    assert "tokens/s" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "7/7" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer(CHATML).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_command(saved: Path, tmp_path: Path) -> None:
    source = write(tmp_path, *({"prompt": prompt} for prompt in PROMPTS))
    args = ["distill", source, str(tmp_path / "out"), "--model", str(saved), "--max-new-tokens", "8", "--chat"]
    result = CliRunner().invoke(app, [*args, "--temperature", "0.3", "--limit", "5"])
    assert result.exit_code == 0, result.output
    assert "5 answers in" in result.stdout and "tokens per pass" in result.stdout
    tokenizer = byte_tokenizer(CHATML)
    rows = load_examples(str(tmp_path / "out"), tokenizer)
    assert all(tokenizer.decode(row["input_ids"]).startswith("<|im_start|>user\n") for row in rows)
    assert all(len(runs(row["input_ids"], row["supervised"], tokenizer)) == 1 for row in rows)
    again = CliRunner().invoke(app, args)
    assert again.exit_code == 2
    assert "holds another distillation" in again.stderr


def test_command_that_is_stopped(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(distillation, "_answer", stop)
    source = write(tmp_path, {"prompt": "a"})
    args = ["distill", source, str(tmp_path / "out"), "--model", str(saved), "--max-new-tokens", "4"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 130
    assert "goes on from here" in result.stderr


@pytest.mark.slow
def test_killed_process_goes_on(saved: Path, tmp_path: Path) -> None:
    source = write(tmp_path, *({"prompt": f"{prompt}{i}"} for prompt in PROMPTS for i in range(40)))
    parts = tmp_path / "parts"

    def finish(folder: Path) -> None:
        model, tokenizer = load_model(str(saved))
        distill(model, tokenizer, source, folder, max_new_tokens=60, temperature=0.9, batch_size=4)

    for wanted in (1, 20):
        flags = ["--model", str(saved), "--batch-size", "4", "--max-new-tokens", "60", "--temperature", "0.9"]
        process = subprocess.Popen(
            [sys.executable, "-m", "specdec", "distill", source, str(parts), *flags],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )
        while len([*parts.glob("shard-*")]) < wanted and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.wait()
    finish(tmp_path / "whole")
    assert 20 <= len([*parts.glob("shard-*")]) < len([*(tmp_path / "whole").glob("shard-*")])
    finish(parts)
    assert texts(parts) == texts(tmp_path / "whole")
