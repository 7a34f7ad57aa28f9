"""Which tokens of two vocabularies mean the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from specdec.drafters.tokenizers.draft_vocabulary import TokenIntersection
from specdec.drafters.tokenizers.token_text import token_text
from specdec.drafters.tokenizers.vocabulary_map import VocabularyMap, same_vocabulary, vocabulary_map
from tests.drafters.small_tokenizers import EOS, PAD, TEXT, byte_level, reordered, sentencepiece, word_piece, words


def shuffled(tokenizer: Any, seed: int = 0) -> Any:
    return reordered(tokenizer, torch.randperm(len(tokenizer), generator=torch.Generator().manual_seed(seed)).tolist())


def pairs(vocabularies: VocabularyMap) -> dict[int, int]:
    return dict(zip(vocabularies.target_ids.tolist(), vocabularies.draft_ids.tolist(), strict=True))


def read_after_a_word(tokenizer: Any, token: int) -> str:
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    return tokenizer.decode([*anchor, token])[len(tokenizer.decode(anchor)) :]


def test_same_vocabulary_is_decided_by_content() -> None:
    tokenizer = byte_level()
    assert same_vocabulary(tokenizer, tokenizer) and same_vocabulary(tokenizer, byte_level())
    assert not same_vocabulary(tokenizer, shuffled(tokenizer))
    other = byte_level(text=TEXT.replace("r", "x"))
    assert len(other) == len(tokenizer) and not same_vocabulary(tokenizer, other)
    more = byte_level()
    more.add_tokens(["<think>"])
    assert not same_vocabulary(tokenizer, more)


def test_equal_vocabularies_are_mapped_onto_themselves() -> None:
    vocabularies = vocabulary_map(byte_level(), byte_level())
    assert torch.equal(vocabularies.target_ids, vocabularies.draft_ids)
    assert set(range(400)) - set(vocabularies.target_ids.tolist()) == {byte_level().pad_token_id}


@pytest.mark.parametrize("subset_is", ["draft", "target"])
def test_subset_in_another_order(subset_is: str) -> None:
    small, large = byte_level(330), shuffled(byte_level(430))
    target, draft = (large, small) if subset_is == "draft" else (small, large)
    vocabularies = vocabulary_map(target, draft)
    assert len(vocabularies) == len(small) - 1
    assert vocabularies.target_ids.tolist() == sorted(set(vocabularies.target_ids.tolist()))
    strings = (
        target.convert_ids_to_tokens(pairs(vocabularies)),
        draft.convert_ids_to_tokens(pairs(vocabularies).values()),
    )
    assert strings[0] == strings[1]


def test_logits_go_where_their_tokens_are() -> None:
    target, draft = shuffled(byte_level(430), 1), shuffled(byte_level(330), 2)
    vocabularies = vocabulary_map(target, draft)
    logits = torch.randn(2, 3, len(draft))
    moved = vocabularies.to_target(logits, len(target))
    assert moved.shape == (2, 3, len(target)) and moved.dtype == logits.dtype
    by_string = draft.get_vocab()
    for string, token in target.get_vocab().items():
        expected = (
            logits[..., by_string[string]] if string in by_string and string != PAD else torch.full((2, 3), -torch.inf)
        )
        assert torch.equal(moved[..., token], expected)
    assert torch.equal(vocabularies.restrict(logits), logits[..., vocabularies.draft_ids])
    assert torch.equal(moved[..., vocabularies.target_ids], vocabularies.restrict(logits))


def test_tokens_one_by_one_and_none() -> None:
    target, draft = byte_level(430), shuffled(byte_level(330))
    vocabularies = vocabulary_map(target, draft)
    ids = torch.arange(-2, 500).reshape(2, -1)
    found = vocabularies.draft_tokens(ids)
    assert found.shape == ids.shape and found.dtype == torch.int64
    for token, same in zip(ids.flatten().tolist(), found.flatten().tolist(), strict=True):
        assert same == vocabularies.draft_token(token) == pairs(vocabularies).get(token, -1)
        assert same == -1 or vocabularies.target_token(same) == token
    assert vocabularies.target_token(-1) == vocabularies.target_token(10**6) == -1


def test_padded_logits() -> None:
    vocabularies = vocabulary_map(byte_level(), byte_level(), target_size=512, draft_size=448)
    logits = torch.randn(1, 448)
    moved = vocabularies.to_target(logits, 512)
    assert torch.isinf(moved[:, 400:]).all()
    kept = vocabularies.target_ids
    assert torch.equal(moved[:, kept], logits[:, kept])


def test_tokens_without_logits_are_left_out() -> None:
    vocabularies = vocabulary_map(shuffled(byte_level()), byte_level(), target_size=390, draft_size=350)
    assert 0 < len(vocabularies) < 350
    assert int(vocabularies.target_ids.max()) < 390 and int(vocabularies.draft_ids.max()) < 350
    assert vocabularies.to_target(torch.randn(1, 350), 390).shape == (1, 390)


@pytest.mark.parametrize("prefix", ["prepend", "metaspace", "none"])
def test_byte_level_and_sentencepiece_are_compared_by_bytes(prefix: str) -> None:
    target, draft = byte_level(), sentencepiece(prefix=prefix)
    vocabularies = vocabulary_map(target, draft)
    assert len(vocabularies) > 256 + 50
    found = pairs(vocabularies)
    target_ids, draft_ids = target.get_vocab(), draft.get_vocab()
    assert found[target_ids["Ġreturn"]] == draft_ids["▁return"]
    assert found[target_ids["e"]] == draft_ids["e"] != draft_ids["<0x65>"]
    assert found[target_ids["Ċ"]] == draft_ids["\n"]
    assert found[target_ids["â"]] == draft_ids["<0xE2>"]
    for token, same in found.items():
        if token != target.eos_token_id:
            assert read_after_a_word(target, token) == read_after_a_word(draft, same)


def test_word_pieces_are_compared_by_what_they_add_to_a_text() -> None:
    target, draft = byte_level(700), word_piece()
    vocabularies = vocabulary_map(target, draft)
    found = pairs(vocabularies)
    assert found[target.get_vocab()["Ġself"]] == draft.get_vocab()["self"]
    assert len(vocabularies) > 50
    for token, same in found.items():
        if token != target.eos_token_id:
            assert read_after_a_word(target, token) == read_after_a_word(draft, same)


class Odd:
    """A tokenizer whose decoding says nothing of its tokens."""

    eos_token_id = 0
    all_special_ids = (0,)

    def __init__(self, *tokens: str) -> None:
        self.tokens = ("<eos>", *tokens)

    def get_vocab(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "-".join(reversed([self.tokens[i] for i in ids]))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [self.tokens.index(char) for char in text if char in self.tokens]


def test_what_cannot_be_read_is_compared_by_string() -> None:
    target, draft = Odd("a", "b", "▁c", "d"), Odd("d", "b", "▁c", "c")
    assert not token_text(target).additive
    assert pairs(vocabulary_map(target, draft)) == {0: 0, 2: 2, 3: 3, 4: 1}


def test_end_of_text_has_a_role_and_padding_has_none() -> None:
    target, draft = byte_level(special=("<|im_end|>", PAD)), byte_level(special=(EOS, PAD))
    found = pairs(vocabulary_map(target, draft))
    assert found[target.eos_token_id] == draft.eos_token_id
    assert target.pad_token_id not in found and draft.pad_token_id not in found.values()
    other = sentencepiece()
    found = pairs(vocabulary_map(target, other))
    assert found[target.eos_token_id] == other.eos_token_id
    assert not {other.unk_token_id, other.pad_token_id} & set(found.values())


def test_end_of_text_that_is_also_padding_is_mapped() -> None:
    target, draft = byte_level(special=("</s>",)), byte_level(special=(EOS,))
    target.pad_token, draft.pad_token = target.eos_token, draft.eos_token
    assert pairs(vocabulary_map(target, draft))[target.eos_token_id] == draft.eos_token_id


def test_special_tokens_of_one_string_go_together_before_roles() -> None:
    target, draft = byte_level(special=("<|im_end|>", PAD)), byte_level(special=(EOS, PAD, "<|im_end|>"))
    draft.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    found = pairs(vocabulary_map(target, draft))
    assert found[target.eos_token_id] == draft.get_vocab()["<|im_end|>"]


def test_role_before_another_token_of_that_string() -> None:
    target, draft = byte_level(special=("<|im_end|>", PAD, EOS)), byte_level(special=(EOS, PAD))
    found = pairs(vocabulary_map(target, draft))
    assert found[target.eos_token_id] == draft.eos_token_id
    assert target.get_vocab()[EOS] not in found


def test_special_tokens_never_match_text() -> None:
    target, draft = byte_level(special=(EOS, PAD, "<think>")), byte_level(special=(EOS, PAD))
    draft.add_tokens(["<think>"])
    assert target.get_vocab()["<think>"] not in pairs(vocabulary_map(target, draft))
    target = byte_level(special=(EOS, PAD))
    target.add_tokens(["<think>"])
    found = pairs(vocabulary_map(target, draft))
    assert found[target.get_vocab()["<think>"]] == draft.get_vocab()["<think>"]


def test_nothing_in_common() -> None:
    vocabularies = vocabulary_map(Odd("a", "b"), words(3), target_size=3, draft_size=1)
    assert len(vocabularies) == 0
    assert torch.isinf(vocabularies.to_target(torch.randn(2, 1), 3)).all()
    assert vocabularies.draft_tokens(torch.arange(3)).tolist() == [-1, -1, -1]
    assert vocabularies.restrict(torch.ones(2, 1)).shape == (2, 0)


def test_overlap_mass() -> None:
    vocabularies = vocabulary_map(byte_level(430), byte_level(400))
    probs = torch.randn(2, 5, 400, generator=torch.Generator().manual_seed(0)).softmax(-1)
    vocabulary = TokenIntersection(vocabularies)
    assert vocabulary.figures()["overlap_mass"] is None
    vocabulary.observe(probs[0].log())
    vocabulary.observe(probs[1, :1].log())
    seen = probs.flatten(0, 1)[:6, byte_level().pad_token_id]
    assert vocabulary.figures()["overlap_mass"] == pytest.approx(float(1 - seen.mean()), abs=1e-6)


def test_maps_are_kept_by_content() -> None:
    first = vocabulary_map(byte_level(), sentencepiece())
    assert vocabulary_map(byte_level(), sentencepiece()) is first
    assert vocabulary_map(byte_level(), sentencepiece(), target_size=300) is not first
    assert vocabulary_map(byte_level(), sentencepiece(prefix="none")) is not first
    grown = byte_level()
    assert vocabulary_map(grown, sentencepiece()) is first
    grown.add_tokens(["self.lines.append"])
    assert len(vocabulary_map(grown, sentencepiece()).target.pieces) == len(first.target.pieces) + 1
    other_end = byte_level()
    other_end.eos_token = PAD
    assert vocabulary_map(other_end, sentencepiece()) is not first


def test_tokenizers_are_left_as_they_are() -> None:
    for make in (byte_level, sentencepiece, word_piece):
        tokenizer = make()
        tokenizer.backend_tokenizer.enable_truncation(7)
        tokenizer.backend_tokenizer.enable_padding(length=9)
        before = tokenizer.backend_tokenizer.to_str(), copy.deepcopy(tokenizer.init_kwargs)
        text = vocabulary_map(tokenizer, byte_level(350)).target
        assert len(text.encode("a long text, " * 20)) > 20
        assert (tokenizer.backend_tokenizer.to_str(), tokenizer.init_kwargs) == before
        assert tokenizer.backend_tokenizer.encode_special_tokens is False


def test_text_that_looks_like_a_special_token_is_text() -> None:
    text = token_text(byte_level())
    assert text.join(text.encode(f"a{EOS}b")) == f"a{EOS}b".encode()


def test_not_a_tokenizer() -> None:
    with pytest.raises(TypeError, match="tokenizer of transformers is needed, got dict"):
        vocabulary_map({}, byte_level())
