"""A trace tells of each token which pass gave it and who had drafted it, in the terminal and as a page."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import specdec
from specdec.budget import Budget
from specdec.cli import app
from specdec.common.embedded import load_embedded
from specdec.drafters import DraftContext, Drafter, LookaheadDrafter, MergedDrafter, RecyclingDrafter
from specdec.inspection.trace import Trace, token_pieces
from specdec.inspection.trace_view import TINTS
from specdec.tree import TokenTree
from tests.test_cli import save_model
from tests.tiny_models import prompts, tiny_model, tiny_tokenizer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.parametrize("do_sample", [False, True])
def test_trace_holds_every_token_and_agrees_with_the_report(do_sample: bool) -> None:
    inputs, kwargs = prompts(9, 5, 7), {"max_new_tokens": 24, "do_sample": do_sample}
    torch.manual_seed(3)
    plain = tiny_model().generate(**inputs, **kwargs)
    sources, budget = [LookaheadDrafter(), RecyclingDrafter()], Budget(16, fixed=True)
    fast = specdec.accelerate(tiny_model(), sources, budget=budget, deterministic=True)  # all are asked in each step
    torch.manual_seed(3)
    output = fast.generate(**inputs, **kwargs, trace=True)
    assert torch.equal(output, plain)
    trace, report = fast.report.trace, fast.report
    assert trace is not None
    for row, ids in enumerate(output.tolist()):
        new = [token for made in trace.of_row(row) for token in made.tokens]
        assert new == ids[9 : 9 + len(new)]
        assert trace.prompts[row] == inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
    assert trace.num_tokens == report.num_generated_tokens
    assert len(trace.passes) == report.num_row_passes
    assert trace.passes[-1].number == report.num_target_passes - 1
    assert sum(made.num_drafted for made in trace.passes) == report.num_draft_tokens
    accepted = [names for made in trace.passes for names in made.sources]
    assert len(accepted) == report.num_accepted_tokens > 0
    for name, figures in report.drafter_figures.items():  # the merged drafter counts for itself
        assert figures["alone"] == trace.count((name,))
        assert figures["accepted"] == sum(name in names for names in accepted)
    assert set(trace.sources) == set(accepted)
    assert "trace" not in report.to_dict() and "Trace" not in str(report)
    fast.generate(**inputs, **kwargs)
    assert fast.report.trace is None


class Oracle(Drafter):
    """Proposes what the target will say, as a chain under a name."""

    def __init__(self, name: str, future: list[int], length: int) -> None:
        self.name, self.future, self.length = name, future, length

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        (sequence,), (depth,) = context.sequences, context.max_depth
        chain = self.future[len(sequence) : len(sequence) + min(self.length, depth, max_nodes - 1)]
        return TokenTree.from_rows([[int(sequence[-1]), *chain]], [range(-1, len(chain))])


def test_a_token_is_credited_to_those_who_named_it() -> None:
    inputs = prompts(6)
    kwargs: Any = {**inputs, "max_new_tokens": 13, "min_new_tokens": 13, "do_sample": False}
    future = tiny_model().generate(**kwargs)[0].tolist()
    merged = MergedDrafter([Oracle("short", future, 1), Oracle("long", future, 3)])
    speculation = specdec.speculate(merged, budget=Budget(8, fixed=True), trace=True)
    tiny_model().generate(**kwargs, custom_generate=speculation)
    trace = speculation.report.trace
    assert trace is not None
    assert [len(made.tokens) for made in trace.passes] == [1, 4, 4, 4]
    assert all(made.sources == [("short", "long"), ("long",), ("long",)] for made in trace.passes[1:])
    assert trace.sources == [("long",), ("short", "long")]
    assert trace.count(()) == 4


def test_no_trace_of_what_others_have_done() -> None:
    fast = specdec.accelerate(tiny_model())
    with pytest.warns(UserWarning, match="beam search"):
        fast.generate(**prompts(5), max_new_tokens=4, num_beams=2, do_sample=False, trace=True)
    assert fast.report.trace is None and fast.report.fallback is not None


def test_pieces_are_the_text_of_all_tokens() -> None:
    tokenizer = load_embedded("target")[1]
    for text in ("def f(a):\n    return 'naïve — 日本語 🌍🌍'\n", "", "\n\n", " x", "🌍"):
        ids = tokenizer(text).input_ids
        assert "".join(token_pieces(ids, tokenizer)) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    ids = tokenizer("a 🌍 b").input_ids
    cut = ids[: next(n for n in range(1, len(ids)) if "�" in tokenizer.decode(ids[:n]))]
    assert "".join(token_pieces(cut, tokenizer)) == tokenizer.decode(cut)


class _Page(HTMLParser):
    """Text, tags and attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[tuple[str, str]] = []
        self.found: list[tuple[str, dict[str, Any]]] = []
        self.stack: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))
        if tag != "meta":
            self.stack.append((tag, dict(attrs).get("class", "")))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, kinds in reversed(self.stack):
            if kinds and kinds != "n":
                self.texts.append((kinds, data))
                return


HOSTILE = ["<script>alert(1)</script>", "&amp;", "'\"", "\x1b[31m", "a", "\n", "]", "[bold]", "日"]


