"""How the tokens of a draft model and of its target go together in a call of `generate`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.drafters.base import DraftContext
from specdec.drafters.small_model.growth import DraftNodes
from specdec.drafters.tokenizers.text_bridge import TargetDraft, TextBridge, common_prefix
from specdec.drafters.tokenizers.vocabulary_map import VocabularyMap
from specdec.kernels import Ints
from specdec.tree import TokenTree

Use: TypeAlias = Literal["auto", "shared", "intersection", "text"]
Tokens: TypeAlias = NDArray[np.int32]

LEAST_KNOWN_SHARE = 0.85
"""Share of the prompts' tokens that must have a draft token for token intersection: others cannot be drafted. At a
share of 0.69 chains of text bring more tokens per pass: greedy 1.5 to 1.3, sampled 1.3 to 1.2."""


@dataclass(frozen=True)
class Reading:
    """A row in the draft model's tokens.

    Args:
        tokens: Of the whole row, the root's last, at least one, `[tokens]`.
        num_kept: How many tokens that the draft model has read hold at most: all but the last, which is fed anew, and
            fewer where an earlier one is another now.
        known: What was committed since the last reading, as the nodes drafted since then would name it, -1 for what
            they cannot, `[new tokens]`.
    """

    tokens: Tokens
    num_kept: int
    known: Tokens


class RowReader(Protocol):
    """Reads one row during one call."""

    def read(self, sequence: Tokens) -> Reading:
        """Reads all tokens of the row, the root's included."""


class DraftVocabulary(ABC):
    """How tokens go together in one call."""

    name: str

    @abstractmethod
    def new_reader(self) -> RowReader:
        """A reader for a row."""

    @abstractmethod
    def to_nodes(self, draft_logits: Tensor, size: int) -> Tensor:
        """Logits over the tokens that nodes hold, `[..., at most size]`, -inf for what must not be drafted."""

    @abstractmethod
    def draft_tokens(self, node_tokens: Tensor) -> Tensor:
        """The draft model's token of each token that a node holds; -1 where there is none."""

    def fed_tokens(self, node_tokens: Ints) -> Ints:
        """The same for nodes that the draft model has named: all of them have one."""
        return self.draft_tokens(torch.from_numpy(node_tokens)).numpy()

    def observe(self, draft_logits: Tensor) -> None:
        """Told the logits behind roots, `[rows, draft_vocab]`."""

    def figures(self) -> dict[str, Any]:
        """What to report of it."""
        return {"vocabulary": self.name}


@dataclass
class SharedVocabulary(DraftVocabulary):
    """One tokenizer, whatever padding each model's embedding has.

    Args:
        draft_size: Token ids that the draft model can take are below.
    """

    draft_size: int
    name = "shared"

    def new_reader(self) -> RowReader:
        return SharedReader(self.draft_size)

    def to_nodes(self, draft_logits: Tensor, size: int) -> Tensor:
        return draft_logits[..., :size]

    def draft_tokens(self, node_tokens: Tensor) -> Tensor:
        return node_tokens.where(node_tokens < self.draft_size, -1)

    def fed_tokens(self, node_tokens: Ints) -> Ints:
        return node_tokens


@dataclass
class SharedReader:
    """Reads the tokens as they are, those that the draft model does not know as its first.

    Args:
        draft_size: Token ids that the draft model can take are below.
    """

    draft_size: int
    num_read: int = 0

    def read(self, sequence: Tokens) -> Reading:
        known, self.num_read = sequence[self.num_read :], len(sequence)
        tokens = sequence if sequence.max() < self.draft_size else np.where(sequence < self.draft_size, sequence, 0)
        return Reading(tokens, len(sequence) - 1, known)


@dataclass
class MappedVocabulary(DraftVocabulary):
    """Two tokenizers.

    Args:
        pairs: The tokens that mean the same to both.
        known_share: Share of the prompts' tokens that have a draft token.
        masses: Probability of the pairs' draft tokens after each root, on the device, `[rows]` each.
    """

    pairs: VocabularyMap
    known_share: float = 1.0
    masses: list[Tensor] = field(default_factory=list)

    def observe(self, draft_logits: Tensor) -> None:
        self.masses.append(self.pairs.restrict(draft_logits.float().softmax(-1)).sum(-1))

    def figures(self) -> dict[str, Any]:
        return super().figures() | {
            "overlap_tokens": len(self.pairs),
            "overlap_mass": float(torch.cat(self.masses).mean()) if self.masses else None,
            "known_prompt_share": self.known_share,
        }


class TokenIntersection(MappedVocabulary):
    """Drafts tokens that both vocabularies have; the draft model reads the others in tokens of its own.

    "Accelerating LLM Inference with Lossless Speculative Decoding Algorithms for Heterogeneous Vocabularies" (arXiv
    2502.05202), token-level intersection. Nodes hold target tokens.
    """

    name = "intersection"

    def new_reader(self) -> RowReader:
        return IntersectionReader(self.pairs)

    def to_nodes(self, draft_logits: Tensor, size: int) -> Tensor:
        width = max(size, int(self.pairs.target_ids[-1]) + 1)
        return self.pairs.to_target(draft_logits, width)[..., :size]

    def draft_tokens(self, node_tokens: Tensor) -> Tensor:
        return self.pairs.draft_tokens(node_tokens)


