"""Times the first two calls of a new process, against those of the model's own `generate`.

    python benchmarks/bench_cold_start.py
    python benchmarks/bench_cold_start.py --model FOLDER --dtypes bfloat16 --samples 5

Each sample is a process of its own, in turn with and without speculation; the second call has another prompt. The first
process with speculation fills the caches on disk and does not count: the figures are those of every later process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import typer

RESULTS = Path(__file__).parent / "results"
PHASES = ("wrap", "first", "second")
METHODS = ("transformers", "specdec")

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="Folder or hub name of a chat model, or smollm2.")] = "smollm2",
    dtypes: Annotated[str, typer.Option(help="Separated by commas.")] = "float32,bfloat16",
    samples: Annotated[int, typer.Option(min=1, help="Processes per method and dtype.")] = 3,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens per call.")] = 48,
    output: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS / "cold_start.json",
    sample: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Runs the comparison and prints it."""
    if sample is not None:
        typer.echo(json.dumps(timed_calls(model, dtypes, sample, new_tokens)))
        return
    from specdec.common.provenance import circumstances, write_json

    results = []
    for dtype in dtypes.split(","):
        run(model, dtype, "specdec", new_tokens)
        runs: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
        for number in range(samples):
            for method in METHODS[:: -1 if number % 2 else 1]:
                runs[method].append(run(model, dtype, method, new_tokens))
        results.append({"dtype": dtype} | summary(runs))
        typer.echo(json.dumps(results[-1]))
    settings = {"model": Path(model).name, "samples": samples, "new_tokens": new_tokens, "greedy": True}
    write_json(output, circumstances() | {"settings": settings, "results": results})


def summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians in seconds, by method and phase, and the ratios of ours to transformers'."""
    medians = {
        method: {phase: round(median(found[phase] for found in of), 4) for phase in PHASES}
        for method, of in runs.items()
    }
    ratios = {
        phase: round(medians["specdec"][phase] / medians["transformers"][phase], 3) for phase in ("first", "second")
    }
    return {"median_seconds": medians, "times_transformers": ratios}


def run(model: str, dtype: str, method: str, new_tokens: int) -> dict[str, float]:
    """One sample, in a process of its own."""
    command = [sys.executable, __file__, "--model", model, "--dtypes", dtype]
    command += ["--sample", method, "--new-tokens", str(new_tokens)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def timed_calls(name: str, dtype: str, method: str, new_tokens: int) -> dict[str, float]:
    """Seconds of wrapping the model, and of the first two calls of this process."""
    from specdec.common.loading import load_model
    from specdec.common.prompts import own_prompts

    model, tokenizer = load_model(name, dtype, "auto")
    inputs = [prompt.encode(tokenizer).to(model.device) for prompt in own_prompts()[:2]]
    started = perf_counter()
    if method == "specdec":
        import specdec

        model = specdec.accelerate(model)
    seconds = [perf_counter() - started]
    for given in inputs:
        started = perf_counter()
        model.generate(**given, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        seconds.append(perf_counter() - started)
    return dict(zip(PHASES, seconds, strict=True))


if __name__ == "__main__":
    app()
