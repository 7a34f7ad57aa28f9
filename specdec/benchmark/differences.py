"""Where an output leaves the reference's, and how near the target was to a tie there."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch

from specdec.benchmark.measuring import EncodedPrompt
from specdec.benchmark.runs import Sample


def first_difference(mine: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Position of the first token that differs, or that only one of the two has; None if there is none."""
    pairs = enumerate(zip_longest(mine, theirs))
    return next((position for position, (a, b) in pairs if a != b), None)


def note_differences(
    samples: Sequence[Sample], reference: str, prompt: EncodedPrompt, target: Any, is_greedy: bool
) -> None:
    """Fills in `differences` of the samples of one round.

    `gap` is how far apart the target's two best logits are at the position of the first difference, in one pass over
    the prompt and the tokens before it. In low precision passes of another width round differently, so a gap near 0 is
    a near-tie; a large one is a fault. It is known for greedy decoding only (None otherwise): sampled tokens hang on
    the random numbers too. `position` is None where the prompt itself was altered.

    Args:
        samples: Of all methods on one prompt or batch, marked as identical or not.
        reference: The method that the others were compared with.
        prompt: What was completed.
        target: The model.
        is_greedy: Whether the outputs are greedy.
    """
    expected = next(s.outputs for s in samples if s.method == reference)
    gaps: dict[tuple[int, int], float] = {}
    for sample in samples:
        for row in (row for row, same in enumerate(sample.identical_rows or []) if not same):
            mine, theirs = sample.outputs[row], expected[row]
            position = None if mine is None or theirs is None else first_difference(mine, theirs)
            if is_greedy and position is not None and theirs is not None and (row, position) not in gaps:
                gaps[row, position] = _gap(prompt, row, theirs[:position], target)
            gap = None if position is None else gaps.get((row, position))
            sample.differences.append({"row": row, "position": position, "gap": gap})


@torch.no_grad()
def _gap(prompt: EncodedPrompt, row: int, before: Sequence[int], target: Any) -> float:
    ids = prompt.input_ids[row]
    if prompt.attention_mask is not None:
        ids = ids[prompt.attention_mask[row].bool()]
    ids = torch.cat([ids, ids.new_tensor(before)])
    best = target(input_ids=ids[None]).logits[0, -1].float().topk(2).values
    return float(best[0] - best[1])
