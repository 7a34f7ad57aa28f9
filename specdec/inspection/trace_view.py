"""A trace in the terminal, and as an HTML page."""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from specdec.inspection.trace import Sources, Trace, TracedPass, token_pieces

ANSI = [*(f"bright_{name}" for name in ("cyan", "yellow", "green", "magenta", "red", "blue", "white")), "white"]
"""Behind black text in a terminal, which may not have more than 16 colours."""
TINTS = ("#9BD3F5", "#FFCF70", "#8FDCC0", "#EBB4D2", "#F5A57A", "#F4EC7A", "#C9B8F0", "#C8C8C8")
"""Behind black text: Okabe and Ito's colours, lighter, which can be told apart without red and green, and two more."""
OWN = "the target's own"
MAX_TEXT_BAR = 40
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
"""Control characters could steer a terminal; their pictures cannot."""


def plural(count: int, noun: str) -> str:
    """Such as "1 token" or "2 tokens"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}{'es' if noun.endswith('s') else 's'}"


def numbered(trace: Trace) -> dict[Sources, int]:
    """The number of a colour for each combination of sources; the rarest ones share the last."""
    return {sources: min(i, len(TINTS) - 1) for i, sources in enumerate(trace.sources)}


def visible(piece: str) -> str:
    """The text of a token, without characters that would not show, or do harm."""
    return piece.translate(PICTURES)


def summary(trace: Trace) -> str:
    """One line on the whole call."""
    tokens, passes = plural(trace.num_tokens, "token"), plural(len(trace.passes), "pass")
    per_pass = trace.num_tokens / max(len(trace.passes), 1)
    return f"{tokens} in {passes} of the target, {per_pass:.2f} per pass; drafter {trace.method}: {trace.guarantee}"


def trace_text(trace: Trace, tokenizer: Any) -> Group:
    """Summary, legend, the text of each row, and how many tokens the passes gave.

    Args:
        trace: Of a call.
        tokenizer: The target's.
    """
    colours = {sources: ANSI[number] for sources, number in numbered(trace).items()}
    rows = []
    for row in range(len(trace.prompts)):
        if len(trace.prompts) > 1:
            rows.append(Text(f"\nrow {row + 1} of {len(trace.prompts)}", style="bold"))
        rows.append(_row_text(trace, row, colours, tokenizer))
    return Group(Text(summary(trace)), _legend(trace, colours), Text(), *rows, Text(), _tokens_by_pass(trace))


def _row_text(trace: Trace, row: int, colours: dict[Sources, str], tokenizer: Any) -> Text:
    shown, passes = _row_pieces(trace, row, tokenizer)
    text = Text(visible(shown), style="dim")
    for made, pieces in passes:
        for piece, sources in zip(pieces, made.sources_by_token, strict=True):
            text.append(visible(piece), style=f"not dim black on {colours[sources]}" if sources else "not dim")
    return text


def _row_pieces(trace: Trace, row: int, tokenizer: Any) -> tuple[str, list[tuple[TracedPass, list[str]]]]:
    """The prompt's text, and each pass of a row with the text of its tokens."""
    prompt, made = trace.prompts[row], trace.of_row(row)
    pieces = token_pieces([*prompt, *(token for one in made for token in one.tokens)], tokenizer)
    rest = iter(pieces[len(prompt) :])
    return "".join(pieces[: len(prompt)]), [(one, [next(rest) for _ in one.tokens]) for one in made]


def _legend(trace: Trace, colours: dict[Sources, str]) -> Text:
    text = Text()
    for sources, colour in colours.items():
        text.append(f" {' + '.join(sources)} ", style=f"black on {colour}").append(f" {trace.count(sources)}   ")
    own, each = trace.count(()), ", one per pass" if trace.count(()) == len(trace.passes) else ""
    return text.append(f"{OWN} {own}{each}   ").append("prompt", style="dim")


def _tokens_by_pass(trace: Trace) -> Table:
    counts = Counter(len(made.tokens) for made in trace.passes)
    table = Table("tokens", "passes", "", title="tokens per pass", title_justify="left", box=None, pad_edge=False)
    for tokens in sorted(counts):
        bar = "█" * max(1, round(MAX_TEXT_BAR * counts[tokens] / max(counts.values())))
        table.add_row(str(tokens), str(counts[tokens]), bar)
    return table


