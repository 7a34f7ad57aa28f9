"""`specdec trace`: shows which source each token of a completion came from, and how many tokens a pass gave."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import specdec
from specdec.commands import generate, options
from specdec.commands.drafter_options import DrafterFlags
from specdec.common.errors import UserError, user_errors
from specdec.common.loading import EMBEDDED, load_model, prepare_torch

Output = Annotated[Path | None, typer.Option(help="Write the trace to this file as well, as a page for a browser.")]
Width = Annotated[int | None, typer.Option(min=20, help="Columns to print; default: those of the terminal.")]


def run(
    prompt: generate.Prompt = None,
    file: generate.File = None,
    output: Output = None,
    model: options.Model = EMBEDDED,
    drafter: options.DrafterName = "auto",
    drafter_option: options.DrafterSettings = None,
    max_nodes: generate.MaxNodes = 64,
    max_new_tokens: generate.MaxNewTokens = 128,
    sample: options.Sample = False,
    temperature: generate.Temperature = None,
    top_k: generate.TopK = None,
    top_p: generate.TopP = None,
    min_p: generate.MinP = None,
    seed: options.Seed = 0,
    chat: generate.Chat = None,
    width: Width = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    device_map: generate.DeviceMap = None,
    attn: generate.Attention = None,
    trust_remote_code: generate.TrustRemoteCode = False,
    threads: options.Threads = None,
) -> None:
    """Complete a prompt and show where each token came from, in colours; --output trace.html for a browser."""
    text = generate.prompt_text(prompt, file)
    kwargs = generate.Sampling(temperature, top_k, top_p, min_p).kwargs(sample)
    prepare_torch(threads)
    first_drafter = DrafterFlags(drafter, drafter_option or [], model).build()
    loaded, tokenizer = load_model(model, dtype, device, device_map, attn, trust_remote_code)
    inputs = generate.encode_prompt(text, tokenizer, chat).to(loaded.device)

    import torch
    from rich.console import Console

    with user_errors(ValueError, TypeError, OSError):
        fast = specdec.accelerate(loaded, first_drafter, max_nodes=max_nodes)
        torch.manual_seed(seed)
        fast.generate(**inputs, max_new_tokens=max_new_tokens, trace=True, **kwargs)
    trace = fast.report.trace
    if trace is None:
        raise UserError(f"there is nothing to trace: the model's own generate() did the work ({fast.report.fallback})")
    trace.show(tokenizer, Console(width=width))
    if output is not None:
        with user_errors(OSError):
            trace.save(output, tokenizer)
        typer.echo(f"written to {output}", err=True)
