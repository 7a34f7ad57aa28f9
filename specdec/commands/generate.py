"""`specdec generate`: completes a prompt."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import specdec
from specdec.commands import options
from specdec.commands.drafter_options import DrafterFlags
from specdec.commands.verifier_options import build_verifier
from specdec.common.errors import UserError, user_errors
from specdec.common.loading import EMBEDDED, load_model, prepare_torch, read_text

if TYPE_CHECKING:
    from specdec.passes.compiled.passes import CompileMode

COMPARED_RUNS = 3


class Report(StrEnum):
    """How to print the report."""

    TABLE = "table"
    JSON = "json"
    NONE = "none"


@dataclass(frozen=True)
class Sampling:
    """Sampling flags; None where one was not given."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None

    def kwargs(self, sample: bool) -> dict[str, Any]:
        """Arguments of `generate`.

        Raises:
            UserError: A flag would have no effect.
        """
        given = {name: value for name, value in vars(self).items() if value is not None}
        if given and not sample:
            flags = ", ".join("--" + name.replace("_", "-") for name in given)
            raise UserError(f"{flags} has no effect on greedy decoding; add --sample")
        return {"do_sample": sample, **given}


Prompt = Annotated[str | None, typer.Argument(help="Text to complete. Without it and --file: stdin.")]
File = Annotated[Path | None, typer.Option(help="Read the prompt from a file.")]
MaxNodes = Annotated[int, typer.Option(help="Largest token tree per target pass: 1, 2, 4, ... 128.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")]
Temperature = Annotated[float | None, typer.Option(min=1e-3, help="Needs --sample.")]
TopK = Annotated[int | None, typer.Option(min=0, help="Needs --sample.")]
TopP = Annotated[float | None, typer.Option(min=1e-6, max=1.0, help="Needs --sample.")]
MinP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Needs --sample.")]
RepetitionPenalty = Annotated[float | None, typer.Option(min=1e-3, help="1 is none.")]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--raw", help="A user's turn, in the chat template, or a text to complete. Default: by the model."
    ),
]
Stream = Annotated[bool, typer.Option(help="Print tokens as they are accepted.")]
Compare = Annotated[bool, typer.Option("--compare", help="Run HF generate too: same output? how much faster?")]
PrintReport = Annotated[Report, typer.Option(help="Print the report to stderr.")]
DeviceMap = Annotated[str | None, typer.Option(help="As for from_pretrained: auto, balanced ...")]
Attention = Annotated[str | None, typer.Option(help="sdpa, eager, flash_attention_2 ...")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]


def run(
    prompt: Prompt = None,
    file: File = None,
    model: options.Model = EMBEDDED,
    drafter: options.DrafterName = "auto",
    drafter_option: options.DrafterSettings = None,
    verifier: options.VerifierName = "exact",
    verifier_option: options.VerifierSettings = None,
    max_nodes: MaxNodes = 64,
    max_new_tokens: MaxNewTokens = 128,
    compiled: options.Compiled = False,
    compiled_auto: options.CompiledAuto = False,
    deterministic: options.Deterministic = False,
    sample: options.Sample = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: options.Seed = 0,
    chat: Chat = None,
    stream: Stream = True,
    compare: Compare = False,
    report: PrintReport = Report.TABLE,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    device_map: DeviceMap = None,
    attn: Attention = None,
    trust_remote_code: TrustRemoteCode = False,
    threads: options.Threads = None,
) -> None:
    """Complete a prompt: the completion goes to stdout, the report to stderr."""
    text = prompt_text(prompt, file)
    kwargs = Sampling(temperature, top_k, top_p, min_p).kwargs(sample) | {"max_new_tokens": max_new_tokens}
    kwargs |= {"repetition_penalty": repetition_penalty} if repetition_penalty is not None else {}
    prepare_torch(threads)
    drafted = DrafterFlags(drafter, drafter_option or [], model)
    first_drafter = drafted.build()
    rule = build_verifier(verifier, verifier_option or [])
    loaded, tokenizer = load_model(model, dtype, device, device_map, attn, trust_remote_code)
    inputs = encode_prompt(text, tokenizer, chat, tell=report is not Report.JSON).to(loaded.device)
    with user_errors(ValueError, TypeError, OSError):
        mode: CompileMode = compiled or ("auto" if compiled_auto else False)
        fast = specdec.accelerate(
            loaded, first_drafter, rule, max_nodes=max_nodes, compiled=mode, deterministic=deterministic
        )
    completion = _complete(fast, tokenizer, inputs, seed, kwargs, stream)
    if report is not Report.NONE:
        typer.echo(json.dumps(fast.report.to_dict()) if report is Report.JSON else str(fast.report), err=True)
    if report is Report.TABLE and fast.report.audit is not None:
        typer.echo(str(fast.report.audit), err=True)
    if compare:
        typer.echo(_compared(fast, drafted, inputs, seed, kwargs, completion), err=True)


