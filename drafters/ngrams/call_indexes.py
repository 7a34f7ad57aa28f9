"""What one `generate()` call retrieves from besides what the drafter keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specdec.drafters.base import DraftContext
from specdec.drafters.ngrams.ngram_index import IntArray, Links, NgramIndex, power_of_two
from specdec.drafters.ngrams.peer_outputs import PeerOutputs

PEERS = 2
"""Number of the scope of the batch's other outputs, after the row's own text and the predicted outputs."""


@dataclass
class CallIndexes:
    """Indexes of one call.

    Args:
        requests: Prompt and output of each row.
        predicted: Predicted outputs, or None.
        peers: Outputs of all rows, or None when rows do not read one another's.
    """

    requests: dict[int, NgramIndex]
    predicted: NgramIndex | None
    peers: PeerOutputs | None

    @classmethod
    def begin(
        cls, context: DraftContext, orders: tuple[int, ...], predicted: Sequence[IntArray], share_outputs: bool
    ) -> CallIndexes:
        """Indexes the prompts.

        Args:
            context: All rows of the call.
            orders: Lengths of the indexed n-grams.
            predicted: Predicted outputs.
            share_outputs: Whether rows read one another's outputs.
        """
        call = cls({}, None, None)
        if predicted:
            call.predicted = _new_index(orders, sum(len(tokens) + 1 for tokens in predicted))
            for tokens in predicted:
                call.predicted.add_document(tokens)
        if share_outputs and len(context.rows) > 1:
            call.peers = PeerOutputs(orders, max(context.rows) + 1)
        for i, row in enumerate(context.rows):
            sequence = context.sequences[i]
            if i > 0 and np.array_equal(sequence, context.sequences[0]):  # num_return_sequences, rollouts
                call.requests[row] = call.requests[context.rows[0]].copy()
            else:
                call.requests[row] = _new_index(orders, len(sequence))
        call.catch_up(context)
        return call

    def catch_up(self, context: DraftContext) -> bool:
        """Appends the tokens that were committed since; False if the context does not continue what was indexed."""
        for i, row in enumerate(context.rows):
            index, sequence = self.requests.get(row), context.sequences[i]
            if index is None or len(sequence) < index.length - 1:
                return False
            if len(sequence) > index.length - 1:
                index.extend(np.array(sequence[index.length - 1 :], np.int32))
            if self.peers is not None:
                known = context.prompt_lengths[i] + self.peers.lengths[row]
                if len(sequence) > known:
                    self.peers.extend(row, np.array(sequence[known:], np.int32))
        return True

    def sources(self, row: int, empty: Links) -> tuple[Links, Links, Links]:
        """Own text, predicted outputs and outputs of the other rows; `empty` where there is nothing."""
        predicted = empty if self.predicted is None else self.predicted.links
        return self.requests[row].links, predicted, empty if self.peers is None else self.peers.links


def _new_index(orders: tuple[int, ...], tokens: int) -> NgramIndex:
    """Room for the tokens and an output of about as many, and hash tables to match."""
    return NgramIndex(orders, capacity=2 * tokens + 256, slots=power_of_two(tokens + 256))
