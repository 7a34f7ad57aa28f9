"""Exact speculative decoding for Hugging Face causal language models."""

from specdec.api import SpeculativeModel, accelerate, speculate
from specdec.report import SpeculationReport
from specdec.tree import TokenTree

__version__ = "0.1.0"
__all__ = ["SpeculationReport", "SpeculativeModel", "TokenTree", "accelerate", "speculate"]
