"""Exact speculative decoding for Hugging Face causal language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.api import SpeculativeModel, accelerate, speculate
    from specdec.report import SpeculationReport
    from specdec.tree import TokenTree

__version__ = "0.1.0"
__all__ = ["SpeculationReport", "SpeculativeModel", "TokenTree", "accelerate", "speculate"]

_HOMES = {
    "SpeculationReport": "specdec.report",
    "SpeculativeModel": "specdec.api",
    "TokenTree": "specdec.tree",
    "accelerate": "specdec.api",
    "speculate": "specdec.api",
}
"""Names are looked up on first use, so that `specdec --help` need not wait for torch and transformers."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
