"""Every block of code in README.md, CONTRIBUTING.md and docs/ is run, or checked where it cannot run.

The substitution, all of it:

- hub names of models stand for folders: of the package's target with a chat template (`TARGETS`), of its draft model
  (`DRAFTS`), of a tiny model with another tokenizer (`OTHERS`); a name that is in none of these is an error;
- `max_new_tokens` is at most 16;
- `specdec`, `torch`, `model`, `draft_model`, `tokenizer`, `inputs`, `prompts`, `turns`, `drafter`, `DynamicCache` and
  `TextStreamer` are there from the beginning, and stay what the page makes of them;
- blocks run in a folder that holds the files of `files()`, and nothing else.

`<!-- not run: reason -->` in front of a block keeps it from being run; it is still compiled, or its options checked.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.main import get_command
from typer.testing import CliRunner

import specdec
from specdec.cli import app
from specdec.commands.bench import _parsed
from specdec.commands.drafter_options import DrafterFlags
from specdec.common.embedded import embedded_path, heldout_prompts, load_embedded
from tests.tiny_models import LLAMA_LIKE, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+?) -->\s*\n)?^(?P<indent> *)```(?P<kind>[\w-]*)\n(?P<code>.*?)^ *```$",
    re.M | re.S,
)
TARGETS = ("Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B", "HuggingFaceTB/SmolLM2-135M-Instruct", "MODEL")
DRAFTS: tuple[str, ...] = ()
OTHERS = ("HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen3-32B", "RedHatAI/Qwen3-32B-speculator.eagle3")
HUB_NAME = re.compile(r"(?<=[\"' =])[A-Z][\w-]*/[\w.-]*[A-Z0-9][\w.-]*(?=[\"' ]|$)", re.M)
TEMPLATE = "{% for turn in messages %}# {{ turn['role'] }}: {{ turn['content'] }}\n{% endfor %}"
RUN = ("generate", "trace", "replay")
RUN_PAGES = ("README.md", "docs/quick_start.md", "docs/trace.md")
"""Of the others, which say the same with other settings, lines are checked and not run."""
MAX_TOKENS = 16


@dataclass(frozen=True)
class Block:
    """A block of code: where it is, its language, its text, why it is not run."""

    page: str
    line: int
    kind: str
    code: str
    reason: str | None


def blocks(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        indent = len(match["indent"])
        code = "\n".join(line[indent:] for line in match["code"].splitlines())
        yield Block(page, text.count("\n", 0, match.start("code")), match["kind"], code + "\n", match["reason"])


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders in place of hub names."""
    folder = tmp_path_factory.mktemp("hub")
    target = folder / "target"
    shutil.copytree(embedded_path("target"), target)  # blocks may write there
    (target / "chat_template.jinja").write_text(TEMPLATE)
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_LIKE))
    other.save_pretrained(folder / "other")
    tiny_tokenizer().save_pretrained(folder / "other")
    kinds = {TARGETS: target, DRAFTS: embedded_path("draft"), OTHERS: folder / "other"}
    return {name: str(path) for names, path in kinds.items() for name in names}


def substituted(block: Block, hub: dict[str, str]) -> str:
    def place(match: re.Match[str]) -> str:
        assert match[0] in hub, f"{block.page}:{block.line}: {match[0]} is in none of TARGETS, DRAFTS, OTHERS"
        return hub[match[0]]

    code = HUB_NAME.sub(place, block.code)
    return re.sub(r"(max_new_tokens=)(\d+)", lambda m: m[1] + str(min(int(m[2]), MAX_TOKENS)), code)


def files(folder: Path) -> None:
    """What commands and blocks read."""
    (folder / "main.py").write_text(heldout_prompts(1)[0].text)
    (folder / "prompt.txt").write_text("def main():\n")
    (folder / "task.txt").write_text("Name a prime.\n")
    lines = [{"prompt": [5, 6, 7], "answer": [5, 6, 7, 8, 5, 6, 7, 8]}] * 3
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "prompts.jsonl").write_text('{"prompt": "def f():"}\n')
    shutil.copytree(embedded_path("target") / "medusa", folder / "heads")


def namespace(hub: dict[str, str]) -> dict[str, Any]:
    model, tokenizer = load_embedded("target")
    tokenizer.chat_template = TEMPLATE
    return {
        "specdec": specdec, "torch": torch, "model": model, "tokenizer": tokenizer,
        "draft_model": load_embedded("draft")[0], "inputs": tokenizer("def main():\n    return", return_tensors="pt"),
        "prompts": ["def main():", "import os"], "turns": [], "drafter": "lookahead",
        "DynamicCache": transformers.DynamicCache, "TextStreamer": transformers.TextStreamer,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if any(b.kind == "python" for b in blocks(page))])
