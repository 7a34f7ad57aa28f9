"""Flags that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="Folder or hub name of a causal LM, or smollm2, or embedded.")]
DraftModel = Annotated[
    str | None,
    typer.Option(
        help="Smaller model, a folder or hub name, for HF assisted and the drafter draft-model. Default: none; "
        "embedded-draft with the embedded model."
    ),
]
DrafterName = Annotated[
    str, typer.Option(help="Drafter: auto, lookahead, medusa, draft-model, recycling ...; none for drafting off.")
]
DrafterSettings = Annotated[
    list[str] | None, typer.Option(help="A setting of the drafter, name=value; may be repeated.")
]
VerifierName = Annotated[
    str, typer.Option(help="Verifier: exact keeps the tokens; block, traversal, typical, step may change them.")
]
VerifierSettings = Annotated[
    list[str] | None, typer.Option(help="A setting of the verifier, name=value; may be repeated.")
]
Sample = Annotated[bool, typer.Option("--sample", help="Sample instead of greedy decoding.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the sampling.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...; auto: cuda if there is one.")]
Compiled = Annotated[
    bool, typer.Option("--compiled", help="Compile the target's passes: takes minutes, once per model.")
]
CompiledAuto = Annotated[
    bool,
    typer.Option("--compiled-auto", help="Use passes compiled before; else compile in the background meanwhile."),
]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="Same call, same tokens in every process: nothing depends on time.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")]
