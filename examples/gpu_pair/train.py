"""Trains a pair of about 120 M and 10 M parameters on the text of the embedded models, for figures on a GPU.

The token counts are meant to take less than ten minutes on an H100; no GPU has confirmed that. No weights are shipped.

    python examples/gpu_pair/train.py --work pair            # corpus, tokenizer, both models, exported
    specdec bench --model pair/exported/target --draft-model pair/exported/draft --dtype bfloat16

Corpus, tokenizer, training loop and export are those of examples/embedded; a run that was stopped goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

EMBEDDED = Path(__file__).resolve().parents[1] / "embedded"
sys.path.insert(0, str(EMBEDDED))

import train as embedded  # noqa: E402
import trainer  # noqa: E402

SHAPES = {
    "target": {
        "hidden_size": 768,
        "num_hidden_layers": 16,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 2560,
    },
    "draft": {
        "hidden_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 1536,
    },
}
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
}
TOKENS = {"target": 60_000_000, "draft": 100_000_000}

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    work: Annotated[Path, typer.Option(help="Folder for corpus, checkpoints and the exported pair.")] = Path(
        "gpu_pair"
    ),
    source: Annotated[Path | None, typer.Option(help="Folder of .py files in place of the standard library.")] = None,
    target_tokens: Annotated[int, typer.Option(help="Training tokens of the target.")] = TOKENS["target"],
    draft_tokens: Annotated[int, typer.Option(help="Training tokens of the draft model.")] = TOKENS["draft"],
    batch: Annotated[int, typer.Option(help="Windows a step.")] = 64,
    window: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    tiny: Annotated[bool, typer.Option("--tiny", help="Tiny models, to see that the script runs.")] = False,
) -> None:
    """Train and export both models."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not tiny:
        raise typer.BadParameter("there is no GPU; --tiny shows that the script runs")
    trainer.SHAPES.update(dict.fromkeys(SHAPES, TINY) if tiny else SHAPES)
    embedded.corpus_command(work, source)
    embedded.tokenizer_command("target", work)
    for which, tokens in (("target", target_tokens), ("draft", draft_tokens)):
        options = {"answers": 0.0, "teacher": None, "layers": None, "start_from": None, "threads": 1}
        embedded.train_command(
            which,
            work,
            tokens=tokens,
            decay_tokens=tokens // 4,
            batch=batch,
            window=window,
            muon_lr=trainer.Settings.muon_lr,
            adam_lr=trainer.Settings.adam_lr,
            bf16=on_gpu,
            compiled=on_gpu,
            **options,
        )
    embedded.export_command(["target", "draft"], work, out=work / "exported", only_if_better=False)
    print(f"the pair is in {work / 'exported'}")


if __name__ == "__main__":
    app()