UNDERLINES = ("dashed", "dotted", "double", "wavy", "solid")
"""In print, where colours may be lost."""
LONG_PROMPT = 1500
MAX_BAR, MAX_UNIT = 120, 12
STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1a1a1a; --soft: #6b6b6b; --line: #d9d9d9; --own: #8a8a8a; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181c; --ink: #e6e6e6; --soft: #9aa0a6; --line: #3a3d42; --own: #70757c; }
}
body { margin: 2rem auto 4rem; max-width: 62rem; padding: 0 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .3rem; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .3rem; }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; padding: 0; margin: 1rem 0; list-style: none; }
pre { font: 14px/1.75 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  tab-size: 4; border: 1px solid var(--line); border-radius: 6px; padding: 1rem; }
.prompt, summary, .told { color: var(--soft); }
.t { color: #111; border-radius: 3px; } .own { border-bottom: 2px solid var(--own); }
.told { font-size: .85rem; margin: .3rem 0 1rem; }
.pass:target { outline: 2px solid var(--ink); outline-offset: 2px; border-radius: 3px; }
.pass .n::before { content: "\\23CE"; opacity: .45; }
.bars { display: flex; flex-wrap: wrap; align-items: flex-end; gap: 6px 2px; padding: 0; margin: .6rem 0; }
.bars a { display: block; width: 9px; } .bars i { display: block; margin-top: 1px; border-radius: 1px; }
.bars .o { background: var(--own); }
[data-t]:hover { filter: brightness(.88); }
[data-t]:hover::after { content: attr(data-t); position: fixed; inset: auto 0 0 0; padding: .6rem 1rem; z-index: 1;
  background: var(--ink); color: var(--page); font: 15px/1.4 system-ui, sans-serif; white-space: normal; }
@media print {
  :root { --page: #fff; --ink: #000; --soft: #555; --line: #bbb; --own: #666; }
  body { margin: 0; max-width: none; } pre { border: none; padding: 0; }
  .t, .bars i { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
"""


def trace_html(trace: Trace, tokenizer: Any) -> str:
    """The page: summary, legend, a bar per pass, and each row's text, every token with its pass, source and depth.

    Nothing is loaded from elsewhere and nothing is run. Text is escaped, whatever the model wrote.

    Args:
        trace: Of a call.
        tokenizer: The target's.
    """
    classes = {sources: f"s{number}" for sources, number in numbered(trace).items()}
    rows = [_row_html(trace, row, classes, tokenizer) for row in range(len(trace.prompts))]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Where each token came from</title>\n<style>{_style()}</style>\n</head>\n<body>",
            f"<h1>Where each token came from</h1>\n<p>{escape(summary(trace))}</p>",
            _legend_html(trace, classes),
            *rows,
            "</body>\n</html>\n",
        ]
    )


def _style() -> str:
    """The style sheet, with a colour for each combination of sources, and an underline in its place on paper."""
    colours = "".join(f".s{i} {{ background: {tint}; }}\n" for i, tint in enumerate(TINTS))
    lines = "".join(
        f"  .t.s{i} {{ text-decoration: underline {UNDERLINES[i % len(UNDERLINES)]}; }}\n" for i in range(len(TINTS))
    )
    return f"{STYLE}{lines}}}\n{colours}"


def _legend_html(trace: Trace, classes: dict[Sources, str]) -> str:
    total = max(trace.num_tokens, 1)
    entries = [
        f'<li><span class="t {name}">&nbsp;{escape(" + ".join(sources))}&nbsp;</span> '
        f"{plural(trace.count(sources), 'token')}, {trace.count(sources) / total:.0%}</li>"
        for sources, name in classes.items()
    ]
    own = f'<li><span class="own">&nbsp;{OWN}&nbsp;</span> {trace.count(())}, one at the end of each pass</li>'
    return f'<ul class="legend">{"".join(entries)}{own}</ul>'


def _row_html(trace: Trace, row: int, classes: dict[Sources, str], tokenizer: Any) -> str:
    """Bars and text of a row."""
    title = f"<h2>Row {row + 1} of {len(trace.prompts)}</h2>\n" if len(trace.prompts) > 1 else ""
    shown, passes = _row_pieces(trace, row, tokenizer)
    text = "".join(_pass_html(made, pieces, classes) for made, pieces in passes)
    return f"{title}{_bars([made for made, _ in passes], classes)}\n{_prompt_html(shown)}{text}</pre>"


def _prompt_html(text: str) -> str:
    """The prompt, folded away where it is long, and the beginning of the text."""
    shown = f'<span class="prompt">{_escaped(text)}</span>'
    if len(text) <= LONG_PROMPT:
        return f'<pre dir="auto">{shown}'
    folded = f"<details><summary>The prompt, {len(text)} characters</summary><pre>{shown}</pre></details>"
    return f'{folded}\n<pre dir="auto">'


def _pass_html(made: TracedPass, pieces: list[str], classes: dict[Sources, str]) -> str:
    spans = []
    for depth, (piece, sources) in enumerate(zip(pieces, made.sources_by_token, strict=True), start=1):
        kind = f"t {classes[sources]}" if sources else "own"
        where = f"{' + '.join(sources)}, depth {depth}" if sources else OWN
        spans.append(f'<span class="{kind}" data-t="{escape(f"{_about(made)}: {where}")}">{_escaped(piece)}</span>')
    return f'<span class="pass" id="{_name(made)}">{"".join(spans)}</span>'


def _bars(passes: list[TracedPass], classes: dict[Sources, str]) -> str:
    """A bar per pass, as high as it gave tokens; each leads to its place in the text."""
    unit = max(2, min(MAX_UNIT, MAX_BAR // max((len(made.tokens) for made in passes), default=1)))
    bars = []
    for made in passes:
        kinds = [classes[sources] if sources else "o" for sources in reversed(made.sources_by_token)]
        parts = "".join(f'<i class="{kind}" style="height:{unit}px"></i>' for kind in kinds)
        bars.append(f'<a href="#{_name(made)}" data-t="{escape(_about(made))}">{parts}</a>')
    most = max((len(made.tokens) for made in passes), default=0)
    told = f"A bar per pass of the target: the tokens that it gave, {most} at most. A bar leads to its text."
    return f'<div class="bars">{"".join(bars)}</div>\n<p class="told">{told}</p>'


def _name(made: TracedPass) -> str:
    return f"r{made.row}p{made.number}"


def _about(made: TracedPass) -> str:
    """The pass, in words."""
    if made.num_drafted:
        drafts = f"{len(made.sources)} of {made.num_drafted} draft tokens accepted"
    else:
        drafts = "the prompt was read" if made.number == 0 else "nothing was drafted"
    return f"pass {made.number}, {plural(len(made.tokens), 'token')}, {made.seconds * 1e3:.1f} ms, {drafts}"


def _escaped(text: str) -> str:
    """Text of tokens; ends of lines are shown, because a colour behind them is not."""
    return escape(visible(text)).replace("\n", '<span class="n"></span>\n')
