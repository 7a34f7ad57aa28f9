"""Measures the lookahead drafter without a model: time per draft and per indexed token, bytes per token.

    python benchmarks/bench_lookahead.py
    python benchmarks/bench_lookahead.py --tokens 1000000 --source random

Three sources fill the shared scope and give held-out texts to draft for: the Python standard library, text that repeats
itself with small changes (long chains, many matches), and random ids (nothing but chance matches). "warm" drafts follow
one another; before a "cold" one the processor's caches are overwritten, as the target's pass does between drafts.
Processor time leaves out what other programs took. The times of `propose` include 1 us for taking those of the kernels.
"""

from __future__ import annotations

import contextlib
import ctypes
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

import specdec.drafters.lookahead as lookahead_module
from specdec.common.provenance import circumstances, write_json
from specdec.drafters.base import DraftContext
from specdec.drafters.lookahead import LookaheadDrafter

RESULTS = Path(__file__).parent / "results"
TOKENIZER = Path(__file__).parents[1] / "specdec" / "assets" / "embedded" / "target" / "tokenizer.json"
PROMPT_TOKENS, ANSWER_TOKENS, STRIDE = 400, 300, 3
HELD_OUT = 15
M_MMAP_THRESHOLD = -3

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, add_completion=False)

Ids = NDArray[np.int32]


def standard_library() -> Iterator[Ids]:
    """Files of the Python standard library in random but fixed order."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for file in root.rglob("*.py") if "site-packages" not in file.parts)
    for i in np.random.default_rng(0).permutation(len(files)):
        text = files[i].read_text(encoding="utf-8", errors="replace")
        yield np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)


def repetitive(vocab: int = 32_000, paragraphs: int = 500) -> Iterator[Ids]:
    """Documents of paragraphs from a small stock, one token in fifty changed."""
    rng = np.random.default_rng(1)
    stock = (rng.zipf(1.3, (paragraphs, 100)) % vocab).astype(np.int32)
    while True:
        document = stock[rng.integers(0, paragraphs, 20)].ravel()
        yield np.where(rng.random(document.size) < 0.02, rng.integers(0, vocab, document.size), document).astype(
            np.int32
        )


def random_ids(vocab: int = 32_000) -> Iterator[Ids]:
    """Uniform random documents."""
    rng = np.random.default_rng(2)
    while True:
        yield rng.integers(0, vocab, 2000, dtype=np.int32)


SOURCES: dict[str, Callable[[], Iterator[Ids]]] = {
    "stdlib": standard_library,
    "repetitive": repetitive,
    "random": random_ids,
}


def resident_bytes() -> int:
    """Memory of this process that is really there (Linux; 0 elsewhere)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * 4096


def fill(drafter: LookaheadDrafter, documents: Iterator[Ids], tokens: int) -> tuple[list[Ids], dict[str, float]]:
    """Indexes so many tokens; returns the held-out texts and the figures."""
    held_out: list[Ids] = []
    batch: list[Ids] = []
    size = 0
    for document in documents:
        if len(held_out) < HELD_OUT and len(document) >= PROMPT_TOKENS + ANSWER_TOKENS:
            held_out.append(document[: PROMPT_TOKENS + ANSWER_TOKENS])
        else:
            batch.append(document)
            size += len(document)
        if size >= tokens:
            break
    resident = resident_bytes()
    began = time.perf_counter()
    drafter.add(batch, scope="shared")
    seconds = time.perf_counter() - began
    stats = drafter.stats()["shared"]
    return held_out, {
        "tokens": stats["tokens"],
        "append_us_per_token": seconds / size * 1e6,
        "bytes_per_token": stats["bytes"] / stats["tokens"],
        "resident_bytes_per_token": (resident_bytes() - resident) / stats["tokens"],
    }


class KernelTimer:
    """Adds up the time inside the compiled functions while it is entered."""

    names = ("draft_row",)

    def __enter__(self) -> KernelTimer:
        self.nanoseconds = 0
        self.functions = [getattr(lookahead_module, name) for name in self.names]
        for name, function in zip(self.names, self.functions, strict=True):
            setattr(lookahead_module, name, self._timed(function))
        return self

    def __exit__(self, *error: object) -> None:
        for name, function in zip(self.names, self.functions, strict=True):
            setattr(lookahead_module, name, function)

    def _timed(self, function: Callable[..., int]) -> Callable[..., int]:
        def timed(*args: Any) -> int:
            began = time.perf_counter_ns()
            result = function(*args)
            self.nanoseconds += time.perf_counter_ns() - began
            return result

        return timed


