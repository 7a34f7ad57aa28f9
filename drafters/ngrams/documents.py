"""What users hand in for retrieval: token ids or text, and the tokenizer they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from specdec.drafters.ngrams.ngram_index import IntArray

TOKEN_LIMIT = 2**31
"""Token ids are kept as int32."""

Documents = str | torch.Tensor | NDArray[Any] | Sequence[Any]
"""Text or token ids of one document (a list, a tensor or array with one axis), or a sequence of documents."""


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of a vocabulary: equal for tokenizers that give every token the same id, whatever their names.

    Args:
        tokenizer: Anything with `get_vocab()`, a dict from token to id.
    """
    digest = hashlib.sha256()
    for token, token_id in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{token_id} {len(token)} {token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def token_documents(documents: Documents, tokenizer: Any = None) -> Iterator[IntArray]:
    """Yields the token ids of each document, `[tokens]`, int32, a fresh array.

    Args:
        documents: One document or a sequence of them.
        tokenizer: Encodes text; not needed for token ids.

    Raises:
        TypeError: For anything that is neither text nor token ids.
        ValueError: For text without a tokenizer, and for token ids out of range.
    """
    if isinstance(documents, str):
        if tokenizer is None:
            raise ValueError("documents: text needs a tokenizer; pass tokenizer=..., or token ids instead of text")
        yield _checked_ids(np.asarray(tokenizer.encode(documents, add_special_tokens=False), np.int64))
        return
    if isinstance(documents, torch.Tensor):
        documents = documents.detach().cpu().numpy()
    if isinstance(documents, np.ndarray):
        if documents.ndim not in (1, 2):
            raise ValueError(
                f"documents: an array of token ids must be [tokens] or [documents, tokens], got {list(documents.shape)}"
            )
        for ids in np.atleast_2d(documents):
            yield _checked_ids(ids)
        return
    if not isinstance(documents, Sequence):
        raise TypeError(
            f"documents: must be text, a list, array or tensor of token ids, or a sequence of these, "
            f"got {type(documents).__name__}"
        )
    nested = bool(documents) and (isinstance(documents[0], Sequence) or getattr(documents[0], "ndim", 0) > 0)
    if nested or not documents:
        for document in documents:
            yield from token_documents(document, tokenizer)
    else:
        yield _checked_ids(np.asarray(documents))


def _checked_ids(ids: NDArray[Any]) -> IntArray:
    too_large = ids.dtype == object and all(isinstance(token, int) for token in ids.flat)
    if ids.size and ids.dtype.kind not in "iu" and not too_large:
        raise TypeError(f"token ids must be integers, got an array of {ids.dtype}")
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= TOKEN_LIMIT):
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise ValueError(
            f"token ids must be in 0 <= id < 2**31, got {wrong}; remove padding and masked labels (-100) first"
        )
    return np.array(ids, np.int32, order="C")
