"""Trees over all rows of a batch to its end: for models in which something out of sight belongs to the rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from specdec.rows.sequences import Sequences
from specdec.target import TreeTarget
from specdec.tree import TokenTree


class WholeBatchTarget(TreeTarget):
    """Keeps rows that have ended in the batch, with nothing to say.

    Hooks and patched forwards may hold a tensor with one entry per row, or a list of adapters: they must meet the batch
    that they were made for in every pass.
    """

    def _end_prefill(self, input_ids: Tensor) -> None:
        super()._end_prefill(input_ids)
        self.places = list(range(len(input_ids)))

    def forward(self, tree: TokenTree) -> Tensor:
        if len(self.places) == self.cache.batch_size:
            return super().forward(tree)
        tokens = tree.tokens.new_zeros((self.cache.batch_size, tree.num_nodes))
        parents = tokens - 1
        tokens[self.places], parents[self.places] = tree.tokens, tree.parents
        logits = super().forward(TokenTree(tokens, parents))[self.places]
        if self.hidden_states is not None and self.hidden_states.last_pass is not None:
            self.hidden_states.last_pass = self.hidden_states.last_pass[self.places]
        return logits

    def _commit(self, paths: Sequence[Sequence[int]], unfinished: Sequence[int] | None) -> None:
        of_batch: list[Sequence[int]] = [[]] * self.cache.batch_size
        for place, path in zip(self.places, paths, strict=True):
            of_batch[place] = path
        self.cache.commit(of_batch)

    def _place_of(self, row: int) -> int:
        return self.places[row]

    def _drop_rows(self, rows: Sequence[int]) -> None:
        self.places = [self.places[row] for row in rows]

    def _decode_padding(self, rows: Sequence[int], sequences: Sequences, longest: int, pad_token: int) -> None:
        self.places = list(range(len(sequences)))
        super()._decode_padding(self.places, sequences, longest, pad_token)
