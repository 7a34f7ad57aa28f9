"""Where a row ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from specdec.rows.sequences import Sequences

Scores = Callable[[int], tuple[Tensor, ...] | None]

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
    the row's ids so far, in order, and with the scores so far where they are returned.

    Args:
        criteria: As prepared by `generate`.
        sequences: The tokens so far.
    """

    def __init__(self, criteria: StoppingCriteriaList, sequences: Sequences) -> None:
        self.sequences = sequences
        self.eos: set[int] = set()
        self.max_length = sequences.max_length
        self.others = StoppingCriteriaList()
        self._asked: dict[int, dict[tuple[int, int], bool]] = {}  # by row: what others said of a position and token
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria:
                self.eos |= set(criterion.eos_token_id.tolist())
            elif type(criterion) is MaxLengthCriteria:
                self.max_length = min(self.max_length, criterion.max_length)
            else:
                self.others.append(criterion)

    def ends(self, row: int, tokens: Sequence[int], scores: Scores | None = None) -> bool:
        """Whether a row is finished with the last of its new tokens.

        Args:
            row: Of the batch.
            tokens: New tokens, behind those that are committed.
            scores: Gives the scores of the positions up to the last of so many new tokens.
        """
        length = self.sequences.lengths[row] + len(tokens)
        done = tokens[-1] in self.eos or length >= self.max_length
        if not self.others:
            return done
        asked, key = self._asked.setdefault(row, {}), (length, tokens[-1])
        if key not in asked:
            ids = self.sequences.prefixes([row], [tokens])
            given: Any = None if scores is None else scores(len(tokens))
            asked[key] = bool(torch.as_tensor(self.others(ids, given)).all())
        return done or asked[key]

    def count(self, row: int, tokens: Sequence[int], scores: Scores | None = None) -> tuple[int, bool]:
        """How many of a row's new tokens to keep, and whether the row is finished with them; arguments as of `ends`."""
        counts = range(1, len(tokens) + 1)
        end = next((count for count in counts if self.ends(row, tokens[:count], scores)), None)
        self._asked.pop(row, None)
        return (len(tokens), False) if end is None else (end, True)
