"""What the tokens of any tokenizer stand for: bytes in the middle of a text, or a special token."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from specdec.drafters.ngrams.documents import tokenizer_fingerprint

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A byte as sentencepiece spells it."""

ADDING_NO_SPACE = {"prepend_scheme": "never", "add_prefix_space": False}
ROLES = ("eos", "bos", "pad", "unk")
SPACE_MARK = "▁"
REPLACEMENT = "\ufffd"
"""What decoding writes for bytes that are no character."""

NUM_PROBED = 256
ODD_SHARE = 0.02
CACHE_SIZE = 8


@dataclass(eq=False)
class TokenText:
    """A tokenizer seen from its text.

    Args:
        content: Digest of the tokenizer: equal for tokenizers that encode and decode alike.
        strings: Token strings by id.
        pieces: Bytes by id that an ordinary token adds to a text when it follows another; None for special tokens, for
            ids without a token, and where it cannot be told.
        additive: Whether decoding puts the pieces one after the other, so that they may be compared with others'.
        specials: Ids of special tokens by their strings.
        eos: End-of-text token; None where there is none, as for the next three.
        bos: Token that begins a text.
        pad: Padding token.
        unk: Token for what cannot be encoded.
        prefix: What the tokenizer puts before a text by itself.
        ids: Token by bytes; where several have the same, the one that the tokenizer would use.
    """

    content: str
    strings: dict[int, str]
    pieces: list[bytes | None]
    additive: bool
    specials: dict[str, int]
    eos: int | None
    bos: int | None
    pad: int | None
    unk: int | None
    prefix: tuple[int, ...]
    _encode: Callable[[str], list[int]] = field(repr=False)
    _encode_inside: Callable[[str], list[int]] = field(repr=False)
    ids: dict[bytes, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.ids = {}
        spelled: dict[bytes, int] = {}
        for token, piece in enumerate(self.pieces):
            if piece:
                is_spelled = BYTE_TOKEN.fullmatch(self.strings[token]) is not None
                (spelled if is_spelled else self.ids).setdefault(piece, token)
        self.ids = spelled | self.ids
        self.adds_space = self.join(self._encode("a")) == b" a"

    def piece(self, token: int) -> bytes | None:
        """Bytes of a token; None as in `pieces`, and out of range."""
        return self.pieces[token] if 0 <= token < len(self.pieces) else None

    def join(self, tokens: Iterable[int]) -> bytes:
        """Bytes of ordinary tokens one after the other; tokens without bytes are left out."""
        return b"".join(self.piece(token) or b"" for token in tokens)

    def encode(self, text: str, begins: bool = False) -> list[int]:
        """Token ids of a text; what looks like a special token in it is text.

        Args:
            text: Any text.
            begins: Encode as the beginning of a text, where some tokenizers add a space, instead of the middle of one.
        """
        if not text:
            return []
        return self._encode(text) if begins else self._encode_inside(text)

    def spell(self, data: bytes) -> list[int] | None:
        """Tokens of single bytes; None where the vocabulary lacks one of them."""
        tokens = [self.ids.get(bytes([byte])) for byte in data]
        return None if None in tokens else [token for token in tokens if token is not None]


_cache: OrderedDict[str, TokenText] = OrderedDict()
_lock = threading.Lock()


def check_tokenizer(tokenizer: Any) -> None:
    """Raises a TypeError for what is not a transformers tokenizer."""
    for name in ("get_vocab", "decode", "encode"):
        if not hasattr(tokenizer, name):
            raise TypeError(f"a tokenizer of transformers is needed, got {type(tokenizer).__name__} without {name}()")


def token_text(tokenizer: Any) -> TokenText:
    """Reads a tokenizer, without changing it; tokenizers of equal content are read once.

    Raises:
        TypeError: It is not a transformers tokenizer.
    """
    check_tokenizer(tokenizer)
    saved = _saved(tokenizer)
    content = _content(tokenizer, saved)
    with _lock:
        if content not in _cache:
            _cache[content] = _read(tokenizer, saved, content)
            while len(_cache) > CACHE_SIZE:
                _cache.popitem(last=False)
        _cache.move_to_end(content)
        return _cache[content]


def _saved(tokenizer: Any) -> str | None:
    """The tokenizer of the `tokenizers` library in its own format; None for one written in Python."""
    try:
        return tokenizer.backend_tokenizer.to_str()
    except Exception:  # no such attribute, or a component that cannot be saved
        return None


def _content(tokenizer: Any, saved: str | None) -> str:
    roles = [getattr(tokenizer, f"{role}_token_id", None) for role in ROLES]
    rest = f"{tokenizer.__class__.__name__} {id(tokenizer)}" if saved is None else saved
    return hashlib.sha256(f"{tokenizer_fingerprint(tokenizer)} {roles} {rest}".encode("utf-8", "replace")).hexdigest()


def _read(tokenizer: Any, saved: str | None, content: str) -> TokenText:
    strings = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    special_ids = set(getattr(tokenizer, "all_special_ids", ()))
    special_ids |= {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    ordinary = {i: token for i, token in sorted(strings.items()) if i not in special_ids}
    found, additive = _pieces(tokenizer, ordinary)
    pieces: list[bytes | None] = [None] * (max(strings, default=-1) + 1)
    for token_id, piece in found.items():
        pieces[token_id] = piece
    encode, encode_inside, prefix = _encoders(tokenizer, saved, special_ids)
    roles = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ROLES}
    return TokenText(
        content=content,
        strings=strings,
        pieces=pieces,
        additive=additive,
        specials={strings[i]: i for i in sorted(special_ids) if i in strings},
        prefix=prefix,
        _encode=encode,
        _encode_inside=encode_inside,
        **roles,
    )


def _encoders(
    tokenizer: Any, saved: str | None, special_ids: set[int]
) -> tuple[Callable[[str], list[int]], Callable[[str], list[int]], tuple[int, ...]]:
    """Encoders of the beginning and of the middle of a text, and what is put before a text."""
    if saved is None:
        encode = functools.partial(tokenizer.encode, add_special_tokens=False)
        with_prefix: list[int] = tokenizer.encode("a")
        encode_inside = encode
    else:
        # Copies: truncation, padding and the treatment of special tokens are the user's settings.
        begin = inside = Tokenizer.from_str(saved)
        steps = {"normalizer": begin.normalizer, "pre_tokenizer": begin.pre_tokenizer}
        adding = {name: json.loads(step.__getstate__()) for name, step in steps.items() if step is not None}
        if (changed := _without_prefix(adding)) != adding:
            inside = Tokenizer.from_str(json.dumps(json.loads(saved) | {"normalizer": None} | changed))
        for copy in (begin, inside):
            copy.no_truncation()
            copy.no_padding()
            copy.encode_special_tokens = True
        with_prefix = begin.encode("a").ids
        encode, encode_inside = functools.partial(_ids, begin), functools.partial(_ids, inside)
    count = next((i for i, token in enumerate(with_prefix) if token not in special_ids), 0)
    return encode, encode_inside, tuple(with_prefix[:count])


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def _without_prefix(part: Any) -> Any:
    """A part of a saved tokenizer, so that it adds no space before a text."""
    if isinstance(part, list):
        return [changed for item in part if (changed := _without_prefix(item)) is not None]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    changed = {name: _without_prefix(value) for name, value in part.items()}
    return changed | {name: value for name, value in ADDING_NO_SPACE.items() if name in changed}


def _pieces(tokenizer: Any, ordinary: dict[int, str]) -> tuple[dict[int, bytes], bool]:
    """Bytes of each ordinary token, and whether they may be relied on: an alphabet is believed if decoding agrees."""
    anchor = next((i for i, token in ordinary.items() if token.isascii() and token.isalnum()), None)
    if anchor is None:
        return {i: _literal(token) for i, token in ordinary.items()}, False
    decoded = _decode_after(tokenizer, anchor, _probe_sample(ordinary))
    for alphabet in (_byte_level, _sentencepiece, _literal):
        odd = [i for i, text in decoded.items() if alphabet(ordinary[i]).decode("utf-8", "replace") != text]
        if len(odd) <= ODD_SHARE * len(decoded):
            # Tokens that were added by hand may be written as they please.
            regular = {i: alphabet(token) for i, token in ordinary.items() if i not in odd}
            return regular | _readable({i: decoded[i] for i in odd}), True
    pieces = _readable(_decode_after(tokenizer, anchor, ordinary))
    sample = [i for i in decoded if i in pieces]
    begin = _decode(tokenizer, [anchor])
    additive = None not in decoded.values() and all(
        _decode(tokenizer, [anchor, i, other]).encode() == begin.encode() + pieces[i] + pieces[other]
        for i, other in zip(sample, reversed(sample), strict=True)
    )
    return pieces, additive


def _readable(texts: dict[int, str | None]) -> dict[int, bytes]:
    return {i: text.encode() for i, text in texts.items() if text is not None and REPLACEMENT not in text}


def _probe_sample(ordinary: dict[int, str]) -> list[int]:
    """Tokens from all over the vocabulary, and some of every kind that alphabets treat differently."""
    tokens = list(ordinary)
    sample = tokens[:: max(1, len(tokens) // NUM_PROBED)]
    for is_kind in (lambda s: not s.isascii(), lambda s: "Ġ" in s, lambda s: SPACE_MARK in s, BYTE_TOKEN.fullmatch):
        kind = [i for i in tokens if is_kind(ordinary[i])]
        sample += kind[:: max(1, len(kind) // 16)]
    return sorted(set(sample))


def _decode_after(tokenizer: Any, anchor: int, tokens: Iterable[int]) -> dict[int, str | None]:
    """What each token adds to a text; None where it changes the text before it."""
    before = _decode(tokenizer, [anchor])
    texts = {i: _decode(tokenizer, [anchor, i]) for i in tokens}
    return {i: text[len(before) :] if text.startswith(before) else None for i, text in texts.items()}


def _decode(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTES[char] for char in token])
    except KeyError:
        return _literal(token)


def _sentencepiece(token: str) -> bytes:
    byte = BYTE_TOKEN.fullmatch(token)
    return bytes.fromhex(byte[1]) if byte else _literal(token.replace(SPACE_MARK, " "))


def _literal(token: str) -> bytes:
    return token.encode("utf-8", "surrogatepass")