class _Words:
    """A tokenizer whose token i is the word i."""

    def decode(self, tokens: list[int], **kwargs: Any) -> str:
        return "".join(HOSTILE[token] for token in tokens)


def hostile_trace() -> Trace:
    """All hostile words, in the prompt and in drafts of sources with hostile names."""
    words = list(range(len(HOSTILE)))
    trace = Trace([words], "lookahead", "token-identical")
    trace.add_pass([0], [[0]], [[]], [0])
    trace.add_pass([0], [words], [[("<b>",)] * 4 + [("<b>", "x")] * (len(words) - 5)], [30])
    return trace


def test_page_is_whole_and_escapes_what_the_model_wrote() -> None:
    page = hostile_trace().to_html(_Words())
    parsed = _Page(page)
    assert not parsed.stack
    tags = {tag for tag, _ in parsed.found}
    assert tags == {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "p",
        "ul",
        "li",
        "span",
        "div",
        "a",
        "i",
        "pre",
    }
    assert not any({"src", "onclick"} & set(attrs) for _, attrs in parsed.found)
    assert all(attrs["href"].startswith("#") for tag, attrs in parsed.found if tag == "a")
    assert "url(" not in page and "@import" not in page and "http" not in page
    words = "".join(HOSTILE).replace("\x1b", "␛")
    assert "".join(text for kind, text in parsed.texts if kind == "prompt") == words
    generated = [text for kind, text in parsed.texts if re.fullmatch(r"t s\d|own", kind)]
    assert "".join(generated).replace("\xa0", "").endswith(HOSTILE[0] + words)
    told = [attrs["data-t"] for tag, attrs in parsed.found if tag == "span" and "data-t" in attrs]
    assert re.fullmatch(r"pass 0, 1 token, [\d.]+ ms, the prompt was read: the target's own", told[0])
    assert re.fullmatch(r"pass 1, 9 tokens, [\d.]+ ms, 8 of 30 draft tokens accepted: <b> \+ x, depth 6", told[6])
    anchors = {attrs["href"][1:] for tag, attrs in parsed.found if tag == "a"}
    assert anchors == {attrs["id"] for _, attrs in parsed.found if "id" in attrs} == {"r0p0", "r0p1"}
    heights = [attrs["style"] for tag, attrs in parsed.found if tag == "i"]
    assert len(heights) == 10


def test_long_prompt_is_folded_and_rows_have_headings() -> None:
    trace = Trace([[4] * 2000, [4]], "lookahead", "token-identical")
    trace.add_pass([0, 1], [[4], [4, 4]], [[], [("x",)]], [0, 1])
    page = trace.to_html(_Words())
    assert "The prompt, 2000 characters" in page
    assert page.count("<h2>Row") == 2


def test_terminal_shows_text_and_counts() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="truecolor", record=True)
    hostile_trace().show(_Words(), console)
    text = console.export_text()
    assert "".join(HOSTILE).replace("\x1b", "␛") in text
    assert "10 tokens in 2 passes of the target, 5.00 per pass" in text
    assert " <b>  4    <b> + x  4   the target's own 2, one per pass" in text
    assert re.search(r"^9 +1 +█+", text, re.MULTILINE)
    written: Any = console.file
    assert "\x1b[31m" not in written.getvalue()


def test_command_shows_and_writes(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", layers=1, seed=0)
    page = tmp_path / "out" / "trace.html"
    args = ["trace", "abcabcabc", "--model", str(folder), "--max-new-tokens", "12", "--width", "90"]
    result = CliRunner().invoke(app, [*args, "--drafter", "lookahead", "--output", str(page)])
    assert result.exit_code == 0, result.output
    assert "abcabcabc" in result.stdout and "drafter lookahead, verifier exact" in result.stdout
    assert "12 tokens in" in page.read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_page_reads_well_in_a_browser(tmp_path: Path) -> None:
    from PIL import Image

    tokenizer = tiny_tokenizer()
    trace = Trace([tokenizer("prompt").input_ids], "auto", "token-identical")
    for number, name in enumerate("abcd"):
        ids = tokenizer(name * 12).input_ids
        trace.add_pass([0], [ids], [[(name,)] * (len(ids) - 1)], [16 + number])
    page = trace.save(tmp_path / "trace.html", tokenizer)
    colours = [tuple(int(tint[i : i + 2], 16) for i in (1, 3, 5)) for tint in TINTS[:4]]
    for mode, scheme, background in (("light", 1, (255, 255, 255)), ("dark", 0, (22, 24, 28))):
        picture = tmp_path / f"{mode}.png"
        command = [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=900,500",
            f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}",
            f"--screenshot={picture}", page.as_uri(),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        pixels = np.asarray(Image.open(picture).convert("RGB"))
        counts = {colour: int((pixels == colour).all(-1).sum()) for colour in [background, *colours]}
        assert counts[background] > pixels.shape[0] * pixels.shape[1] / 2
        assert all(counts[colour] > 300 for colour in colours), counts  # legend, bars and text
        # Nothing is cut off on the right.
        assert (pixels[:, -20:] == background).all(-1).mean() > 0.9
