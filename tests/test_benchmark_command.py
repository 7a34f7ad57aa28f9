"""The command `specdec bench`: its prompts, files and errors."""

from __future__ import annotations

import copy
import json
import runpy
from pathlib import Path
from typing import Any

import datasets
import pytest
from typer.testing import CliRunner

from specdec.benchmark import load_results, measuring, read_benchmark_prompts
from specdec.benchmark.prompts import answers_of, read_benchmark_questions
from specdec.cli import app
from specdec.common import provenance
from tests.test_cli import PROMPT, save_model
from tests.tiny_models import EOS, tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def call(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_prompts_of_each_layout(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    (tmp_path / "question.jsonl").write_text(
        "".join(
            json.dumps({"question_id": i, "category": f"kind {i // 4}", "turns": [f"ab{i}", "more"]}) + "\n"
            for i in range(8)
        )
    )
    found = read_benchmark_prompts(str(tmp_path / "question.jsonl"), tokenizer, limit=4)
    assert [(p.id, p.category) for p in found] == [("0", "kind 0"), ("2", "kind 0"), ("4", "kind 1"), ("6", "kind 1")]
    assert found[0].input_ids.tolist() == tokenizer("ab0", return_tensors="pt").input_ids.tolist()
    (tmp_path / "plain.jsonl").write_text('{"prompt": "abc"}\n\n{"id": "x", "category": "c", "prompt": "d"}\n')
    found = read_benchmark_prompts(str(tmp_path / "plain.jsonl"), tokenizer)
    assert [(p.id, p.category) for p in found] == [("plain.jsonl:1", None), ("x", "c")]
    rows = [
        {"question_id": f"q{i}", "category": "c", "sub_category": "s", "turns": ["ab", "cd"], "multiturn": True}
        for i in range(3)
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "test.parquet")  # as SPEED-Bench's files are
    found = read_benchmark_prompts(str(tmp_path / "test.parquet"), tokenizer, limit=2)
    assert [(p.id, p.category) for p in found] == [("q0", "c"), ("q1", "c")]
    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved")
    assert len(read_benchmark_prompts(str(tmp_path / "saved"), tokenizer, split="test")) == 3
    (tmp_path / "text.txt").write_text("one text\n")
    assert [p.id for p in read_benchmark_prompts(str(tmp_path / "text.txt"), tokenizer)] == ["text.txt"]
    with pytest.raises(ValueError, match="chat=True needs a chat template"):
        read_benchmark_prompts("embedded", tokenizer, chat=True)


def test_later_turns_hold_the_target_s_own_answers(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    (tmp_path / "q.jsonl").write_text(json.dumps({"question_id": 7, "category": "c", "turns": ["abc", "de", "f"]}))
    answer = answers_of(tiny_model(), 6)
    ((first, second, third),) = read_benchmark_questions(
        str(tmp_path / "q.jsonl"), tokenizer, num_turns=3, answer=answer
    )
    assert [p.id for p in (first, second, third)] == ["7", "7:2", "7:3"]
    output = tiny_model().generate(first.input_ids, max_new_tokens=6, do_sample=False)[0].tolist()
    output = [token for token in output if token != EOS]
    text = tokenizer.decode(second.input_ids[0])
    assert second.input_ids[0, : len(output)].tolist() == output
    assert text.startswith("abc") and text.endswith("de" + tokenizer.decode(tokenizer("\n").input_ids))
    assert third.input_ids[0, : second.input_ids.shape[1]].tolist() == second.input_ids[0].tolist()

    chat: Any = copy.deepcopy(tokenizer)
    chat.chat_template = "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }};{% endfor %}"
    ((_, second),) = read_benchmark_questions(
        str(tmp_path / "q.jsonl"), chat, num_turns=2, answer=lambda ids: tokenizer("xyz").input_ids
    )
    assert tokenizer.decode(second.input_ids[0]) == "uabc;axyz;ude;"
    with pytest.raises(ValueError, match="needs answers"):
        read_benchmark_questions(str(tmp_path / "q.jsonl"), tokenizer, num_turns=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "target", layers=1, seed=0)


def test_command_writes_tables_figures_and_the_readme(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": PROMPT + str(i), "category": "ab"[i % 2]}) + "\n" for i in range(3))
    )
    json_file, output = tmp_path / "tiny.json", tmp_path / "out"
    args = ["bench", "--model", folder, "--prompts", prompts, "--limit", 2, "--tokens", 6, "--random", "--top-p", 0.9]
    args += [
        "--no-compiled",
        "--drafter",
        "lookahead max_depth=4",
        "--drafter",
        "lookahead verifier=typical",
        "--json",
        json_file,
    ]
    result = call(*args, "--output", output)
    assert result.exit_code == 0, result.output
    assert "specdec lookahead max_depth=4" in result.output
    found = json.loads(json_file.read_text())
    assert load_results(json_file) == load_results(output)
    assert set(found["parts"]) == {"greedy", "sampled", "incompressible"}
    assert found["num_prompts"] == 2
    assert {"hardware", "versions", "commit", "models", "command", "benchmark"} <= set(found)
    assert found["parts"]["sampled"]["settings"]["arguments"]["top_p"] == 0.9
    table = runpy.run_path(str(ROOT / "benchmarks" / "readme_table.py"))["measured_table"]
    header, _, *rows = table(found, ["greedy", "categories"]).splitlines()
    assert header == "| method | tokens per pass | a | b |"
    assert [line.count("×") for line in rows[:3]] == [2, 2, 2]
    for part in found["parts"].values():
        rows = {row["method"]: row for row in part["methods"]}
        assert rows["specdec lookahead max_depth=4"]["num_identical"] == 2
        assert rows["specdec lookahead verifier=typical"]["guarantee"] == "approximate"
    names = {file.name for file in output.iterdir()}
    assert names - {"acceptance.png"} == {"results.json", "results.md", "speedup.png"}
    text = (output / "results.md").read_text()
    assert "![speedup](speedup.png)" in text
    assert "approximate: the output may differ" in text

    same = call("bench", "--compare", output, output)
    assert same.exit_code == 0, same.output
    assert "faster" not in same.output and "slower" not in same.output

    readme: Any = runpy.run_path(str(ROOT / "benchmarks" / "readme_table.py"))["filled"]
    text = "before\n<!-- measured: tiny greedy,sampled -->\nold\n<!-- end -->\nafter\n"
    filled = readme(text, tmp_path)
    assert "old" not in filled
    assert filled.startswith("before\n<!-- measured: tiny greedy,sampled -->\n| method | greedy (T=0): tokens/s |")
    assert filled.endswith("<!-- end -->\nafter\n")
    exact, approximate = filled.split("Approximate: the output may differ.")
    assert "| specdec lookahead max_depth=4 |" in exact and "typical" not in exact
    assert "| specdec lookahead verifier=typical |" in approximate
    assert str(provenance.versions()["transformers"]) in filled
    assert readme(filled, tmp_path) == filled
    assert "specdec bench --json benchmarks/results/tiny.json" in readme(text, tmp_path / "elsewhere")


def test_interrupted_command_shows_what_was_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [0]

    def prepare(*args: Any, **kwargs: Any) -> Any:
        made[0] += 1
        if made[0] > 10:
            raise KeyboardInterrupt
        return run_once(*args, **kwargs)

    run_once = measuring.run_once
    monkeypatch.setattr(measuring, "run_once", prepare)
    args = ["--model", folder, "--prompts", "embedded", "--limit", 3, "--tokens", 4, "--drafter", "lookahead"]
    result = call("bench", *args, "--no-compiled", "--output", tmp_path / "out")
    assert result.exit_code == 130
    assert "Interrupted: medians" in result.output
    assert load_results(tmp_path / "out")["parts"]["greedy"]["num_prompts"] == 1


ERRORS: dict[str, tuple[list[object], str]] = {
    "drafter": (["--drafter", "nothing"], "--drafter nothing is not known; use one of"),
    "drafter setting": (["--drafter", "lookahead depth=3"], "is not a setting of drafter lookahead"),
    "no drafter": (["--drafter", ""], "--drafter is empty"),
    "none": (["--drafter", "none"], "is always measured, as specdec off"),
    "quotes": (["--drafter", "lookahead 'x"], "must be a name and settings"),
    "verifier": (["--drafter", "lookahead verifier=x"], "verifier x is not known; use one of exact"),
    "prompts": (["--prompts", "./missing.jsonl"], "./missing.jsonl does not exist; check the path"),
    "empty file": (["--prompts", "{empty}"], "holds no prompt; write"),
    "empty text": (["--prompts", "{blank}"], "holds no prompt; write the text"),
    "bad line": (["--prompts", "{bad}"], 'line 1 of {bad} is not a prompt; write {"prompt": "..."}'),
    "batch": (["--prompts", "{good}", "--batch-size", 3], "a batch of 3 prompts cannot be made of 1"),
    "temperatures": (["--temperature", 1, "--temperature", 1], "give distinct values"),
    "compare": (["--compare", "a.json", "b.json"], "a.json is not a file; name the JSON file of a benchmark"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_one_line_with_the_remedy(name: str, folder: Path, tmp_path: Path) -> None:
    args, message = ERRORS[name]
    files = {"empty": ("e.jsonl", "\n"), "blank": ("b.txt", " \n"), "bad": ("x.jsonl", '{"text": "x"}\n')}
    files["good"] = ("good.jsonl", '{"prompt": "def"}\n')
    for key, (file, text) in files.items():
        (tmp_path / file).write_text(text)
        args = [str(arg).replace(f"{{{key}}}", str(tmp_path / file)) for arg in args]
        message = message.replace(f"{{{key}}}", str(tmp_path / file))
    result = call("bench", "--model", folder, "--tokens", 4, "--no-compiled", *args)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
