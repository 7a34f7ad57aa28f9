"""The commands, on tiny models made here."""

from __future__ import annotations

import io
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from specdec.benchmark.display import Display
from specdec.benchmark.display import completion as shown_completion
from specdec.benchmark.measuring import EncodedPrompt, Sample
from specdec.budget import Budget
from specdec.cli import app
from specdec.commands import COMMANDS
from specdec.common import embedded
from specdec.common.errors import UserError
from specdec.inspection.trace import Trace

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "def add(a, b):\n    return a"


def save_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<end>": 0} | {c: i for i, c in enumerate(alphabet, 1)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.save_pretrained(folder)


def save_model(folder: Path, layers: int, seed: int, positions: int = 512) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=positions, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "target", layers=2, seed=0)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "draft", layers=1, seed=1)


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    records = [{"id": f"file.py:{i}", "prompt": PROMPT * 2 + f" + {i}\n"} for i in range(3)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def call(*args: object, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


def completion(target: Path, **kwargs: Any) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(kwargs.pop("seed", 0))
    output = model.generate(**inputs, **kwargs)
    text: str = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return text


def test_help_lists_the_commands() -> None:
    result = call("--help")
    assert result.exit_code == 0
    assert all(name in result.output for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_command(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_version() -> None:
    assert call("--version").output.startswith("specdec 0.")


def test_module_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["specdec", "replay", "missing.jsonl"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("specdec", run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "Error: missing.jsonl is not a file; check the path\n"


def test_commands_import_nothing_heavy_before_they_run() -> None:
    program = f"""
import sys, types
package = types.ModuleType("specdec")
package.__path__ = [{str(ROOT / "specdec")!r}]
sys.modules["specdec"] = package
import specdec.cli
found = sorted({{"torch", "transformers", "numpy", "numba"}} & set(sys.modules))
sys.exit(f"imported: {{found}}" if found else 0)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


ERRORS: dict[str, tuple[list[str], str]] = {
    "draft model": (
        ["generate", "x", "--model", "./target", "--drafter", "draft-model"],
        "drafter draft-model needs a draft model; give --drafter-option draft_model=...",
    ),
    "draft model path": (
        ["generate", "x", "--drafter", "draft-model", "--drafter-option", "draft_model=./no-such-model"],
        "./no-such-model is not the folder of a model",
    ),
    "growth": (
        ["generate", "x", "--drafter", "draft-model", "--drafter-option", "growth=wide"],
        "growth must be one of chain, dynamic, paced",
    ),
    "layers": (
        ["generate", "x", "--drafter", "draft-model", "--drafter-option", "layers=2"],
        "layers=2 has a meaning with draft_model='self' only",
    ),
    "drafter": (["generate", "x", "--drafter", "oracle"], "--drafter oracle is not known; use one of auto, lookahead"),
    "no option": (
        ["generate", "x", "--drafter-option", "depth"],
        "is not a setting of drafter auto; known are max_",
    ),
    "option": (["generate", "x", "--drafter", "lookahead", "--drafter-option", "depth=3"], "orders=1,2,4,8"),
    "value": (
        ["generate", "x", "--drafter", "lookahead", "--drafter-option", "max_hits=many"],
        "max_hits must be of type int, not 'many'",
    ),
    "range": (
        ["generate", "x", "--drafter", "lookahead", "--drafter-option", "max_hits=0"],
        "max_hits must be between 1 and",
    ),
    "option of none": (["generate", "x", "--drafter", "none", "--drafter-option", "a=1"], "leave one of them out"),
    "file": (["generate", "--file", "no/such/file"], "no/such/file is not a file; check the path"),
    "two prompts": (["generate", "x", "--file", "y"], "both a prompt and --file are given"),
    "empty": (["generate", ""], "the prompt is empty"),
    "model path": (["generate", "x", "--model", "./no-such-model"], "it has no config.json); check the path"),
    "model name": (
        ["generate", "x", "--model", "no-such-model"],
        "name a folder or a causal LM of the",
    ),
    "dtype": (["generate", "x", "--dtype", "int3"], "use one of auto, float32, bfloat16, float16"),
    "sampling": (["generate", "x", "--top-k", "5", "--temperature", "0.5"], "--temperature, --top-k has no effect"),
    "replay file": (["replay", "missing.jsonl"], "missing.jsonl is not a file"),
    "replay none": (["replay", "missing.jsonl", "--drafter", "none"], "nothing to replay"),
    "replay target": (
        ["replay", "pyproject.toml", "--drafter", "draft-model", "--drafter-option", "draft_model=self"],
        "needs the target, which recorded answers do not hold; use specdec bench",
    ),
    "demo file": (["demo", "--prompt-file", "missing.jsonl"], "missing.jsonl is not a file"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_one_line_with_the_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    args, message = ERRORS[name]
    result = call(*args)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_TRACEBACK", "1")
    assert isinstance(call("replay", "missing.jsonl").exception, UserError)


def test_max_nodes_error(target: Path) -> None:
    result = call("generate", "x", "--model", target, "--max-nodes", 5)
    assert result.exit_code == 2
    assert "max_nodes=5 is not allowed; use one of 1, 2, 4" in result.stderr


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
@pytest.mark.parametrize("drafter", ["lookahead", "none"])
def test_generate_greedy(target: Path, drafter: str, stream: str) -> None:
    args = ["--model", target, "--drafter", drafter, stream, "--max-new-tokens", 12, "--report", "json"]
    result = call("generate", PROMPT, *args)
    assert result.exit_code == 0, result.output
    assert result.stdout == completion(target, max_new_tokens=12, do_sample=False) + "\n"
    report = json.loads(result.stderr)
    assert report["drafter"] == drafter
    assert report["fallback"] is None


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize(
    "options", [["growth=chain"], ["growth=dynamic", "coupled=no"], ["draft_model=self", "layers=1"]]
)
def test_generate_with_a_draft_model(target: Path, draft: Path, options: list[str], sample: bool) -> None:
    options = options if "draft_model=self" in options else [f"draft_model={draft}", *options]
    args = [text for option in options for text in ("--drafter-option", option)]
    flags = ["--sample", "--seed", 3] if sample else []
    result = call(
        "generate", PROMPT, "--model", target, "--drafter", "draft-model", *args, *flags, "--max-new-tokens", 12,
        "--report", "json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout == completion(target, seed=3, max_new_tokens=12, do_sample=sample) + "\n"
    report = json.loads(result.stderr)
    assert report["drafter"] == "draft-model"
    assert report["num_draft_tokens"] > 0


def test_generate_sampled_from_stdin(target: Path) -> None:
    flags = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}
    args = [text for name, value in flags.items() for text in ("--" + name.replace("_", "-"), value)]
    result = call(
        "generate", "--model", target, "--sample", "--seed", 3, "--max-new-tokens", 12, *args, "--report", "none",
        "--drafter", "lookahead", "--drafter-option", "max_depth=4", "--drafter-option", "orders=1,3", stdin=PROMPT,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout == completion(target, seed=3, max_new_tokens=12, do_sample=True, **flags) + "\n"
    assert result.stderr == ""


def test_generate_from_file_and_compare(target: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.py").write_text(PROMPT)
    args = ["--file", tmp_path / "prompt.py", "--model", target, "--max-new-tokens", 8, "--compare"]
    result = call("generate", *args)
    assert result.exit_code == 0, result.output
    assert "identical to HF generate: yes" in result.stderr
    assert "tokens_per_pass" in result.stderr


def test_chat_needs_a_template(target: Path, tmp_path: Path) -> None:
    assert "no chat template" in call("generate", "hi", "--model", target, "--chat").stderr
    folder = save_model(tmp_path / "chat", layers=1, seed=0)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    result = call("generate", "hi", "--model", folder, "--chat", "--max-new-tokens", 4)
    assert result.exit_code == 0, result.output


def test_chat_template_is_applied_where_there_is_one(target: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "chat", layers=2, seed=0)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}=")
    args = ["--model", folder, "--max-new-tokens", 12]
    applied, raw = call("generate", PROMPT, *args), call("generate", PROMPT, *args, "--raw")
    assert "the model's chat template is applied; --raw" in applied.stderr
    assert applied.stdout == call("generate", PROMPT + "=", *args, "--raw").stdout != raw.stdout
    assert raw.stdout == completion(target, max_new_tokens=12) + "\n"
    assert "template" not in raw.stderr
    assert "template" not in call("generate", PROMPT, *args, "--chat").stderr
    assert json.loads(call("generate", PROMPT, *args, "--report", "json").stderr)


def test_demo(target: Path, draft: Path, prompt_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "demo.json"
    result = call(
        "demo", "--model", target, "--draft-model", draft, "--prompt-file", prompt_file, "--prompts", 2, "--tokens", 8,
        "--json", out,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    names = [
        "HF generate",
        "HF prompt lookup",
        "HF assisted",
        "specdec off",
        "specdec lookahead",
        "specdec draft model",
        "specdec auto",
    ]
    rows = {row["method"]: row for row in written["parts"]["greedy"]["methods"]}
    assert list(rows) == names
    assert all(row["num_runs"] == 2 for row in rows.values())
    assert all(rows[name]["num_identical"] == 2 for name in rows if "HF" not in name or name == "HF generate")
    assert {"hardware", "versions", "commit", "benchmark", "models"} <= set(written)
    assert all(name in result.output for name in rows)
    assert result.output.count("tokens/s: HF generate") == 2
    assert "file.py:0, specdec auto" in result.output
    assert "Left out: Medusa (no heads for this model)." in result.output


def test_demo_of_a_chat_model_in_the_fastest_precision(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "chat", layers=1, seed=0, positions=2048)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}=")
    result = call("demo", "--model", folder, "--prompts", 2, "--tokens", 4)
    assert result.exit_code == 0, result.output
    assert "A pass over one token on this CPU: " in result.output
    assert "HF assisted and a draft model (no smaller model is at hand" in result.output
    assert "> Write a" in result.output or "> " in result.output
    if ", bfloat16)" in result.output:
        assert "for 2 of 2 prompts" in result.output


def test_demo_without_smollm2_shows_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise FileNotFoundError("smollm2 was not found; install it")

    monkeypatch.setattr("specdec.common.smollm2.smollm2_path", missing)
    result = call("demo", "--prompts", 1, "--tokens", 4)
    assert result.exit_code == 0, result.output
    assert "The small embedded model is used, because smollm2 was not found; install it." in result.output
    assert call("demo", "--model", "smollm2").exit_code == 2


def test_live_display_follows_the_runs(target: Path) -> None:
    from rich.console import Console

    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = tokenizer("x = [1]").input_ids
    trace = Trace([[5]])
    for tokens, sources in (ids[:1], []), (ids[1:4], [("lookahead",)] * 2), (ids[4:], [("medusa",)] * (len(ids) - 5)):
        trace.add_pass([0], [tokens], [sources], [len(sources)])
    sample = Sample("A", "file.py:1", 0, [ids], 8, 2.0, 0.5, 4, trace=trace)
    text = shown_completion(sample, tokenizer)
    assert text.plain == "x = [1]"
    assert ["x = [1]"[span.start : span.end] for span in text.spans] == [" =", "[1"]
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=20, record=True)
    with Display(console, num_runs=4, tokenizer=tokenizer) as display:
        display.begin("greedy", ["A", "B"], 1)
        display.warmed_up("A", None)
        display.warmed_up("B", "it broke")
        display.ran(sample)
        console.print(display.live.renderable)
        display.round_ended(EncodedPrompt("file.py:1", torch.tensor([[5]]), text="the prompt"), [sample])
    shown = console.export_text()
    for part in ("4 tokens/s, 2.00 per pass", "x = [1]", "3/3", "B is left out: it broke", "> the prompt"):
        assert part in shown
    assert display.methods == ["A"]


def test_replay(tmp_path: Path, target: Path) -> None:
    ids, texts = tmp_path / "ids.jsonl", tmp_path / "texts.jsonl"
    ids.write_text(json.dumps({"prompt": [1, 2, 3, 4] * 4, "answer": [1, 2, 3, 4] * 4}) + "\n\n")
    texts.write_text(json.dumps({"prompt": "abcd" * 4, "answer": "abcd" * 4}) + "\n")
    result = call("replay", ids, "--nodes", 8)
    assert result.exit_code == 0, result.output
    assert "tokens per pass" in result.output
    assert "acceptance per position" in result.output
    figures = json.loads(call("replay", ids, "--nodes", 8, "--json").output)
    assert figures["tokens_per_pass"] > 3
    assert figures["max_nodes"] == 8
    assert "name the target's tokenizer with --tokenizer" in call("replay", texts).stderr
    of_text = json.loads(call("replay", texts, "--nodes", 8, "--json", "--tokenizer", target).output)
    assert of_text["tokens_per_pass"] == figures["tokens_per_pass"]


@pytest.mark.parametrize("line", ["not json", "[1, 2]", '{"prompt": [1]}', '{"prompt": [1], "answer": [-1]}'])
def test_replay_of_a_bad_record(tmp_path: Path, line: str) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text(line + "\n")
    result = call("replay", file)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1


def test_demo_marks_a_completion_in_which_drafting_rests(
    target: Path, prompt_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Budget, "nodes_to_draft", lambda budget: 1)
    result = call("demo", "--model", target, "--prompt-file", prompt_file, "--prompts", 1, "--tokens", 8)
    assert result.exit_code == 0, result.output
    assert "file.py:0, specdec auto" in result.output


def test_embedded_model_by_name() -> None:
    with pytest.raises(ValueError, match="use one of 'target', 'draft'"):
        embedded.embedded_path("teacher")
    assert embedded.embedded_path("draft").name == "draft"
    prompts = embedded.heldout_prompts()
    assert len({p.id for p in prompts}) == len(prompts) > 20
    chosen = embedded.heldout_prompts(5)
    assert len(chosen) == 5
    assert chosen[0] == prompts[0]
