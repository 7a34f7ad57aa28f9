"""The draft model's tokens for a row's text, and back, where the two tokenizers differ."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specdec.drafters.tokenizers.token_text import TokenText
from specdec.drafters.tokenizers.vocabulary_map import VocabularyMap

TAIL = 32
"""Tokens at the end of a text that may change when it grows; the text before them is encoded once."""

IntArray = NDArray[np.int32]


@dataclass(frozen=True)
class DraftText:
    """The draft model's view of a row.

    Args:
        tokens: Every draft token of the row's text, `[tokens]`, int32, at least one.
        num_kept: How many of them, from the first on, are those of the update before.
    """

    tokens: IntArray
    num_kept: int


@dataclass(frozen=True)
class TargetDraft:
    """A chain of draft tokens as the target would write it.

    Args:
        tokens: Target tokens that follow the committed ones.
        ends: Per target token, how many draft tokens its text reaches into.
    """

    tokens: list[int]
    ends: list[int]


def common_prefix(a: Sequence[int] | IntArray, b: Sequence[int] | IntArray) -> int:
    """How many tokens two sequences share from the first on."""
    size = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:size]) != np.asarray(b[:size]))
    return int(different[0]) if len(different) else size


class TextBridge:
    """Follows one row of the target in the draft model's vocabulary.

    Nothing here has to be right for the output to be exact: the target verifies whatever comes of it. String-level
    exact match in "Accelerating LLM Inference with Lossless Speculative Decoding Algorithms for Heterogeneous
    Vocabularies" (arXiv 2502.05202), except that only the end of the text is encoded again at each step.

    Args:
        vocabularies: What the tokens of both mean.
        by_token: Map each target token that has a draft token to it, and spell only the others: nothing ever changes
            behind, and a verified path keeps its draft tokens. Otherwise the text is encoded as the draft model's
            tokenizer does, and the last tokens may change when it grows.
    """

    def __init__(self, vocabularies: VocabularyMap, by_token: bool = False) -> None:
        self.vocabularies = vocabularies
        self.by_token = by_token
        self._last = np.zeros(0, np.int32)
        self._reset()

    def _reset(self) -> None:
        self._seen = np.zeros(0, np.int32)
        self._settled = np.asarray(self.vocabularies.draft.prefix, np.int32)
        self._fresh: list[int] = []  # settled since the arrays were last joined
        self._open = bytearray()  # the text after the settled tokens
        self._begins = True  # no text is settled
        self._is_bare = True  # no text was taken
        self._pending = b""  # of an unfinished character at the end, for which there are no draft tokens yet

    def update(self, target_tokens: Sequence[int] | IntArray) -> DraftText:
        """Takes all committed tokens of the row and returns the draft model's.

        Args:
            target_tokens: Every token so far, the root included. Those that an update has seen are not worked on again.
        """
        tokens = np.array(target_tokens, np.int32)
        if common_prefix(self._seen, tokens) < len(self._seen):
            self._reset()
        start, self._seen = len(self._seen), tokens
        for position, token in enumerate(tokens[start:].tolist(), start):
            self._take(token, position)
        tail = self._encode_open()
        self._settled = np.concatenate([self._settled, np.asarray(self._fresh, np.int32)])
        self._fresh = []
        draft = np.concatenate([self._settled, np.asarray(tail, np.int32)])
        if not len(draft):
            draft = np.asarray([self._first_token()], np.int32)
        text = DraftText(draft, common_prefix(draft, self._last))
        self._last = draft
        return text

    def to_target(self, draft_tokens: Sequence[int]) -> TargetDraft:
        """Re-encodes a chain that continues the last update's tokens, so that it continues the committed ones.

        Args:
            draft_tokens: What the draft model proposes. Reading stops at a token that means nothing to the target.
        """
        draft, target = self.vocabularies.draft, self.vocabularies.target
        pieces = [draft.piece(token) for token in draft_tokens]
        count = pieces.index(None) if None in pieces else len(pieces)
        data = b"".join(piece or b"" for piece in pieces[:count])
        # What the draft tokens repeat: the character that they finish, the space before a text.
        known = b" " if draft.adds_space and self._is_bare and data[:1] == b" " else self._pending
        if not data.startswith(known):
            return TargetDraft([], [])
        ends = list(itertools.accumulate(len(piece or b"") for piece in pieces[:count]))
        size = len(known)
        tokens, reached = self._continue(data[size:]), []
        for token in tokens:
            size += len(target.piece(token) or b"")
            reached.append(min(int(np.searchsorted(ends, size)) + 1, count))
        special = self.vocabularies.target_token(draft_tokens[count]) if count < len(pieces) else -1
        if special >= 0 and size == len(data):
            return TargetDraft([*tokens, special], [*reached, count + 1])
        return TargetDraft(tokens, reached)

    def _take(self, token: int, position: int) -> None:
        target = self.vocabularies.target
        piece = target.piece(token)
        if piece is None:
            self._settle_special(token, leads=position == 0 and token == target.bos)
            return
        if self._is_bare and target.adds_space and piece.startswith(b" "):
            piece = piece[1:]
        self._is_bare = False
        if not self.by_token:
            self._open += piece
            return
        same = -1 if self._begins else self.vocabularies.draft_token(token)
        self._fresh += [same] if same >= 0 else _encode_bytes(self.vocabularies.draft, piece, self._begins)
        self._begins = False

    def _settle_special(self, token: int, leads: bool) -> None:
        if self._open:
            self._fresh += _encode_bytes(self.vocabularies.draft, bytes(self._open), self._begins)
            self._open.clear()
            self._begins = False
        same = self.vocabularies.draft_token(token)
        if not leads and same >= 0:
            self._fresh.append(same)

    def _encode_open(self) -> list[int]:
        """Draft tokens of the open text; what will not change any more is settled."""
        draft = self.vocabularies.draft
        parts, unfinished = split_text(bytes(self._open))
        for part in parts[:-1]:
            self._settle(_encode_part(draft, part, self._begins), _size(part))
        tokens = _encode_part(draft, parts[-1], self._begins) if parts else []
        if len(tokens) > 2 * TAIL and isinstance(parts[-1], str):
            cut, num_bytes = _place_to_cut(draft, tokens, parts[-1].encode())
            self._settle(tokens[:cut], num_bytes)
            tokens = tokens[cut:]
        spelled = draft.spell(unfinished)
        self._pending = unfinished if spelled is None else b""
        return tokens + (spelled or [])

    def _settle(self, tokens: list[int], num_bytes: int) -> None:
        if num_bytes:
            self._fresh += tokens
            del self._open[:num_bytes]
            self._begins = False

    def _continue(self, data: bytes) -> list[int]:
        """Target tokens of bytes that follow the committed tokens; an unfinished character at the end is left out."""
        if not data:
            return []
        target = self.vocabularies.target
        before, begins = self._target_tail()
        parts, _ = split_text(before + data)
        if len(parts) == 1 and isinstance(parts[0], str):
            tokens = target.encode(parts[0], begins)
            added = _added_bytes(target, tokens, parts[0].encode())
            if added is not None:
                sizes = [len(target.piece(token) or b"") for token in tokens]
                places = [0, *(size - added for size in itertools.accumulate(sizes))]
                if len(before) in places:
                    return tokens[places.index(len(before)) :]
        # No token ends where the committed ones do: what is drafted is encoded by itself.
        tokens = _encode_bytes(target, data, begins=False, whole=True)
        return list(itertools.takewhile(lambda token: target.piece(token) is not None, tokens))

    def _target_tail(self) -> tuple[bytes, bool]:
        """Bytes of the last committed tokens, from the beginning of a word if there is one, and if that is all text."""
        target = self.vocabularies.target
        pieces: list[bytes] = []
        for token in self._seen[::-1][:TAIL].tolist():
            piece = target.piece(token)
            if piece is None:
                break
            pieces.insert(0, piece)
        if len(pieces) == len(self._seen) or (len(pieces) + 1 == len(self._seen) and self._seen[0] == target.bos):
            tail = b"".join(pieces)
            return (tail[1:] if target.adds_space and tail.startswith(b" ") else tail), True
        if len(pieces) == TAIL:
            word = next((i for i, piece in enumerate(pieces) if _starts_word(piece)), 0)
            return b"".join(pieces[word:]).lstrip(bytes(range(0x80, 0xC0))), False
        return b"".join(pieces), False

    def _first_token(self) -> int:
        draft = self.vocabularies.draft
        return next((token for token in (draft.bos, draft.eos) if token is not None), 0)


def split_text(data: bytes) -> tuple[list[str | bytes], bytes]:
    """Cuts bytes into text and what is not UTF-8, in turn.

    Returns:
        The parts, and the beginning of a character at the end, which more bytes may complete.
    """
    parts: list[str | bytes] = []
    while data:
        try:
            return [*parts, data.decode()], b""
        except UnicodeDecodeError as error:
            if error.start:
                parts.append(data[: error.start].decode())
            if error.end == len(data) and error.reason == "unexpected end of data":
                return parts, data[error.start :]
            parts.append(data[error.start : error.end])
            data = data[error.end :]
    return parts, b""


def _encode_bytes(text: TokenText, data: bytes, begins: bool, whole: bool = False) -> list[int]:
    """Tokens of bytes that need not be text; bytes that no token stands for are left out.

    Args:
        text: Whose tokens.
        data: The bytes.
        begins: They begin a text.
        whole: Leave out an unfinished character at the end.
    """
    parts, unfinished = split_text(data)
    tokens = []
    for number, part in enumerate(parts):
        tokens += _encode_part(text, part, begins and number == 0)
    return tokens if whole else tokens + (text.spell(unfinished) or [])


def _encode_part(text: TokenText, part: str | bytes, begins: bool) -> list[int]:
    return text.encode(part, begins) if isinstance(part, str) else text.spell(part) or []


def _size(part: str | bytes) -> int:
    return len(part.encode() if isinstance(part, str) else part)


def _added_bytes(text: TokenText, tokens: list[int], data: bytes) -> int | None:
    """How many bytes, a space, the tokens have before the text that they encode; None if they change the text."""
    joined = text.join(tokens)
    if any(text.piece(token) is None for token in tokens):
        return None
    return next((added for added in (0, 1) if joined == b" " * added + data), None)


def _place_to_cut(text: TokenText, tokens: list[int], data: bytes) -> tuple[int, int]:
    """How many tokens and bytes are before the last word that begins `TAIL` tokens before the end or earlier.

    Tokenizers encode words by themselves, so that both sides stay as they are when the right one is encoded alone.
    """
    added = _added_bytes(text, tokens, data)
    if added is None:
        return 0, 0
    pieces = [text.piece(token) or b"" for token in tokens]
    last = len(tokens) - TAIL
    for is_place in (_starts_word, _starts_character):
        for cut in range(last, 0, -1):
            if is_place(pieces[cut]) and (is_place is _starts_character or not _ends_in_space(pieces[cut - 1])):
                return cut, sum(map(len, pieces[:cut])) - added
        if len(tokens) < 16 * TAIL:
            break
    return 0, 0


def _starts_word(piece: bytes) -> bool:
    return piece[:1].isspace()


def _ends_in_space(piece: bytes) -> bool:
    return piece[-1:].isspace()


def _starts_character(piece: bytes) -> bool:
    return bool(piece) and piece[0] & 0xC0 != 0x80
