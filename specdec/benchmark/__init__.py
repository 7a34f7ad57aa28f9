"""Benchmarks: methods of generation against each other, on the same prompts and under the same accounting."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specdec.common.lazy import lazy_names

if TYPE_CHECKING:
    from specdec.benchmark.comparison import Change, compare
    from specdec.benchmark.methods import Contender
    from specdec.benchmark.plots import figures
    from specdec.benchmark.prompts import read_benchmark_prompts
    from specdec.benchmark.results import BenchmarkResults, load_results
    from specdec.benchmark.runner import run_benchmark
    from specdec.benchmark.settings import BenchmarkSettings

__all__ = [
    "BenchmarkResults",
    "BenchmarkSettings",
    "Change",
    "Contender",
    "compare",
    "figures",
    "load_results",
    "read_benchmark_prompts",
    "run_benchmark",
]

_HOMES = {
    "BenchmarkResults": "specdec.benchmark.results",
    "BenchmarkSettings": "specdec.benchmark.settings",
    "Change": "specdec.benchmark.comparison",
    "Contender": "specdec.benchmark.methods",
    "compare": "specdec.benchmark.comparison",
    "figures": "specdec.benchmark.plots",
    "load_results": "specdec.benchmark.results",
    "read_benchmark_prompts": "specdec.benchmark.prompts",
    "run_benchmark": "specdec.benchmark.runner",
}
"""Names are looked up on first use: matplotlib is needed for figures only."""

__getattr__, __dir__ = lazy_names(globals(), _HOMES)
