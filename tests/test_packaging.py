"""The folders at the root are one package, and only under the name specdec."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import sys
import textwrap
import tomllib
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

import specdec
from specdec.drafters.base import DraftContext, Drafter
from specdec.tree import TokenTree

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("drafters", "heads", "training", "verifiers")
SOURCES = sorted(path for folder in ("specdec", *FOLDERS) for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_bare_import_names_the_remedy(folder: str) -> None:
    with pytest.raises(ImportError, match=rf"import it as specdec\.{folder}"):
        importlib.import_module(folder)
    assert folder not in sys.modules


@pytest.mark.parametrize("folder", FOLDERS)
def test_symlink_leads_to_the_folder(folder: str) -> None:
    link = ROOT / "specdec" / folder
    assert link.is_symlink(), f"{link} must be a symlink (git config core.symlinks true, then check out again)"
    assert link.readlink() == Path("..") / folder


def test_every_file_is_one_module() -> None:
    names = defaultdict(set)
    for info in pkgutil.walk_packages(specdec.__path__, "specdec."):
        spec = importlib.util.find_spec(info.name)
        assert spec is not None
        assert spec.origin is not None
        names[Path(spec.origin).resolve()].add(info.name)
    assert {path: found for path, found in names.items() if len(found) > 1} == {}
    assert set(SOURCES) - set(names) == {ROOT / "specdec" / "__init__.py"}


def test_class_comes_from_the_folder_at_the_root() -> None:
    module = sys.modules[Drafter.__module__]
    assert Drafter.__module__ == "specdec.drafters.base"
    assert Path(module.__file__ or "").resolve() == ROOT / "drafters" / "base.py"


def test_pyproject_maps_every_linked_folder() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    linked = {path.name for path in (ROOT / "specdec").iterdir() if path.is_symlink()}
    assert linked == set(FOLDERS)
    assert setuptools["package-dir"] == {"specdec": "specdec"} | {f"specdec.{name}": name for name in linked}
    assert "packages" not in setuptools


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for path in SOURCES}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_types_are_shipped() -> None:
    assert (ROOT / "specdec" / "py.typed").is_file()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_file_is_short_enough(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("module", ["specdec", "specdec.drafters.base", __name__, "tests.drafters.test_base"])
def test_own_warnings_are_errors(module: str) -> None:
    with pytest.raises(UserWarning, match="ours"):
        warnings.warn_explicit("ours", UserWarning, "file.py", 1, module=module)


def test_warnings_of_others_are_not_errors() -> None:
    with pytest.warns(UserWarning, match="theirs"):
        warnings.warn_explicit("theirs", UserWarning, "file.py", 1, module="specdecoder")


def test_drafter_of_the_contributors_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?) *```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    (tmp_path / "example_echo.py").write_text(textwrap.dedent(example))
    monkeypatch.syspath_prepend(tmp_path)
    drafter = importlib.import_module("example_echo").EchoDrafter(length=2)
    assert isinstance(drafter, Drafter)

    sequences = [np.array(row, dtype=np.int32) for row in ([5, 6, 7, 8, 5], [1, 2, 3], [9, 9, 9])]
    context = DraftContext(rows=[0, 1, 2], sequences=sequences, prompt_lengths=[3, 3, 3], max_depth=[8, 8, 8])
    tree = drafter.propose(context, max_nodes=8)

    assert isinstance(tree, TokenTree)
    assert tree.tokens.tolist() == [[5, 6, 7], [3, 0, 0], [9, 9, 0]]
    assert tree.parents.tolist() == [[-1, 0, 1], [-1, -1, -1], [-1, 0, -1]]
    assert drafter.propose(context, max_nodes=2).num_nodes == 2
    assert drafter.propose(context, max_nodes=1).num_nodes == 1
