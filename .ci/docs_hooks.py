"""What mkdocs builds beside docs/*.md, so that no page stands in the repository twice.

README.md is the home page; CONTRIBUTING.md and CHANGELOG.md are pages; the reference is made of docstrings.
Links between pages are made to fit. Links to other files of the repository have no page to go to: their text is kept.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
REFERENCE = {
    "specdec": [
        "specdec.api",
        "specdec.session",
        "specdec.generation",
        "specdec.report",
        "specdec.tree",
        "specdec.inspection.trace",
        "specdec.budget",
    ],
    "drafters": ["base", "lookahead", "medusa", "eagle3", "draft_model", "recycling", "merged", "auto"],
    "verifiers": ["base", "exact", "block", "traversal", "typical"],
    "heads": ["medusa", "eagle3", "config"],
    "training": ["config", "medusa", "distillation", "tree_tuning"],
    "benchmark": ["settings", "methods", "runner", "results", "prompts", "comparison"],
}
"""Modules by page."""
MORE = {
    "specdec.inspection.audit",
    "specdec.drafters.spec_reason",
    "specdec.verifiers.step",
    "specdec.verifiers.judges",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"(^```.*?^```\s*$)", re.MULTILINE | re.DOTALL)


def modules(page: str) -> list[str]:
    """Full names of the modules of a page of reference."""
    found = [name if "." in name else f"specdec.{page}.{name}" for name in REFERENCE[page]]
    here = {name for name in MORE if name.rpartition(".")[0] == f"specdec.{page}".removesuffix(".specdec")}
    return [*found, *sorted(name for name in here if (ROOT / f"{name.replace('.', '/')}.py").exists())]


def on_config(config: Any) -> Any:
    """The reference, and pages that nobody has given a place, come last in the navigation."""
    named = re.findall(r"[\w/]+\.md", str(config.nav))
    others = sorted(file.name for file in (ROOT / "docs").glob("*.md") if file.name not in named)
    if others:
        config.nav.append({"More": others})
    config.nav.append({"Reference": [{page: f"reference/{page}.md"} for page in REFERENCE]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are no files of docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for page in REFERENCE:
        parts = "\n".join(f"## {name}\n\n::: {name}\n    options:\n      heading_level: 3\n" for name in modules(page))
        files.append(File.generated(config, f"reference/{page}.md", content=f"# {page}\n\n{parts}"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Makes links fit."""
    source = page.file.src_uri
    if source.startswith("reference/"):
        return markdown
    folder = "" if source in PAGES.values() else "docs"
    known = {file.src_uri for file in files}

    def fitted(match: re.Match[str]) -> str:
        picture, text, target, anchor = match.groups()
        path = (ROOT / folder / target).resolve().relative_to(ROOT).as_posix()
        to = PAGES.get(path, path.removeprefix("docs/"))
        if to in known and (path.startswith("docs/") or path in PAGES):
            return f"{picture}[{text}]({to}{anchor or ''})"
        assert (ROOT / path).exists(), f"{source}: there is no {path}"
        return text

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(fitted, part) for part in parts)
