"""Retrieves what followed the last tokens before, as a tree."""

from __future__ import annotations

import copy
import functools
import itertools
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from specdec.drafters.base import DraftContext, Drafter, DraftSession
from specdec.drafters.ngrams.documents import Documents, token_documents, tokenizer_fingerprint
from specdec.drafters.ngrams.ngram_index import (
    IntArray,
    NgramIndex,
    PeerOutputs,
    power_of_two,
    room_for_matches,
)
from specdec.drafters.ngrams.ngram_store import load_indexes, save_indexes
from specdec.drafters.ngrams.trie_growth import ScoreArray, draft_row
from specdec.kernels import Ints
from specdec.tree import TokenTree

SCOPES = ("request", "shared", "corpus")
"""What may be added to and cleared."""
SOURCES = 5
"""Indexes that a draft comes from: own text, predicted outputs, peers, shared and corpus scope."""
NO_TOKENS: IntArray = np.zeros(0, np.int32)
PEERS = 2
"""Place of the other rows' outputs among them."""
MIN_BYTES = 4096
"""Smallest memory budget of a scope."""
MAX_SLOTS = 2**20
"""Largest size of a hash table."""
FIRST_SLOTS = 2**14
"""Initial size of a hash table, which doubles with the text. Raising it makes the first call slower."""
BOUNDS: dict[str, tuple[float, float]] = {
    "max_nodes": (1, 1024),
    "max_depth": (1, 1024),
    "max_hits": (1, 1024),
    "growth": (1, 4),
    "full_match": (1, 32),
    "recency": (0.01, 1),
    "discount": (0, 0.99),
    "discount_length": (0.1, 1e6),
    "smoothing": (1e-6, 1e6),
    "request_weight": (0, 1e6),
    "shared_weight": (0, 1e6),
    "corpus_weight": (0, 1e6),
    "shared_bytes": (MIN_BYTES, 2**35),
    "corpus_bytes": (MIN_BYTES, 2**35),
}
"""Smallest and largest value of each setting."""


