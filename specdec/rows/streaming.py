"""Tokens to a streamer as they are accepted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.generation.streamers import BaseStreamer

from specdec.rows.sequences import Sequences


class StreamFeeder:
    """Feeds a transformers streamer the way `generate` does: one `[batch]` tensor per generated position.

    Rows of a batch run ahead of one another, so a position is fed once every row has it; a finished row goes on with
    padding.

    Args:
        streamer: None for none.
        sequences: The tokens so far.
        pad_token: Token of finished rows.
    """

    def __init__(self, streamer: BaseStreamer | None, sequences: Sequences, pad_token: int) -> None:
        self.streamer = streamer
        self.sequences = sequences
        self.pad_token = pad_token
        self.num_fed = 0

    def feed(self, unfinished: Sequence[int]) -> None:
        """Feeds all positions that every unfinished row has reached."""
        if self.streamer is None:
            return
        rows = range(len(self.sequences))
        counts = [self.sequences.num_generated(row) for row in rows]
        ready = min((counts[row] for row in unfinished), default=max(counts))
        for position in range(self.num_fed, ready):
            tokens = [
                int(self.sequences.generated(row)[position]) if position < counts[row] else self.pad_token
                for row in rows
            ]
            self.streamer.put(torch.tensor(tokens))
        self.num_fed = max(self.num_fed, ready)

    def end(self) -> None:
        """Ends the stream."""
        if self.streamer is not None:
            self.streamer.end()
