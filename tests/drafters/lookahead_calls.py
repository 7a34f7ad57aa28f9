"""What the tests of the lookahead drafter share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specdec.drafters.base import DraftContext, Drafter
from specdec.drafters.lookahead import LookaheadDrafter
from specdec.tree import TokenTree


class WordTokenizer:
    """Gives each word of a fixed vocabulary its number."""

    def __init__(self, words: str) -> None:
        self.ids = {word: i for i, word in enumerate(words.split())}

    def get_vocab(self) -> dict[str, int]:
        return dict(self.ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return ([0] if add_special_tokens else []) + [self.ids[word] for word in text.split()]


def context(*sequences: Sequence[int], prompts: Sequence[int] | None = None, depth: int = 100) -> DraftContext:
    """All rows, with prompts of so many tokens (everything, if not given)."""
    arrays = [np.array(sequence, np.int32) for sequence in sequences]
    lengths = list(prompts) if prompts is not None else [len(sequence) for sequence in sequences]
    return DraftContext(list(range(len(arrays))), arrays, lengths, [depth] * len(arrays))


def paths(tree: TokenTree, row: int = 0) -> list[list[int]]:
    """The path to each real node of a row after the root."""
    tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
    found: list[list[int]] = [[]]
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        found.append([*found[parent], token] if parent >= 0 else [])
    return [path for path in found if path]


def call(drafter: LookaheadDrafter, prompt: Sequence[int], answer: Sequence[int]) -> None:
    """One whole call in which the target wrote `answer`."""
    session = drafter.start(context(prompt))
    session.propose(context([*prompt, answer[0]], prompts=[len(prompt)]), 8)
    session.finish(context([*prompt, *answer], prompts=[len(prompt)]))


def propose(drafter: Drafter, asked: DraftContext, nodes: int = 64) -> TokenTree:
    """The first proposal of a call."""
    return drafter.start(asked).propose(asked, nodes)


def proposed(drafter: LookaheadDrafter, sequence: Sequence[int], nodes: int = 64) -> list[list[int]]:
    return paths(propose(drafter, context(sequence), nodes))
