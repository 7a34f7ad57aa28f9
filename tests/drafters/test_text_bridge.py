"""The draft model's tokens for a row's text, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from specdec.drafters.tokenizers.text_bridge import TAIL, TextBridge, common_prefix, split_text
from specdec.drafters.tokenizers.vocabulary_map import vocabulary_map
from tests.drafters.small_tokenizers import PAD, TEXT, byte_level, reordered, sentencepiece, word_piece

TOKENIZERS: dict[str, Any] = {
    "bytes": lambda: byte_level(),
    "more bytes": lambda: byte_level(450),
    "sentencepiece": lambda: sentencepiece(),
    "metaspace": lambda: sentencepiece(prefix="metaspace"),
    "no prefix": lambda: sentencepiece(prefix="none"),
}
PAIRS = [(target, draft) for target in TOKENIZERS for draft in TOKENIZERS if target != draft]
UNICODE = "naïve 東京🚀 x\n\n  žluť — €5 a"


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


def text_of(tokenizer: Any, tokens: Any) -> str:
    return tokenizer.decode([int(token) for token in tokens if int(token) not in tokenizer.all_special_ids])


@pytest.mark.parametrize(("target_name", "draft_name"), PAIRS)
@pytest.mark.parametrize("text", [TEXT, UNICODE, "a", "\n"])
def test_draft_reads_what_its_tokenizer_would(target_name: str, draft_name: str, text: str) -> None:
    target, draft = TOKENIZERS[target_name](), TOKENIZERS[draft_name]()
    ids, bridge = encode(target, text), TextBridge(vocabulary_map(target, draft))
    before: list[int] = []
    for count in range(1, len(ids) + 1):
        update = bridge.update(np.asarray(ids[:count], np.int32))
        assert update.tokens.dtype == np.int32 and len(update.tokens)
        assert update.num_kept == common_prefix(before, update.tokens)
        assert count == 1 or len(before) - update.num_kept <= 2 * TAIL
        before = update.tokens.tolist()
    assert before == encode(draft, text) and not bridge._pending
    assert TextBridge(bridge.vocabularies).update(ids).tokens.tolist() == before


@pytest.mark.parametrize(("target_name", "draft_name"), PAIRS)
def test_token_by_token_never_changes_what_was_read(target_name: str, draft_name: str) -> None:
    target, draft = TOKENIZERS[target_name](), TOKENIZERS[draft_name]()
    vocabularies = vocabulary_map(target, draft)
    ids, bridge = encode(target, TEXT), TextBridge(vocabularies, by_token=True)
    before: list[int] = []
    for count in range(2, len(ids) + 1):
        tokens = bridge.update(ids[:count]).tokens.tolist()
        assert tokens[: len(before)] == before
        same = vocabularies.draft_token(ids[count - 1])
        if count > 2 and same >= 0:
            assert tokens == [*before, same]
        before = tokens
    assert text_of(draft, before) == TEXT


def test_space_before_a_text_is_read_as_the_draft_model_reads_it() -> None:
    draft = byte_level()
    for target, text, expected in (
        (sentencepiece(), "a", "a"),
        (sentencepiece(), " a", " a"),
        (sentencepiece(prefix="metaspace"), "a", "a"),
        (sentencepiece(prefix="none"), " a", " a"),
    ):
        bridge = TextBridge(vocabulary_map(target, draft))
        assert bridge.update(encode(target, text)).tokens.tolist() == encode(draft, expected)
        back = TextBridge(vocabulary_map(draft, target))
        assert back.update(encode(draft, text)).tokens.tolist() == encode(target, text)
        own = encode(target, text)[1:]
        assert TextBridge(back.vocabularies).to_target(own).tokens == encode(draft, expected)


def test_characters_in_the_making() -> None:
    """Up to four tokens are one character; the draft model reads its bytes as they come."""
    target, draft = byte_level(258), sentencepiece()
    bridge = TextBridge(vocabulary_map(target, draft))
    ids = encode(target, UNICODE)
    assert len(ids) == len(UNICODE.encode())
    for count in range(1, len(ids) + 1):
        update = bridge.update(ids[:count])
        joined = bridge.vocabularies.draft.join(update.tokens.tolist())
        assert joined == b" " + UNICODE.encode()[:count] and not bridge._pending


def without_bytes() -> Any:
    """A draft vocabulary in which characters have no bytes: they wait until they are whole."""
    tokenizer = word_piece(text="東 京 x🚀 naïve x")
    tokenizer.backend_tokenizer.normalizer = None
    return tokenizer


def test_characters_wait_where_bytes_have_no_tokens() -> None:
    target, draft = byte_level(258), without_bytes()
    bridge = TextBridge(vocabulary_map(target, draft))
    rocket = "🚀".encode()
    prompt = encode(target, "x")
    for count in range(1, 5):
        ids = prompt + [bridge.vocabularies.target.ids[bytes([byte])] for byte in rocket[:count]]
        update = bridge.update(ids)
        assert bridge._pending == (rocket[:count] if count < 4 else b"")
    assert text_of(draft, update.tokens) == "x🚀"
    bridge.update(ids[:-1])
    whole, ends = (
        bridge.to_target([draft.get_vocab()["##🚀"]]).tokens,
        bridge.to_target([draft.get_vocab()["##🚀"]]).ends,
    )
    assert bridge.vocabularies.target.join(whole) == rocket[3:] and ends == [1]
    assert bridge.to_target([draft.get_vocab()["x"]]).tokens == []


@pytest.mark.parametrize(("target_name", "draft_name"), PAIRS)
@pytest.mark.parametrize("by_token", [False, True])
def test_chains_become_the_targets_tokens(target_name: str, draft_name: str, by_token: bool) -> None:
    """Wherever both have a token's end, the rest of the text as the draft model writes it is what the target writes."""
    target, draft = TOKENIZERS[target_name](), TOKENIZERS[draft_name]()
    bridge = TextBridge(vocabulary_map(target, draft), by_token)
    ids, own = encode(target, TEXT), encode(draft, TEXT)
    rest_after = {bridge.vocabularies.draft.join(own[i:]): i for i in range(len(own))}
    compared = 0
    for count in range(1, len(ids)):
        bridge.update(ids[:count])
        place = rest_after.get(bridge.vocabularies.target.join(ids[count:]))
        if place is None:
            continue
        compared += 1
        result = bridge.to_target(own[place:])
        assert result.tokens == ids[count:]
        assert result.ends[-1] == len(own) - place and sorted(result.ends) == result.ends and result.ends[0] > 0
    assert compared > 50


