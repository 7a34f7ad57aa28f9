"""`specdec bench`: methods of generation against each other."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.commands import options
from specdec.commands.drafter_options import DRAFT_MODEL, DrafterFlags
from specdec.commands.verifier_options import build_verifier
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
            help="own: chat prompts of the package; embedded: its Python code; a JSONL file with prompt, or with "
            "question_id, category and turns; a text file, a folder or a data set. Default: own for a chat model, else "
            "embedded."
        ),
    ] = "default",
    limit: Annotated[int, typer.Option(min=1, help="Number of prompts, spread over all categories.")] = 20,
    tokens: Annotated[int, typer.Option(min=2, help="Most tokens per completion.")] = 128,
    temperature: Annotated[
        list[float] | None, typer.Option(min=0.0, help="0 is greedy; may be repeated. Default: 0 and 1.")
    ] = None,
    top_p: Annotated[float, typer.Option(help="When sampling, keep the likeliest tokens of this probability.")] = 1.0,
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Prompts per call; may be repeated. Default: 1.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs per prompt and method.")] = 1,
    random: Annotated[
        bool, typer.Option("--random", help="Measure random tokens as prompts too: what drafting costs in vain.")
    ] = False,
    turns: Annotated[
        int, typer.Option(min=1, help="Most turns of a question; the target answers those before, unmeasured.")
    ] = 1,
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    nodes: Annotated[
        list[int] | None, typer.Option(help="Largest token tree per pass; may be repeated. Default: 64.")
    ] = None,
    compiled: Annotated[
        bool | None,
        typer.Option(
            help="Measure HF generate and all specdec methods with compiled passes too, or none of them. Default: HF's."
        ),
    ] = None,
    chat: Annotated[
        bool | None, typer.Option(help="Whether to apply the chat template. Default: to prompts that are turns.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write results.json, results.md and figures to a folder.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to a JSON file.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Measure nothing; show what has changed from OLD to NEW, results files or folders."),
    ] = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Measure HF generate, HF's own speculation, and drafters: same prompts, tokens and clock for all, in turn."""
    from rich.console import Console

    console = Console()
    console = console if console.is_terminal else Console(width=160)
    if compare is not None:
        _compare(console, *compare)
        return
    made = [_parsed(text, model, draft_model) for text in drafter] if drafter else None

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
    with user_errors(ValueError, TypeError, OSError):
        # The question after the last one is for the warm-up, if there is one.
        answer = answers_of(target, tokens)
        questions = read_benchmark_questions(prompts, tokenizer, limit + 1, chat, split, turns, answer)
        results = run_benchmark(
            target,
            tokenizer,
            None if made is None else [contender(draft) for contender in made],
            [prompt for question in questions[:limit] for prompt in question],
            settings,
            warm_up=questions[-1][0],
            draft_model=draft,
            draft_tokenizer=draft_tokenizer,
            console=console,
        )
    results.models["target"]["name"] = model
    if results.models["draft"] is not None:
        results.models["draft"]["name"] = draft_name
    _show(console, results, output, json_file)
    if results.is_interrupted:
        raise typer.Exit(130)


def _parsed(text: str, model: str, draft_model: str | None) -> Callable[[Any], Contender]:
    """What `--drafter` says: the contender, once the draft model is loaded.

    Raises:
        UserError: The text, or a name in it, has no meaning.
    """
    with user_errors(
        ValueError, remedy=f"--drafter {text} must be a name and settings, such as 'lookahead max_depth=16'"
    ):
        words = shlex.split(text)
    if not words:
        raise UserError("--drafter is empty; give a name, such as lookahead")
    if words[0] == "none":
        raise UserError("--drafter none is always measured, as specdec off; name a drafter")
    verifier = dict(word.partition("=")[::2] for word in words[1:]).get(VERIFIER, "exact")
    with user_errors(UserError, remedy=f"in --drafter {text}"):
        build_verifier(verifier)
    settings = [word for word in words[1:] if word.partition("=")[0] != VERIFIER]
    is_given = any(setting.partition("=")[0].replace("-", "_") == DRAFT_MODEL for setting in settings)
    if words[0] == "draft-model" and not is_given and draft_model is not None:
        settings.append(f"{DRAFT_MODEL}={draft_model}")
    flags = DrafterFlags(words[0], settings, model)
    flags.build()  # so that a setting that is not allowed is an error before anything is loaded

    def contender(loaded: Any) -> Contender:
        from specdec.benchmark import Contender

        def make() -> Any:
            drafter = flags.build()
            if loaded is not None and not is_given and hasattr(drafter, DRAFT_MODEL):
                drafter.draft_model = loaded  # loaded once, not for each run
            return drafter

        return Contender(f"specdec {text.replace('draft-model', 'draft model')}", make, verifier)

    return contender


def _show(console: Console, results: BenchmarkResults, output: Path | None, json_file: Path | None) -> None:
    console.print(results)
    written: list[Path] = []
    with user_errors(OSError):
        if output is not None:
            written += results.save(output)
            if not any(file.suffix == ".png" for file in written):
                console.print("no figures: matplotlib is missing; pip install 'specdec-hf[notebook]'", markup=False)
        if json_file is not None:
            results.write_json(json_file)
            written.append(json_file)
    for file in written:
        console.print(f"written to {file}", highlight=False, soft_wrap=True)


def _compare(console: Console, old: Path, new: Path) -> None:
    from specdec.benchmark.comparison import comparison_tables
    from specdec.benchmark.results import load_results

    with user_errors(ValueError, OSError):
        for table in comparison_tables(load_results(old), load_results(new)):
            console.print(table.to_rich())
