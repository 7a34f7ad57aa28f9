"""The oldest supported torch has every name that the package takes from torch; CI has no CPU build of it to run."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.compat import torch_names

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def test_names_are_those_of_the_oldest_torch() -> None:
    new = torch_names.used() - torch_names.known()
    assert not new, (
        f"{', '.join(sorted(new))}: nobody has looked whether the oldest supported torch has it. Run "
        "`python -m tests.compat.torch_names --write` with that torch, or find the name in its documentation and add "
        f"it to {torch_names.KNOWN.name}"
    )


def test_list_is_of_the_version_in_pyproject() -> None:
    requirements = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    oldest = next(r.removeprefix("torch>=") for r in requirements if r.startswith("torch>="))
    first = torch_names.KNOWN.read_text(encoding="utf-8").splitlines()[0]
    assert re.match(rf"# Names of torch {re.escape(oldest)}\.", first)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch\nx = torch.cuda.is_available()", {"torch", "torch.cuda.is_available", "torch.cuda"}),
        ("import torch.nn.functional as F\nF.pad(x)", {"torch.nn.functional", "torch.nn.functional.pad"}),
        ("def f():\n    from torch import nn\n    return nn.Linear", {"torch.nn", "torch.nn.Linear"}),
        ("import numpy as torchy\ntorchy.zeros(3)", set()),
    ],
)
def test_names_are_found(source: str, names: set[str]) -> None:
    assert set(torch_names._of_source(source)) == names


def test_missing_names_are_seen() -> None:
    assert torch_names.exists("torch.nn.functional.scaled_dot_product_attention")
    assert not torch_names.exists("torch.nn.functional.no_such_function")
    assert not torch_names.exists("torch.no_such_module.function")
