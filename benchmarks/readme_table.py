"""Fills the measured tables of the README and of docs/ from benchmarks/results.

    python benchmarks/readme_table.py            # writes
    python benchmarks/readme_table.py --check    # exit code 1 if a table is out of date

With `categories` among the parts the table has a column per category of prompts, with the speed-up in it.
A table stands between `<!-- measured: NAME PART -->` and `<!-- end -->`. NAME is a file that `specdec bench --json`
or a script of this folder wrote, and PART is that of the benchmark; all parts without one. Approximate methods have a
table of their own.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SLOT = re.compile(r"(<!-- measured: (?P<name>[\w-]+)(?: (?P<parts>[\w ,.=-]+?))? -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_MEASURED = (
    "*Not measured yet: `specdec bench --json benchmarks/results/{}.json && python benchmarks/readme_table.py`*\n"
)
CATEGORIES = "categories"
HEADINGS = {
    "greedy": "greedy (T=0)",
    "T=0.8": "sampled (T=0.8)",
    "sampled": "sampled (T=1)",
    "incompressible": "random tokens (T=1)",
}

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, add_completion=False)


def filled(text: str, results: Path = RESULTS) -> str:
    """A document with its tables as the result files have them."""

    def table(match: re.Match[str]) -> str:
        file = results / f"{match['name']}.json"
        body = NOT_MEASURED.format(match["name"])
        if file.exists():
            body = measured_table(json.loads(file.read_text()), (match["parts"] or "").replace(",", " ").split())
        return match[1] + body + match[4]

    return SLOT.sub(table, text)


def measured_table(results: dict[str, Any], parts: list[str]) -> str:
    """Markdown: one row per method, and a line on how it was measured."""
    if "judge" in results.get("settings", {}):
        return reasoning_table(results, parts)
    chosen = {name: part for name, part in results["parts"].items() if name in parts or not parts}
    if CATEGORIES in parts:
        return "\n".join([*_category_rows(chosen), "", _conditions(results, chosen), ""])
    rows = {name: {row["method"]: row for row in part["methods"]} for name, part in chosen.items()}
    methods = dict.fromkeys(method for part in rows.values() for method in part)
    approximate = [
        method
        for method in methods
        if any(part.get(method, {}).get("guarantee") == "approximate" for part in rows.values())
    ]
    lines = _rows(rows, [method for method in methods if method not in approximate])
    if approximate:
        lines += ["", "Approximate: the output may differ.", "", *_rows(rows, approximate)]
    return "\n".join([*lines, "", _conditions(results, chosen), ""])


def _category_rows(parts: dict[str, Any]) -> list[str]:
    """Speed-up by category of one part, and tokens per pass over all."""
    rows = next(iter(parts.values()))["methods"]
    categories = list(dict.fromkeys(name for row in rows for name in row["speedup_by_category"]))
    lines = [f"| method | tokens per pass | {' | '.join(categories)} |", "|---" + "|---:" * (len(categories) + 1) + "|"]
    for row in rows:
        found = [row["speedup_by_category"].get(name) for name in categories]
        per_pass = "–" if row["tokens_per_pass"] is None else f"{row['tokens_per_pass']:.2f}"
        cells = [per_pass, *("–" if value is None else f"{value:.2f}×" for value in found)]
        lines.append(f"| {row['method']} | {' | '.join(cells)} |")
    return lines


def _rows(rows: dict[str, dict[str, Any]], methods: list[str]) -> list[str]:
    columns = [
        f"{HEADINGS.get(name, name)}: {figure}" for name in rows for figure in ("tokens/s", "speed-up", "identical")
    ]
    lines = ["| method | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for method in methods:
        cells = [cell for part in rows.values() for cell in _cells(part.get(method))]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def reasoning_table(results: dict[str, Any], parts: list[str]) -> str:
    """Markdown of a part of benchmarks/bench_reasoning.py."""
    lines = []
    for rows in (results["parts"][part] for part in parts or results["parts"]):
        lines += [
            "| method | solved | s a problem | speed-up | steps kept | tokens | same text |",
            "|---" * 7 + "|",
        ]
        for row in rows:
            kept = "" if row["kept_share"] is None else f"{row['kept_share']:.0%}"
            figures = (f"{row['accuracy']:.1%}", f"{row['mean_seconds']:.3f}", f"{row['speedup']:.2f}×", kept)
            same = f"{row['num_identical']} of {results['settings']['problems']}"
            lines.append(f"| {row['method']} | {' | '.join(figures)} | {row['mean_tokens']:.0f} | {same} |")
        lines.append("")
    settings, machine, versions = (results[name] for name in ("settings", "hardware", "versions"))
    first, last = settings["first_problem"], settings["first_problem"] + settings["problems"] - 1
    threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    told = [
        f"Held-out problems {first} to {last}, greedy, batch 1, judge `{settings['judge']}`",
        f"{machine['cpu']}, {threads}",
        f"torch {versions['torch']}, transformers {versions['transformers']}",
        f"commit {(results['commit'] or 'unknown')[:12]}. Mean seconds; speed-up against the first row: median.",
    ]
    return "\n".join([*lines, "; ".join(told), ""])


def _cells(row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return ["–"] * 3
    identical = "yes" if row["num_identical"] == row["num_runs"] else f"{row['num_identical']} of {row['num_runs']}"
    return [f"{row['tokens_per_second']:.0f}", f"{row['speedup']:.2f}×", identical]


def _conditions(results: dict[str, Any], parts: dict[str, Any]) -> str:
    machine, versions, models = results["hardware"], results["versions"], results["models"]
    where = ", ".join(machine["gpus"]) if models["target"]["device"] != "cpu" else machine["cpu"]
    named = ", ".join(f"{kind} {_described(model)}" for kind, model in models.items() if model)
    tokens = next(iter(parts.values()))["settings"]["arguments"]["max_new_tokens"]
    reference = next(iter(parts.values()))["reference"]
    batch = results["batch"] if isinstance(results["batch"], int) else " or ".join(map(str, results["batch"]))
    command = f" Measured with `{results['command']}`." if results["command"].startswith("specdec bench") else ""
    return (
        f"Median of {results['num_prompts']} prompts, {tokens} tokens each, batch {batch}; {named}; "
        f"{where}, {machine['threads']} threads; torch {versions['torch']}, transformers {versions['transformers']}; "
        f"commit {(results['commit'] or 'unknown')[:12]}. Speed-up and identical: against {reference}.{command}"
    )


def _described(model: dict[str, Any]) -> str:
    return f"{model['name']} ({model['parameters'] / 1e6:.1f} M, {model['dtype']})"


@app.command()
def main(check: Annotated[bool, typer.Option("--check", help="Write nothing.")] = False) -> None:
    """Fill the tables of README.md and docs/*.md."""
    stale = []
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        old = file.read_text(encoding="utf-8")
        new = filled(old)
        if new != old:
            stale.append(str(file.relative_to(ROOT)))
            if not check:
                file.write_text(new, encoding="utf-8")
    print(
        "\n".join(f"{'out of date' if check else 'written'}: {name}" for name in stale) or "all tables are up to date"
    )
    raise typer.Exit(1 if check and stale else 0)


if __name__ == "__main__":
    app()
