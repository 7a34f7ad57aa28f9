"""Exact speculative decoding for Hugging Face causal language models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specdec.common.lazy import lazy_names

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

__getattr__, __dir__ = lazy_names(globals(), _HOMES)