class IntersectionReader:
    """Reads target tokens that have a draft token as that one, and spells the others.

    Args:
        pairs: Which ones have.
    """

    def __init__(self, pairs: VocabularyMap) -> None:
        self.pairs = pairs
        self.bridge = TextBridge(pairs, by_token=True)
        self.num_read = self.size = 0

    def read(self, sequence: Tokens) -> Reading:
        text = self.bridge.update(sequence)
        known = np.array([self.pairs.draft_token(token) for token in sequence[self.num_read :].tolist()], np.int32)
        # A path stays in the draft model's cache as far as its tokens are those of the text.
        same = common_prefix(known, text.tokens[self.size :]) if text.num_kept == self.size else 0
        known[:same], known[same:] = sequence[self.num_read : self.num_read + same], -1
        kept = text.num_kept if text.num_kept < self.size else len(text.tokens)
        self.num_read, self.size = len(sequence), len(text.tokens)
        return Reading(text.tokens, min(kept, self.size - 1), known)


class ReencodedText(MappedVocabulary):
    """Drafts chains of any draft tokens, which are then encoded anew for the target.

    String-level exact match of the same paper. Nodes hold draft tokens.
    """

    name = "text"

    def new_reader(self) -> RowReader:
        return TextReader(self.pairs)

    def to_nodes(self, draft_logits: Tensor, size: int) -> Tensor:
        return draft_logits

    def draft_tokens(self, node_tokens: Tensor) -> Tensor:
        return node_tokens


class TextReader:
    """Reads the row's text as the draft model's tokenizer encodes it.

    Args:
        pairs: The tokens that mean the same to both.
    """

    def __init__(self, pairs: VocabularyMap) -> None:
        self.bridge = TextBridge(pairs)
        self.size = 0

    def read(self, sequence: Tokens) -> Reading:
        text = self.bridge.update(sequence)
        is_longer = text.num_kept == self.size
        known = text.tokens[self.size if is_longer else len(text.tokens) :]
        kept = len(text.tokens) if is_longer else text.num_kept
        self.size = len(text.tokens)
        return Reading(text.tokens, min(kept, self.size - 1), known)

    def to_target(self, draft_tokens: Sequence[int]) -> TargetDraft:
        """A chain behind what was read last, in the target's tokens."""
        return self.bridge.to_target(draft_tokens)


class RowTexts:
    """The rows of a call in the draft model's tokens.

    Args:
        vocabulary: How they go together with the target's.
        sequences: The target's tokens of each row.
    """

    def __init__(self, vocabulary: DraftVocabulary, sequences: Sequence[Tokens]) -> None:
        self.vocabulary = vocabulary
        self.readers = [vocabulary.new_reader() for _ in sequences]
        self.tokens: list[Tokens] = []
        """Per row, the root's last."""
        self.read(sequences)

    @property
    def is_text(self) -> bool:
        """Whether nodes hold draft tokens, which are re-encoded for the target."""
        return self.vocabulary.name == ReencodedText.name

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(map(len, self.tokens))

    def read(self, sequences: Sequence[Tokens]) -> list[Reading]:
        """Reads what has been committed since."""
        readings = [reader.read(ids) for reader, ids in zip(self.readers, sequences, strict=True)]
        self.tokens = [reading.tokens for reading in readings]
        return readings

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Ends all rows that are not listed."""
        self.readers = [self.readers[row] for row in rows]

    def reencoded(self, nodes: DraftNodes, roots: Sequence[int], size: int, target_size: int) -> TokenTree:
        """Chains of draft tokens as chains of target tokens.

        Args:
            nodes: One chain per row.
            roots: The target's.
            size: Nodes at most.
            target_size: Token ids that the target can take are below.
        """
        rows, scores = [], []
        for i, (reader, root) in enumerate(zip(self.readers, roots, strict=True)):
            assert isinstance(reader, TextReader)
            chain = reader.to_target(nodes.tokens[i, 1 : nodes.counts[i]].tolist())
            tokens = chain.tokens[: size - 1]
            count = next((at for at, token in enumerate(tokens) if token >= target_size), len(tokens))
            # A token is right if the draft tokens are that its text reaches into, beyond those of the token before.
            starts = [0, *chain.ends]
            own = [nodes.scores[i, 1 + starts[at] : 1 + chain.ends[at]] for at in range(count)]
            rows.append([root, *tokens[:count]])
            scores.append([1.0, *(float(np.prod(part)) for part in own)])
        return TokenTree.from_rows(rows, [list(range(-1, len(row) - 1)) for row in rows], scores)


@dataclass(frozen=True)
class Vocabularies:
    """A target's vocabulary and a draft model's.

    Args:
        draft_size: Token ids that the draft model can take are below.
        pairs: The tokens that mean the same to both; None if they are one vocabulary.
        use: How they are to go together.
    """

    draft_size: int
    pairs: VocabularyMap | None = None
    use: Use = "auto"

    def of_call(self, context: DraftContext) -> DraftVocabulary | None:
        """How they go together in a call; None where nothing can be drafted.

        Raises:
            ValueError: Text cannot be drawn from a distribution over the target's tokens.
        """
        if self.pairs is None:
            return SharedVocabulary(self.draft_size)
        if self.use == "text" and context.is_sampled_from:
            raise ValueError(
                "vocabulary='text' cannot be used with a verifier that compares distributions: drafts that are "
                "re-encoded have none; use vocabulary='intersection', or the verifier 'exact'"
            )
        share = self._known_share(context)
        is_text = share < LEAST_KNOWN_SHARE if self.use == "auto" else self.use == "text"
        if is_text and not context.is_sampled_from:
            return ReencodedText(self.pairs, share)
        return TokenIntersection(self.pairs, share) if len(self.pairs) else None

    def _known_share(self, context: DraftContext) -> float:
        assert self.pairs is not None
        tokens = torch.from_numpy(np.concatenate(context.sequences).astype(np.int64))
        return float((self.pairs.draft_tokens(tokens) >= 0).float().mean())