def prompt_text(prompt: str | None, file: Path | None) -> str:
    """The prompt, from wherever it was given.

    Raises:
        UserError: It is given twice, or not at all, or is empty.
    """
    if prompt is not None and file is not None:
        raise UserError("both a prompt and --file are given; leave one of them out")
    if file is not None:
        prompt = read_text(file)
    elif prompt is None:
        if sys.stdin.isatty():
            raise UserError("there is no prompt; give it as an argument, with --file, or on stdin")
        prompt = sys.stdin.read()
    if not prompt:
        raise UserError("the prompt is empty; give at least one character")
    return prompt


def encode_prompt(text: str, tokenizer: Any, chat: bool | None, tell: bool = True) -> Any:
    """Token ids and mask of the prompt, `[1, tokens]` each.

    Args:
        text: The prompt.
        tokenizer: The target's.
        chat: Whether to apply the chat template; None to do so where there is one.
        tell: Whether to say on stderr that it was applied unasked.

    Raises:
        UserError: There is no chat template.
    """
    if chat is None and tokenizer.chat_template and tell:
        typer.echo("the model's chat template is applied; --raw completes the text as it is", err=True)
    if not (tokenizer.chat_template if chat is None else chat):
        return tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    if not tokenizer.chat_template:
        raise UserError("--chat: the model has no chat template; leave it out, or use a chat model")
    turns = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _complete(fast: Any, tokenizer: Any, inputs: Any, seed: int, kwargs: dict[str, Any], stream: bool) -> list[int]:
    """Generates and prints; returns the new token ids."""
    import torch
    from transformers import TextStreamer

    torch.manual_seed(seed)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    output = fast.generate(**inputs, streamer=streamer, **kwargs)
    new_tokens: list[int] = output[0, inputs.input_ids.shape[1] :].tolist()
    if not stream:
        typer.echo(tokenizer.decode(new_tokens, skip_special_tokens=True))
    return new_tokens


def _compared(
    fast: Any, drafted: DrafterFlags, inputs: Any, seed: int, kwargs: dict[str, Any], completion: list[int]
) -> str:
    """A line on how the method compares with the model's own `generate`."""
    from specdec.benchmark.measuring import EncodedPrompt, Method, Settings, run_interleaved
    from specdec.benchmark.methods import HF_GENERATE, Contender

    model, speculation = fast.model, fast.speculation
    ours = Contender(
        "specdec",
        drafted.build,
        fast.verifier,
        max_nodes=speculation.budget.max_nodes,
        compiled=speculation.settings.compiled,
    )
    methods = [Method(HF_GENERATE, lambda: model), ours.method(model)]
    prompt = EncodedPrompt("prompt", inputs.input_ids, inputs.attention_mask)
    result = run_interleaved(methods, [prompt], model, Settings(kwargs, seed), repeats=COMPARED_RUNS)
    theirs, mine = result.rows()
    identical = mine.num_identical == mine.num_runs and [completion] == result.samples[0].outputs
    return (
        f"identical to {HF_GENERATE}: {'yes' if identical else 'no'}; {mine.tokens_per_second:.1f} tokens/s against "
        f"{theirs.tokens_per_second:.1f}: {mine.speedup:.2f}x (median of {COMPARED_RUNS} runs, a new drafter each)"
    )
