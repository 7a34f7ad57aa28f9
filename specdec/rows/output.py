"""What a call of `generate` returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specdec.call import Call
from specdec.compat import CACHE
from specdec.rows.sequences import Sequences
from specdec.sampling import Sampler, Scored


def output_of(
    call: Call,
    sequences: Sequences,
    sampler: Sampler,
    past: Cache | None,
    padding_logits: Mapping[int, Tensor],
    pad_token: int,
) -> Any:
    """Token ids, or the fields that plain decoding would return with them.

    Args:
        call: Says what is wanted.
        sequences: All tokens.
        sampler: Has kept scores and logits, if they are wanted.
        past: The kv cache, as plain decoding would leave it.
        padding_logits: Of rows that ended before the last one, what the model says behind their end.
        pad_token: What such rows are filled up with.
    """
    output = sequences.output(pad_token)
    if not call.config.return_dict_in_generate:
        return output
    fields: dict[str, Any] = {"sequences": output, CACHE: past}
    if call.keeps_scores:
        for row, behind in padding_logits.items():
            sampler.pad(row, behind, pad_token)
        scores, logits = _by_position(sampler.kept_scores)
        fields |= {"scores": scores if call.config.output_scores else None}
        fields |= {"logits": logits if call.config.output_logits else None}
    return GenerateDecoderOnlyOutput(**fields)


def _by_position(rows: list[list[Scored]]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Scores and logits per generated position, `[batch, vocab]` each."""
    positions = [tuple(map(torch.stack, zip(*of_rows, strict=True))) for of_rows in zip(*rows, strict=True)]
    scores, logits = zip(*positions, strict=True)
    return scores, logits