def test_ends_say_how_much_was_needed() -> None:
    target, draft = byte_level(), byte_level(258)
    bridge = TextBridge(vocabulary_map(target, draft))
    bridge.update(encode(target, "class Reader:\n    def"))
    result = bridge.to_target(encode(draft, " __init__(self"))
    assert target.convert_ids_to_tokens(result.tokens)[-1].endswith("self")
    sizes = [len(bridge.vocabularies.target.pieces[token] or b"") for token in result.tokens]
    assert result.ends == np.cumsum(sizes).tolist() and result.ends[-1] == len(" __init__(self")


def test_unfinished_character_is_not_drafted() -> None:
    target, draft = byte_level(), byte_level(258)
    bridge = TextBridge(vocabulary_map(target, draft))
    bridge.update(encode(target, "x"))
    tokens = bridge.to_target(encode(draft, " a🚀")[:-1]).tokens
    assert bridge.vocabularies.target.join(tokens) == b" a"


def test_chain_between_the_targets_tokens() -> None:
    """The target has committed to the half of what would be one token of its own."""
    target, draft = byte_level(), byte_level(258)
    bridge = TextBridge(vocabulary_map(target, draft))
    halves = [target.get_vocab()["Ġ"], target.get_vocab()["s"], target.get_vocab()["e"]]
    bridge.update([*encode(target, "x"), *halves])
    tokens = bridge.to_target(encode(draft, "lf.")).tokens
    assert bridge.vocabularies.target.join(tokens) == b"lf."


def test_end_of_text_in_a_chain() -> None:
    target, draft = byte_level(), sentencepiece()
    bridge = TextBridge(vocabulary_map(target, draft))
    bridge.update(encode(target, "def read"))
    chain = draft("(path)", add_special_tokens=False)["input_ids"]
    result = bridge.to_target([*chain, draft.eos_token_id, *chain])
    assert result.tokens[-1] == target.eos_token_id and result.ends[-1] == len(chain) + 1
    assert bridge.to_target([draft.eos_token_id]).tokens == [target.eos_token_id]
    assert bridge.to_target([]).tokens == [] and bridge.to_target([draft.unk_token_id, *chain]).tokens == []


