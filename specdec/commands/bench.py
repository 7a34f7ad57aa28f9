"""`specdec bench`: methods of generation against each other."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.commands import options
from specdec.commands.drafter_options import DRAFT_MODEL, DrafterFlags
from specdec.common.errors import UserError, user_errors
from specdec.common.loading import EMBEDDED, load_model, own_draft_model, path_of, prepare_torch

if TYPE_CHECKING:
    from rich.console import Console

    from specdec.benchmark import BenchmarkResults, Contender

VERIFIER = "verifier"


def run(
    model: options.Model = EMBEDDED,
    drafter: Annotated[
        list[str] | None,
        typer.Option(
            help="A drafter and its settings, such as 'lookahead max_depth=16', or 'medusa verifier=typical'; may be "
            "repeated. Default: all that can run with the model."
        ),
    ] = None,
    draft_model: options.DraftModel = None,
    prompts: Annotated[
        str,
        typer.Option(
            help="own: chat prompts of the package; embedded: its Python code; JSONL with prompt, or with question_id, "
            "category and turns; a text; a folder or data set. Default: own for a chat model, else embedded."
        ),
    ] = "default",
    limit: Annotated[
        int, typer.Option(min=1, help="Prompts, or questions of several turns, that are measured; spread over all.")
    ] = 20,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per completion at most.")] = 128,
    temperature: Annotated[
        list[float] | None, typer.Option(min=0.0, help="0 is greedy; may be repeated. Default: 0 and 1.")
    ] = None,
    top_p: Annotated[float, typer.Option(help="When sampling: only tokens that have this probability together.")] = 1.0,
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Prompts per call; may be repeated. Default: 1.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs per prompt and method.")] = 1,
    random: Annotated[
        bool, typer.Option("--random", help="Measure on random tokens too, where there is nothing to gain.")
    ] = False,
    roofline: Annotated[
        bool, typer.Option("--roofline", help="Set the target's steps against what the device could do, too.")
    ] = False,
    turns: Annotated[
        int, typer.Option(min=1, help="Turns of a question at most; the target answers those before, unmeasured.")
    ] = 1,
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    nodes: Annotated[
        list[int] | None, typer.Option(help="Largest token tree per pass; may be repeated. Default: 64.")
    ] = None,
    compiled: Annotated[
        bool | None,
        typer.Option(help="Measure all methods compiled too, HF generate and specdec's, or none. Default: HF's."),
    ] = None,
    chat: Annotated[
        bool | None, typer.Option(help="Apply the chat template. Default: to prompts that are turns.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for samples, results and figures; an interrupted run goes on there.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file as well.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Measure nothing; show what has changed from OLD to NEW, results files or folders."),
    ] = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Measure HF generate, its own speculation, and drafters: the same prompts, tokens and clock for all, in turn."""
    from rich.console import Console

    console = Console()
    console = console if console.is_terminal else Console(width=160)
    if compare is not None:
        _compare(console, *compare)
        return
    flags = [_parsed(text, model) for text in drafter] if drafter else None

    from specdec.benchmark import BenchmarkSettings, run_benchmark
    from specdec.benchmark.prompts import answers_of, read_benchmark_questions

    with user_errors(ValueError):
        settings = BenchmarkSettings(
            max_new_tokens=tokens,
            temperatures=tuple(temperature or (0.0, 1.0)),
            batch_sizes=tuple(batch_size or (1,)),
            repeats=repeats,
            seed=seed,
            random_prompts=random,
            compiled=compiled is not False,
            methods_compiled=compiled is True,
            max_nodes=tuple(nodes or ()),
            top_p=top_p,
        )
    prepare_torch(threads)
    path_of(model)  # a conversion shows a progress bar of its own
    with console.status("loading the models"):
        target, tokenizer = load_model(model, dtype, device)
        draft_name = draft_model or own_draft_model(model)
        draft, draft_tokenizer = load_model(draft_name, dtype, device) if draft_name else (None, None)
    with user_errors(ValueError, TypeError, OSError), _stoppable(output):
        # The prompt behind the last one is for the warm-up, if there is one.
        answer = answers_of(target, tokens)
        questions = read_benchmark_questions(prompts, tokenizer, limit + 1, chat, split, turns, answer)
        measured = [prompt for question in questions[:limit] for prompt in question]
        results = run_benchmark(
            target,
            tokenizer,
            None if flags is None else [_contender(*flag, draft_name, draft) for flag in flags],
            measured,
            settings,
            warm_up=questions[-1][0],
            draft_model=draft,
            draft_tokenizer=draft_tokenizer,
            folder=output,
            console=console,
        )
    results.models["target"]["name"] = model
    if results.models["draft"] is not None:
        results.models["draft"]["name"] = draft_name
    _show(console, results, output, json_file)
    if roofline:
        _roofline(console, target, model, output)


