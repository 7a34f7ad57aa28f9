"""`specdec train-medusa`: trains Medusa heads for a model."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.common.conversion import convert
from specdec.common.errors import UserError, user_errors
from specdec.training.config import MedusaTrainingConfig, Setting, read_yaml, settings


def run(**flags: Any) -> None:
    """Train Medusa heads, and with medusa-2 adapters of the model too; a stopped run goes on where it was.

    Settings come from --config, and from flags, which go before the file. In several processes: `accelerate launch -m
    specdec train-medusa ...`.
    """
    file, show_example = flags.pop("config"), flags.pop("show_example")
    config = _config(file, flags)
    from specdec.common.loading import prepare_torch

    prepare_torch(config.threads)
    if show_example:
        _show_example(config)
        return

    from specdec.training.medusa import train

    with user_errors(ValueError, FileNotFoundError, ImportError):
        result = train(config)
    if not result.is_complete and result.stopped_by is not None:
        raise typer.Exit(128 + result.stopped_by)
    typer.echo(f"written to {config.output}")


def _config(file: Path | None, flags: dict[str, Any]) -> MedusaTrainingConfig:
    """Settings of the file, with the flags that were given in their place."""
    known = settings()
    given = {name: value for name, value in flags.items() if value is not None}
    with user_errors(ValueError):
        for name, value in given.items():
            if isinstance(value, str):
                given[name] = convert(value, known[name].annotation, f"--{name.replace('_', '-')}")
        return MedusaTrainingConfig.from_dict({**(read_yaml(file) if file else {}), **given})


def _show_example(config: MedusaTrainingConfig) -> None:
    from rich.console import Console
    from transformers import AutoTokenizer

    from specdec.common.loading import path_of
    from specdec.training.data import read_examples
    from specdec.training.examples import show_example

    if config.data is None:
        raise UserError(
            "--show-example needs --data: with --prompts or --own-prompts there are no answers before the training"
        )
    with user_errors(ValueError, OSError):
        tokenizer = AutoTokenizer.from_pretrained(
            path_of(config.model, "tokenizer_config.json"), trust_remote_code=config.trust_remote_code
        )
        show_example(read_examples(config, config.data, tokenizer)[0], tokenizer, Console())


def _parameter(name: str, setting: Setting) -> inspect.Parameter:
    """The flag of a setting; without it, the config file or the default decides."""
    flag = name.replace("_", "-")
    default = ",".join(setting.default) if isinstance(setting.default, tuple) else setting.default
    shown = "" if default in (None, "", False) else f" [default: {default}]"
    flags = [f"--{flag}/--no-{flag}"] if setting.annotation is bool else [f"--{flag}"]
    kinds = [kind for kind in (bool, int, float) if setting.annotation in (kind, kind | None)]
    kind: Any = [*kinds, str][0]
    annotation = Annotated[kind | None, typer.Option(*flags, help=setting.help + shown, show_default=False)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _add_flags() -> None:
    """Gives `run` a flag for each setting."""
    own = {
        "config": (Path | None, typer.Option(help="YAML file with settings, such as a run's training.yaml."), None),
        "show_example": (
            bool,
            typer.Option("--show-example", help="Print an example with its supervised tokens coloured, and exit."),
            False,
        ),
    }
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
        for name, (kind, option, default) in own.items()
    ]
    parameters += [_parameter(name, setting) for name, setting in settings().items()]
    setattr(run, "__signature__", inspect.Signature(parameters))  # noqa: B010
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


_add_flags()