def test_special_tokens_of_the_target() -> None:
    """Its beginning is the draft model's own, what both have is kept, what only the target has is left out."""
    target = sentencepiece()
    draft = byte_level(special=("</s>", PAD))
    target.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    user = target.get_vocab()["<|user|>"]
    word = target("read", add_special_tokens=False)["input_ids"]
    bridge = TextBridge(vocabulary_map(target, draft))
    tokens = bridge.update([target.bos_token_id, user, *word, target.eos_token_id, *word]).tokens.tolist()
    expected = encode(draft, "read")
    assert tokens == [*expected, draft.eos_token_id, *encode(draft, " read")]
    other = TextBridge(vocabulary_map(draft, target))
    assert other.update([draft.eos_token_id]).tokens.tolist() == [target.bos_token_id, target.eos_token_id]
    assert len(TextBridge(vocabulary_map(target, draft)).update([target.bos_token_id]).tokens) == 1


@pytest.mark.parametrize("by_token", [False, True])
def test_another_text_starts_anew(by_token: bool) -> None:
    target, draft = byte_level(), sentencepiece()
    bridge = TextBridge(vocabulary_map(target, draft), by_token)
    one, two = encode(target, "def read(path)"), encode(target, "def read:\n    return")
    bridge.update(one)
    update = bridge.update(two)
    fresh = TextBridge(bridge.vocabularies, by_token).update(two)
    assert update.tokens.tolist() == fresh.tokens.tolist() and 0 < update.num_kept < len(update.tokens)


@pytest.mark.parametrize("separator", [" ", "", "\n"])
def test_long_text_is_encoded_once(separator: str) -> None:
    target, draft = byte_level(), sentencepiece()
    ids = encode(target, separator.join(["self.lines.append(line)", "東京"] * 400))
    bridge = TextBridge(vocabulary_map(target, draft))
    lengths: list[int] = []
    encode_inside = bridge.vocabularies.draft._encode_inside
    bridge.update(ids[:2000])
    bridge.vocabularies.draft._encode_inside = lambda text: lengths.append(len(text)) or encode_inside(text)
    try:
        for count in range(2001, len(ids) + 1):
            update = bridge.update(ids[:count])
    finally:
        bridge.vocabularies.draft._encode_inside = encode_inside
    assert max(lengths) < 20 * TAIL * 8
    assert text_of(draft, update.tokens) == text_of(target, ids)


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize(("target_name", "draft_name"), [*PAIRS, ("bytes", "words"), ("words", "bytes")])
def test_nonsense(target_name: str, draft_name: str, by_token: bool) -> None:
    """Any ids, special and padded ones too, in any order."""
    target, draft = ({**TOKENIZERS, "words": word_piece}[name]() for name in (target_name, draft_name))
    bridge, rng = TextBridge(vocabulary_map(target, draft), by_token), np.random.default_rng(0)
    ids = rng.integers(0, len(target) + 5, 300)
    for count in range(1, 300, 7):
        update = bridge.update(ids[:count])
        assert len(update.tokens) and update.tokens.min() >= 0 and update.tokens.max() < len(draft)
        chain = rng.integers(0, len(draft) + 5, 6).tolist()
        result = bridge.to_target(chain)
        assert len(result.tokens) == len(result.ends)
        assert all(0 <= token < len(target) for token in result.tokens)
        assert all(1 <= end <= 6 for end in result.ends) and sorted(result.ends) == result.ends


def test_ids_in_another_order() -> None:
    target = byte_level()
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(3)).tolist()
    draft = reordered(target, order)
    for by_token in (False, True):
        bridge = TextBridge(vocabulary_map(target, draft), by_token)
        assert bridge.update(encode(target, TEXT)).tokens.tolist() == encode(draft, TEXT)


def test_split_text() -> None:
    assert split_text(b"") == ([], b"")
    assert split_text("aé".encode()) == (["aé"], b"")
    assert split_text("a€".encode()[:-1]) == (["a"], "€".encode()[:-1])
    assert split_text(b"a\xffb\xe2\x82c\xf0\x9f") == (["a", b"\xff", "b", b"\xe2\x82", "c"], b"\xf0\x9f")


def test_common_prefix() -> None:
    assert common_prefix([], [1]) == 0 and common_prefix([1, 2, 3], np.array([1, 2, 4, 5])) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2