def draft_times(drafter: LookaheadDrafter, texts: list[Ids], nodes: int, flush_bytes: int) -> dict[str, list[float]]:
    """Microseconds of each draft: `propose` by the clock and in processor time, and the compiled part of it."""
    times: dict[str, list[float]] = {"propose": [], "propose, processor": [], "kernels": [], "nodes": []}
    rubbish = np.zeros(flush_bytes // 8, np.int64)
    with KernelTimer() as kernels:
        for text in texts:
            session = drafter.start(DraftContext([0], [text[:PROMPT_TOKENS]], [PROMPT_TOKENS], [ANSWER_TOKENS]))
            for length in range(PROMPT_TOKENS + 1, len(text), STRIDE):
                context = DraftContext([0], [text[:length]], [PROMPT_TOKENS], [len(text) - length])
                rubbish += 1
                kernels.nanoseconds = 0
                began, began_processor = time.perf_counter_ns(), time.thread_time_ns()
                tree = session.propose(context, nodes)
                ended_processor, ended = time.thread_time_ns(), time.perf_counter_ns()
                times["propose"].append((ended - began) / 1e3)
                times["propose, processor"].append((ended_processor - began_processor) / 1e3)
                times["kernels"].append(kernels.nanoseconds / 1e3)
                times["nodes"].append(tree.num_nodes)
    return times


def measure(source: str, tokens: int, nodes: int, flush_bytes: int) -> dict[str, Any]:
    """All figures of one source."""
    drafter = LookaheadDrafter()
    drafter.start(DraftContext([0], [np.zeros(1, np.int32)], [1], [1]))  # compiles
    texts, figures = fill(drafter, SOURCES[source](), tokens)
    results: dict[str, Any] = {"source": source, **figures}
    for state, size in (("warm", 0), ("cold", flush_bytes)):
        times = draft_times(drafter, texts, nodes, size)
        results["mean_nodes"] = float(np.mean(times.pop("nodes")))
        for what, values in times.items():
            results[f"{what}, {state} (us)"] = {
                "median": float(np.median(values)),
                "mean": float(np.mean(values)),
                "p99": float(np.percentile(values, 99)),
            }
    return results


def table(results: list[dict[str, Any]]) -> Table:
    out = Table(title="Lookahead drafter")
    out.add_column("figure")
    for result in results:
        out.add_column(result["source"], justify="right")
    for key in results[0]:
        if isinstance(results[0][key], dict):
            for name in results[0][key]:
                out.add_row(f"{key} {name}", *(f"{result[key][name]:.1f}" for result in results))
        elif key != "source":
            out.add_row(key, *(f"{result[key]:,.2f}" for result in results))
    return out


@app.command()
def main(
    tokens: Annotated[int, typer.Option(min=1000, help="Tokens indexed in the shared scope.")] = 5_000_000,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes asked for.")] = 64,
    source: Annotated[list[str] | None, typer.Option(help=f"Any of {', '.join(SOURCES)}; all by default.")] = None,
    flush_mib: Annotated[int, typer.Option(min=1, help="Memory overwritten before a cold draft.")] = 32,
    output: Annotated[Path, typer.Option(help="JSON file.")] = RESULTS / "lookahead.json",
) -> None:
    """Measures and prints the figures, and writes them with the circumstances."""
    unknown = set(source or ()) - set(SOURCES)
    if unknown:
        raise typer.BadParameter(f"source must be any of {', '.join(SOURCES)}, got {', '.join(sorted(unknown))}")
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)  # else freed arrays stay resident and count as the index's
    results = [measure(name, tokens, nodes, flush_mib * 2**20) for name in source or SOURCES]
    settings = {"tokens": tokens, "nodes": nodes, "flush_mib": flush_mib, "drafter": LookaheadDrafter().settings()}
    write_json(output, {**circumstances(), "settings": settings, "results": results})
    console = Console()
    console.print(table(results))
    console.print(f"written to {output}")


if __name__ == "__main__":
    app()