def _roofline(console: Console, target: Any, name: str, output: Path | None) -> None:
    from specdec.benchmark.roofline.measure import measure_roofline
    from specdec.benchmark.roofline.report import roofline_tables
    from specdec.common.provenance import circumstances, model_info, write_json

    with user_errors(ValueError, OSError):
        found = measure_roofline(target)
        console.print(roofline_tables(found))
        if output is not None:
            told = circumstances() | {"model": model_info(name, target)} | found.to_dict()
            write_json(output / "roofline.json", told)


@contextmanager
def _stoppable(output: Path | None) -> Iterator[None]:
    """Ctrl-C ends the run, and what was measured is kept."""
    try:
        yield
    except KeyboardInterrupt:
        kept = (
            f"what was measured is in {output}; the same command goes on" if output else "nothing is kept, see --output"
        )
        typer.echo(f"stopped; {kept}", err=True)
        raise typer.Exit(130) from None


def _parsed(text: str, model: str) -> tuple[str, DrafterFlags, str]:
    """What `--drafter` says: its text, the drafter, the verifier's name.

    Raises:
        UserError: The text, or a name in it, has no meaning.
    """
    with user_errors(
        ValueError, remedy=f"--drafter {text} must be a name and settings, such as 'lookahead max_depth=16'"
    ):
        words = shlex.split(text)
    if not words:
        raise UserError("--drafter is empty; give a name, such as lookahead")
    verifier = dict(word.partition("=")[::2] for word in words[1:]).get(VERIFIER, "exact")
    settings = [word for word in words[1:] if word.partition("=")[0] != VERIFIER]

    from specdec.verifiers import VERIFIERS

    if verifier not in VERIFIERS:
        raise UserError(f"--drafter {text}: verifier {verifier} is not known; use one of {', '.join(VERIFIERS)}")
    flags = DrafterFlags(words[0], settings, model)
    if words[0] == "none":
        raise UserError("--drafter none is always measured, as specdec off; name a drafter")
    return text, flags, verifier


def _contender(text: str, flags: DrafterFlags, verifier: str, draft_name: str | None, draft: Any) -> Contender:
    from specdec.benchmark import Contender

    given = any(option.partition("=")[0].replace("-", "_") == DRAFT_MODEL for option in flags.options)

    def make() -> Any:
        made = _with_draft_model(flags, draft_name).build()
        if draft is not None and not given and hasattr(made, DRAFT_MODEL):
            made.draft_model = draft  # loaded once, not for each run
        return made

    make()  # so that a setting that is not allowed is an error before anything is measured
    return Contender(f"specdec {text.replace('draft-model', 'draft model')}", make, verifier)


def _with_draft_model(flags: DrafterFlags, draft_name: str | None) -> DrafterFlags:
    """The flags, with the draft model of the command where they name none."""
    if flags.name != "draft-model" or draft_name is None:
        return flags
    return DrafterFlags(flags.name, [f"{DRAFT_MODEL}={draft_name}", *flags.options], flags.model)


def _show(console: Console, results: BenchmarkResults, output: Path | None, json_file: Path | None) -> None:
    console.print(results)
    written: Sequence[Path] = []
    with user_errors(OSError):
        if output is not None:
            written = results.save(output)
            if not any(file.suffix == ".png" for file in written):
                console.print("no figures: matplotlib is missing; pip install 'specdec-hf[notebook]'", markup=False)
        if json_file is not None:
            results.write_json(json_file)
            written = [*written, json_file]
    for file in written:
        console.print(f"written to {file}", highlight=False, soft_wrap=True)


def _compare(console: Console, old: Path, new: Path) -> None:
    from specdec.benchmark.comparison import comparison_tables
    from specdec.benchmark.results import load_results

    with user_errors(ValueError, OSError):
        for table in comparison_tables(load_results(old), load_results(new)):
            console.print(table.to_rich())
