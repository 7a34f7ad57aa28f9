"""Where a row ends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from specdec.rows.sequences import Sequences

ROW_WISE = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)


def not_row_wise(criteria: StoppingCriteriaList) -> list[str]:
    """Names of criteria that may look at the whole batch: exact with one row only."""
    return [type(c).__name__ for c in criteria if type(c) not in ROW_WISE]


def pads_finished_rows(criteria: StoppingCriteriaList) -> bool:
    """Whether plain decoding pads a row once it has stopped; without an end-of-sequence token it goes on with it."""
    return any(hasattr(c, "eos_token_id") for c in criteria) or all(type(c) is MaxLengthCriteria for c in criteria)


class StopRule:
    """Finds the first token of a step after which a row is finished, as plain decoding would.

    End-of-sequence ids and the length limit are compared on the host; any other criterion is called once per token with
    the row's ids so far, in order.

    Args:
        criteria: As prepared by `generate`.
        sequences: The tokens so far.
    """

    def __init__(self, criteria: StoppingCriteriaList, sequences: Sequences) -> None:
        self.sequences = sequences
        self.eos: set[int] = set()
        self.max_length = sequences.max_length
        self.others = StoppingCriteriaList()
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria:
                self.eos |= set(criterion.eos_token_id.tolist())
            elif type(criterion) is MaxLengthCriteria:
                self.max_length = min(self.max_length, criterion.max_length)
            else:
                self.others.append(criterion)

    def count(self, row: int, tokens: Sequence[int]) -> tuple[int, bool]:
        """How many of a row's new tokens to keep, and whether the row is finished with them."""
        length = self.sequences.lengths[row]
        for i, token in enumerate(tokens):
            done = token in self.eos or length + i + 1 >= self.max_length
            if self.others:
                ids = self.sequences.prefixes([row], [tokens[: i + 1]])
                done |= bool(torch.as_tensor(self.others(ids, None)).all())
            if done:
                return i + 1, True
        return len(tokens), False