def test_python_of_a_page_runs(page: str, hub: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = namespace(hub)
    for block in blocks(page):
        if block.kind == "python":
            code = compile(substituted(block, hub), f"{block.page}:{block.line}", "exec", dont_inherit=True)
            if block.reason is None:
                exec(code, names)


def bash_lines() -> Iterator[tuple[Block, str]]:
    for page in PAGES:
        for block in blocks(page):
            if block.kind == "bash":
                for line in block.code.replace("\\\n", " ").splitlines():
                    for command in re.split(r" && ", line):
                        if shlex.split(command, comments=True):
                            yield block, command


@pytest.mark.parametrize(
    ("block", "line"), [pytest.param(b, line, id=f"{b.page}:{b.line} {line[:40]}") for b, line in bash_lines()]
)
def test_line_of_bash_means_something(
    block: Block, line: str, hub: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = re.sub(r"(?<=--model )smollm2\b", hub["MODEL"], line)  # in place of a model of 135 million parameters
    words = shlex.split(HUB_NAME.sub(lambda m: hub.get(m[0], m[0]), line), comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    checks = {
        "specdec": specdec_line, "make": make_line, "pip": pip_line, "python": python_line,
        "bash": script_line, "torchrun": launched_line, "accelerate": launched_line,
        **dict.fromkeys(("cd", "git", "pytest", "source", "vllm"), known_line),
    }  # fmt: skip
    assert words[0] in checks, f"{block.page}: what is {words[0]}? Teach this test, or make it a block of text"
    checks[words[0]](words[1:])
    if words[0] == "specdec" and words[1] in RUN and block.page in RUN_PAGES and block.reason is None:
        files(tmp_path)
        monkeypatch.chdir(tmp_path)
        more = [] if words[1] == "replay" else ["--max-new-tokens", "8"]
        result = CliRunner().invoke(app, [*words[1:], *more])
        assert result.exit_code == 0, result.output + result.stderr


def specdec_line(words: list[str]) -> None:
    """Command, options and values are parsed as the command line does, drafters with their settings."""
    commands: Any = get_command(app)
    assert words[0] in commands.commands, f"specdec has no command {words[0]}"
    command = commands.commands[words[0]]
    if "--help" in words:
        return
    settings = command.make_context(words[0], words[1:]).params
    if isinstance(settings.get("drafter"), str):
        DrafterFlags(settings["drafter"], settings.get("drafter_option") or [], settings.get("model") or "embedded")
    for text in settings["drafter"] or [] if words[0] == "bench" else []:
        _parsed(text, settings["model"], settings.get("draft_model"))


def make_line(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for word in words:
        assert word in targets or re.fullmatch(r"[A-Z_]+=.*", word), f"there is no target {word}"


def pip_line(words: list[str]) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] == "install"
    for extras in re.findall(r"\[(.*?)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(known)


def python_line(words: list[str]) -> None:
    """The script exists and knows the options."""
    if words[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[2:] if not word.startswith("-"))
        return
    source = (ROOT / words[0]).read_text()
    for option in re.findall(r"--([a-z-]+)", " ".join(words[1:])):
        assert f"--{option}" in source or f"{option.replace('-', '_')}:" in source, f"{words[0]} has no --{option}"


def launched_line(words: list[str]) -> None:
    """What a launcher starts."""
    started = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "-m")
    if words[started] == "-m":
        assert words[started + 1] == "specdec"
        specdec_line(words[started + 2 :])
    elif words[started].startswith("examples/"):
        python_line(words[started:])


def script_line(words: list[str]) -> None:
    script = ROOT / words[0]
    assert script.is_file(), f"{words[0]} does not exist"
    named = script.read_text(encoding="utf-8")
    assert all(word in named for word in words[2:]), f"{words[0]} knows nothing of some of {words[2:]}"


def known_line(words: list[str]) -> None:
    """Other people's programs."""


def test_blocks_have_a_language_and_a_reason_is_given() -> None:
    found = [block for page in PAGES for block in blocks(page)]
    assert {block.kind for block in found} <= {"python", "bash", "text"}
    assert (
        len(found)
        == sum(len(re.findall(r"^ *```", (ROOT / page).read_text(encoding="utf-8"), re.M)) for page in PAGES) / 2
    )
    assert all(block.reason is None or len(block.reason) > 5 for block in found)
    assert os.sep == "/"


def test_substitution_takes_hub_names_and_nothing_else(hub: dict[str, str]) -> None:
    code = 'f("Qwen/Qwen3-8B", "heads/", "a/b.py", x=1/2, max_new_tokens=256)\nspecdec x --model Qwen/Qwen3-0.6B\n'
    made = substituted(Block("page", 1, "python", code, None), hub)
    assert made.count(hub["Qwen/Qwen3-8B"]) == 2 and '"heads/", "a/b.py", x=1/2, max_new_tokens=16' in made
    with pytest.raises(AssertionError, match="Mistral-7B is in none of"):
        substituted(Block("page", 1, "python", 'f("mistralai/M", "Mistral/Mistral-7B")', None), hub)
