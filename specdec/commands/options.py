"""Flags that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="Folder or hub name of a causal LM, or embedded, or smollm2.")]
DraftModel = Annotated[
    str | None,
    typer.Option(help="For assisted generation, HF's and specdec's; embedded-draft with the embedded model."),
]
DrafterName = Annotated[str, typer.Option(help="Drafter by name; none for drafting off.")]
DrafterSettings = Annotated[
    list[str] | None, typer.Option(help="A setting of the drafter, name=value; may be repeated.")
]
VerifierName = Annotated[str, typer.Option(help="Verifier by name: exact; step, typical ... may change the output.")]
VerifierSettings = Annotated[
    list[str] | None, typer.Option(help="A setting of the verifier, name=value; may be repeated.")
]
Sample = Annotated[bool, typer.Option("--sample", help="Sample instead of greedy decoding.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the sampling.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto: cuda if there is one.")]
Compiled = Annotated[
    bool, typer.Option("--compiled", help="Compile the target's passes: takes minutes, once per model.")
]
CompiledAuto = Annotated[
    bool,
    typer.Option("--compiled-auto", help="Use passes compiled before; else compile in the background meanwhile."),
]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="Same call, same tokens in every process: nothing goes by the clock.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")]
