"""A draft model whose tokenizer is not the target's: which tokens mean the same to both."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.drafters.tokenizers.token_text import TokenText, token_text

CACHE_SIZE = 8


def same_vocabulary(tokenizer_a: Any, tokenizer_b: Any) -> bool:
    """Whether two tokenizers give every token, added ones included, the same id.

    Sizes of the models' embeddings do not matter: a padded vocabulary is the same vocabulary.
    """
    return tokenizer_a is tokenizer_b or tokenizer_a.get_vocab() == tokenizer_b.get_vocab()


@dataclass(eq=False)
class VocabularyMap:
    """Pairs of a target token and a draft token that stand for the same text, or for the same special token.

    What a draft model says about the tokens of the overlap is a draft in the target's vocabulary: token-level
    intersection in "Accelerating LLM Inference with Lossless Speculative Decoding Algorithms for Heterogeneous
    Vocabularies" (arXiv 2502.05202).

    Args:
        target_ids: Ascending, without repeats, `[overlap]`, int64, on the CPU.
        draft_ids: The draft token of each, without repeats, `[overlap]`, int64, on the CPU.
        target: What the target's tokens stand for.
        draft: What the draft model's tokens stand for.
    """

    target_ids: Tensor
    draft_ids: Tensor
    target: TokenText
    draft: TokenText

    def __post_init__(self) -> None:
        self._to_draft = _table(self.target_ids, self.draft_ids)
        self._to_target = _table(self.draft_ids, self.target_ids)
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return len(self.target_ids)

    def restrict(self, draft_logits: Tensor) -> Tensor:
        """The columns of the overlap in the order of `target_ids`: `[..., draft_vocab]` to `[..., overlap]`."""
        return draft_logits.index_select(-1, self._on("draft_ids", draft_logits.device))

    def to_target(self, draft_logits: Tensor, target_size: int) -> Tensor:
        """Logits over the target's vocabulary, -inf outside of the overlap.

        Args:
            draft_logits: `[..., draft_vocab]`.
            target_size: Width of the target's logits.

        Returns:
            `[..., target_size]`, of the same dtype.
        """
        logits = draft_logits.new_full((*draft_logits.shape[:-1], target_size), float("-inf"))
        return logits.index_copy_(-1, self._on("target_ids", draft_logits.device), self.restrict(draft_logits))

    def draft_tokens(self, target_tokens: Tensor) -> Tensor:
        """The draft token of each target token, of any shape; -1 where there is none."""
        return _look_up(self._on("_to_draft", target_tokens.device), target_tokens)

    def target_token(self, draft_token: int) -> int:
        """The target token of one draft token, -1 where there is none."""
        return int(self._to_target[draft_token]) if 0 <= draft_token < len(self._to_target) else -1

    def draft_token(self, target_token: int) -> int:
        """The draft token of one target token, -1 where there is none."""
        return int(self._to_draft[target_token]) if 0 <= target_token < len(self._to_draft) else -1

    def _on(self, name: str, device: torch.device) -> Tensor:
        key = (name, device)
        if key not in self._on_device:
            self._on_device[key] = getattr(self, name).to(device)
        return self._on_device[key]


_cache: OrderedDict[tuple[str, str, int | None, int | None], VocabularyMap] = OrderedDict()
_lock = threading.Lock()


def vocabulary_map(
    target_tokenizer: Any, draft_tokenizer: Any, target_size: int | None = None, draft_size: int | None = None
) -> VocabularyMap:
    """The tokens that mean the same to a target and to a draft model; made once per contents of the two tokenizers.

    Args:
        target_tokenizer: The target's tokenizer. It is not changed, nor is the other.
        draft_tokenizer: The draft model's tokenizer.
        target_size: Width of the target's logits: tokens from there on are left out. None: no limit.
        draft_size: Width of the draft model's logits.

    Raises:
        TypeError: One of them is not a transformers tokenizer.
    """
    target, draft = token_text(target_tokenizer), token_text(draft_tokenizer)
    key = (target.content, draft.content, target_size, draft_size)
    with _lock:
        if key not in _cache:
            pairs = sorted(_special_pairs(target, draft) | _ordinary_pairs(target, draft))
            kept = [(t, d) for t, d in pairs if t < (target_size or t + 1) and d < (draft_size or d + 1)]
            ids = torch.tensor(kept, dtype=torch.int64).reshape(-1, 2)
            _cache[key] = VocabularyMap(ids[:, 0].contiguous(), ids[:, 1].contiguous(), target, draft)
            while len(_cache) > CACHE_SIZE:
                _cache.popitem(last=False)
        _cache.move_to_end(key)
        return _cache[key]


def _ordinary_pairs(target: TokenText, draft: TokenText) -> set[tuple[int, int]]:
    if target.additive and draft.additive:
        return {(token, draft.ids[piece]) for piece, token in target.ids.items() if piece in draft.ids}
    by_string = {string: token for token, string in draft.strings.items() if string not in draft.specials}
    return {
        (token, by_string[string])
        for token, string in target.strings.items()
        if string in by_string and string not in target.specials
    }


def _special_pairs(target: TokenText, draft: TokenText) -> set[tuple[int, int]]:
    """Special tokens of the same string; the tokens that end a text also when their strings differ."""
    strings = {
        string: (token, draft.specials[string]) for string, token in target.specials.items() if string in draft.specials
    }
    pairs = {(t, d) for t, d in strings.values() if _may_be_drafted(t, target) and _may_be_drafted(d, draft)}
    if target.eos is None or draft.eos is None or any(t == target.eos for t, _ in pairs):
        return pairs
    return {(t, d) for t, d in pairs if d != draft.eos} | {(target.eos, draft.eos)}


def _may_be_drafted(token: int, text: TokenText) -> bool:
    return token == text.eos or token not in (text.pad, text.unk)


def _table(keys: Tensor, values: Tensor) -> Tensor:
    table = torch.full((int(keys.max()) + 1 if len(keys) else 0,), -1, dtype=torch.int64)
    table[keys] = values
    return table


def _look_up(table: Tensor, tokens: Tensor) -> Tensor:
    known = (tokens >= 0) & (tokens < len(table))
    if not len(table):
        return torch.full_like(tokens, -1, dtype=torch.int64)
    return torch.where(known, table[tokens.clamp(0, len(table) - 1).long()], -1)