@dataclass(eq=False)
class LookaheadDrafter(Drafter):
    """Looks up what followed the row's last tokens before, and merges all it finds into one tree.

    "Lookahead: An Inference Acceleration Framework for Large Language Model with Lossless Generation Accuracy"
    (arXiv 2312.12728) keeps a trie of n-grams; here the trie is grown on demand from an n-gram index, which is smaller,
    has no length limit, and lets matches of every length and of all scopes share one tree:

    - request: prompt and output of this row, and the predicted output given by `add(..., scope="request")`;
    - shared: outputs of earlier calls through this drafter, and of the other rows of this batch. Prompts never enter
      unless `share_prompts` is set;
    - corpus: what `add` was given.

    Args:
        max_nodes: Largest tree, the root included.
        max_depth: Longest path.
        orders: Lengths of the indexed n-grams, ascending.
        max_match: Longest match, in tokens.
        max_hits: Matches taken per scope and order, most recent first.
        growth: A match weighs this to the power of its length ...
        full_match: ... up to this length.
        recency: Factor on the weight from one match to the next older one.
        discount: Share of its best match's weight that a node pays (trie_growth.py), for matches of length zero.
        discount_length: Match length over which that share falls to 1/e of it.
        smoothing: Weight of "none of these" among a node's children.
        request_weight: Weight of the request scope.
        shared_weight: Weight of the shared scope.
        corpus_weight: Weight of the corpus scope.
        shared_bytes: Memory of the shared scope; the oldest outputs are evicted first.
        corpus_bytes: Memory of the corpus scope; the oldest documents are evicted first.
        share_outputs: Whether outputs enter the shared scope.
        share_prompts: Whether prompts do. They can then be proposed to every later call.
    """

    name = "lookahead"
    is_target_free = True

    max_nodes: int = 64
    max_depth: int = 63
    orders: tuple[int, ...] = (1, 2, 4, 8)
    max_match: int = 32
    max_hits: int = 32
    growth: float = 1.7
    full_match: int = 16
    recency: float = 0.92
    discount: float = 0.75
    discount_length: float = 8.0
    smoothing: float = 1.5
    request_weight: float = 1.0
    shared_weight: float = 0.5
    corpus_weight: float = 0.3
    shared_bytes: int = 256 * 2**20
    corpus_bytes: int = 2**30
    share_outputs: bool = True
    share_prompts: bool = False
    _indexes: dict[str, NgramIndex] = field(init=False, repr=False)
    _predicted: list[IntArray] = field(init=False, repr=False, default_factory=list)
    _fingerprint: str | None = field(init=False, repr=False, default=None)
    _last_tokenizer: Any = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        self.orders = tuple(self.orders)
        self._check_settings()
        # The kernels are compiled for one set of types: an int where they expect a float would compile them again.
        self.recency, self.smoothing = float(self.recency), float(self.smoothing)
        weights = (self.request_weight, self.request_weight, self.shared_weight, self.shared_weight, self.corpus_weight)
        self._weights = np.array(weights, np.float64)
        self._nothing = NgramIndex(self.orders, capacity=2, slots=1).links
        lengths = np.arange(self.max_match + 1.0)
        weight, discount = self.growth ** lengths.clip(max=self.full_match), np.exp(-lengths / self.discount_length)
        self._by_length = np.stack([weight, self.discount * discount])
        self._lock = threading.Lock()  # of all indexes and the predicted outputs
        self._indexes = {"shared": self._new_index(self.shared_bytes), "corpus": self._new_index(self.corpus_bytes)}

    def bind(self, model: Any) -> None:
        _compile_kernels()

    def fresh(self) -> LookaheadDrafter:
        """Shares the corpus and takes the predicted outputs; the shared scope starts empty."""
        new = replace(self)
        with self._lock:
            new._lock, new._indexes["corpus"] = self._lock, self._indexes["corpus"]
            new._predicted, self._predicted = self._predicted, []
        return new

    def settings(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    def start(self, context: DraftContext) -> DraftSession:
        _compile_kernels()
        return LookaheadSession(self, context)

    def add(self, documents: Documents, scope: str = "corpus", tokenizer: Any = None) -> None:
        """Adds documents to retrieve from.

        Args:
            documents: Token ids (a list, an array or a tensor), text, or a sequence of these: one document each.
            scope: `"corpus"`, `"shared"`, or `"request"`: a predicted output, used by the next call only.
            tokenizer: Encodes text. A saved index remembers its fingerprint.

        Raises:
            ValueError: For an unknown scope, ids out of range, text without a tokenizer or with two different ones.
            TypeError: For anything that is neither text nor token ids.
        """
        _check_scope(scope)
        self._check_tokenizer(tokenizer)
        for tokens in token_documents(documents, tokenizer):
            with self._lock:
                if scope == "request":
                    self._predicted.append(tokens)
                else:
                    self._indexes[scope].add_document(tokens)

    def clear(self, scope: str | None = None) -> None:
        """Forgets a scope, or all of them."""
        if scope is not None:
            _check_scope(scope)
        with self._lock:
            if scope is None:
                self._fingerprint = self._last_tokenizer = None
            for name in SCOPES if scope is None else (scope,):
                if name == "request":
                    self._predicted = []
                else:
                    self._indexes[name] = self._new_index(getattr(self, f"{name}_bytes"))

    def stats(self) -> dict[str, dict[str, int]]:
        """Tokens and bytes held, and tokens dropped under the budget, for the shared and the corpus scope."""
        with self._lock:
            return {
                scope: {"tokens": index.num_tokens, "bytes": index.num_bytes, "evicted_tokens": index.num_evicted}
                for scope, index in self._indexes.items()
            }

    def save(self, path: str | os.PathLike[str], tokenizer: Any = None) -> None:
        """Writes the shared and the corpus scope to a folder, in place of an earlier save.

        Args:
            path: Folder, made when it is missing.
            tokenizer: Tokenizer of the ids, if none was given to `add`; `load` can then tell a foreign one.
        """
        self._check_tokenizer(tokenizer)
        with self._lock:
            save_indexes(path, self._indexes, self._fingerprint)

    def load(self, path: str | os.PathLike[str], tokenizer: Any = None) -> LookaheadDrafter:
        """Replaces the shared and the corpus scope by saved ones, memory-mapped; returns the drafter itself.

        Args:
            path: Folder that `save` wrote.
            tokenizer: Tokenizer of the target, to be compared with that of the save.

        Raises:
            ValueError: If the save belongs to another tokenizer, has other orders, or is damaged, foreign or newer.
        """
        fingerprint = None if tokenizer is None else tokenizer_fingerprint(tokenizer)
        loaded, saved_tokenizer = load_indexes(path, self.orders, fingerprint)
        with self._lock:
            self._fingerprint, self._last_tokenizer = saved_tokenizer, tokenizer
            for scope in self._indexes:
                index = self._new_index(getattr(self, f"{scope}_bytes"))
                if scope in loaded:
                    loaded[scope].max_slots, loaded[scope].max_tokens = index.max_slots, index.max_tokens
                    index = loaded[scope]
                self._indexes[scope] = index
        return self

    def take_predicted(self) -> list[IntArray]:
        """The predicted outputs, each for one call only."""
        with self._lock:
            predicted, self._predicted = self._predicted, []
        return predicted

    def keep_output(self, sequence: IntArray, prompt_length: int) -> None:
        """Adds what may be shared of a row that has ended to the shared scope."""
        start = 0 if self.share_prompts else prompt_length
        end = len(sequence) if self.share_outputs else prompt_length
        if end - start > 1:
            with self._lock:
                self._indexes["shared"].add_document(np.array(sequence[start:end], np.int32))

    def grow(
        self, session: LookaheadSession, row: int, max_depth: int, tokens: Ints, parents: Ints, scores: ScoreArray
    ) -> int:
        """Writes one row's tree, `[nodes]` each, after its root; returns its number of nodes."""
        end = session.requests[row].length
        with self._lock:
            found = session.predicted, session.peers, *self._indexes.values()
            links = [self._nothing if index is None else index.links for index in found]
            return draft_row(
                (session.requests[row].links, *links),
                session.skipped,
                self._weights,
                max(end - self.max_match, 1),
                end,
                self.max_hits,
                self.recency,
                session.matches,
                self._by_length,
                self.smoothing,
                max_depth,
                tokens,
                parents,
                scores,
            )

    def _new_index(self, budget: int) -> NgramIndex:
        """An empty index that stays within `budget` bytes, hash tables included."""
        per_token = 4 + 4 * len(self.orders)
        slots = min(power_of_two(budget // per_token // 8 + 1), MAX_SLOTS)
        tables = 4 * len(self.orders) * slots
        # Tables of full size would be handed out by the system in large pages, which must be zeroed in some call.
        first = min(slots, FIRST_SLOTS)
        return NgramIndex(self.orders, slots=first, max_slots=slots, max_tokens=(budget - tables) // per_token)

    def _check_settings(self) -> None:
        """Raises a ValueError for a hyper-parameter out of range."""
        orders = self.orders
        if not orders or orders[0] < 1 or any(a >= b for a, b in itertools.pairwise(orders)):
            raise ValueError(f"orders must be ascending lengths from 1 on, got {orders}; the default is (1, 2, 4, 8)")
        for setting, (low, high) in (BOUNDS | {"max_match": (orders[-1], 1024)}).items():
            value = getattr(self, setting)
            if not low <= value <= high:
                raise ValueError(f"{setting} must be between {low:g} and {high:g}, got {value!r}; set it in that range")

    def _check_tokenizer(self, tokenizer: Any) -> None:
        """Remembers whose ids the indexes hold; raises a ValueError for a second tokenizer."""
        if tokenizer is None or tokenizer is self._last_tokenizer:
            return
        fingerprint = tokenizer_fingerprint(tokenizer)
        if self._fingerprint not in (None, fingerprint):
            raise ValueError(
                f"tokenizer: the drafter holds ids of a tokenizer {self._fingerprint:.12}..., the given one is "
                f"{fingerprint:.12}...; use one drafter per tokenizer, or clear() this one"
            )
        self._fingerprint, self._last_tokenizer = fingerprint, tokenizer


class LookaheadSession(DraftSession):
    """One call: indexes of each row's text, of the predicted outputs, and of what the rows have written.

    Args:
        drafter: Holds settings, shared and corpus scope.
        context: All rows of the call.
    """

    def __init__(self, drafter: LookaheadDrafter, context: DraftContext) -> None:
        self.drafter = drafter
        self.matches = room_for_matches(SOURCES * len(drafter.orders) * drafter.max_hits)
        self.skipped = np.zeros((SOURCES, 2), np.int64)
        self._begin(context)

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        if not self._catch_up(context):
            self._begin(context)
        return self._trees(context, None, max_nodes)

    def extend(self, context: DraftContext, paths: Sequence[IntArray], max_nodes: int) -> TokenTree | None:
        return self._trees(context, paths, max_nodes)

    def finish(self, context: DraftContext) -> None:
        for sequence, prompt in zip(context.sequences, context.prompt_lengths, strict=True):
            self.drafter.keep_output(sequence, prompt)

    def _begin(self, context: DraftContext) -> None:
        """Indexes the prompts and the predicted outputs."""
        orders, predicted = self.drafter.orders, self.drafter.take_predicted()
        self.predicted: NgramIndex | None = None
        if predicted:
            self.predicted = _index_for(orders, sum(map(len, predicted)))
            for tokens in predicted:
                self.predicted.add_document(tokens)
        is_sharing = self.drafter.share_outputs and len(context.rows) > 1
        self.peers = PeerOutputs(orders, max(context.rows) + 1) if is_sharing else None
        self.requests: dict[int, NgramIndex] = {}
        for row, sequence in zip(context.rows, context.sequences, strict=True):
            first = context.rows[0]
            if row != first and np.array_equal(sequence, context.sequences[0]):  # num_return_sequences, rollouts
                self.requests[row] = copy.deepcopy(self.requests[first])
            else:
                self.requests[row] = _index_for(orders, len(sequence))
                self.requests[row].extend(np.array(sequence, np.int32))
        self._catch_up(context)

    def _catch_up(self, context: DraftContext) -> bool:
        """Appends the tokens committed since; False if the context does not continue what was indexed."""
        for row, sequence, prompt in zip(context.rows, context.sequences, context.prompt_lengths, strict=True):
            index = self.requests.get(row)
            if index is None or len(sequence) < index.length - 1:
                return False
            if len(sequence) > index.length - 1:
                index.extend(np.array(sequence[index.length - 1 :], np.int32))
            if self.peers is not None and len(sequence) > (known := prompt + self.peers.lengths[row]):
                self.peers.extend(row, np.array(sequence[known:], np.int32))
        return True

    def _trees(self, context: DraftContext, paths: Sequence[IntArray] | None, max_nodes: int) -> TokenTree:
        """One tree per row, after its last token or after a path assumed to follow it."""
        shape = len(context.rows), max(1, min(max_nodes, self.drafter.max_nodes))
        tokens, parents, scores = np.zeros(shape, np.int64), np.full(shape, -1), np.zeros(shape, np.float32)
        used = 1
        for i, row in enumerate(context.rows):
            path = NO_TOKENS if paths is None else np.array(paths[i], np.int32)
            tokens[i, 0] = path[-1] if len(path) else context.sequences[i][-1]
            depth = min(context.max_depth[i], self.drafter.max_depth) - len(path)
            if shape[1] == 1 or depth < 1 or (paths is not None and len(path) == 0):
                continue
            if self.peers is not None:
                self.skipped[PEERS] = self.peers.region(row)
            if len(path):
                self.requests[row].extend(path)
            used = max(used, self.drafter.grow(self, row, depth, tokens[i], parents[i], scores[i]))
            if len(path):
                self.requests[row].retract(len(path))
        return TokenTree.of_arrays(tokens[:, :used], parents[:, :used], scores[:, :used])


def _index_for(orders: tuple[int, ...], tokens: int) -> NgramIndex:
    """Room for the tokens and an output of about as many, and hash tables to match."""
    return NgramIndex(orders, capacity=2 * tokens + 256, slots=power_of_two(tokens + 256))


def _check_scope(scope: str) -> None:
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}; choose one of these")


@functools.cache
def _compile_kernels() -> None:
    """Compiles the kernels, or loads them from Numba's cache, before a step of a generation needs them."""
    context = DraftContext([0], [np.zeros(4, np.int32)], [4], [2])
    LookaheadSession(LookaheadDrafter(), context).extend(context, [np.zeros(1, np.int32)], 2)
