"""Tokens that the target ranked high before, proposed when the token before them returns."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any
from weakref import ref

import numpy as np
from numpy.typing import NDArray

from specdec.drafters.base import DraftContext, Drafter, DraftSession, Step
from specdec.drafters.trees.rank_tree import DecayedRates
from specdec.drafters.trees.recycled_lists import LAST, Lists, count_listed, grow_recycled, keep_lists
from specdec.kernels import Floats, Ints
from specdec.target import embedding_rows
from specdec.tree import TokenTree

LEAST_LIKELY = 0.005
"""Leave out nodes less likely to be accepted than this: proposing them costs more than they save."""
DEPTH_CLASSES = 3
"""Depths counted separately; deeper ones count as the last."""


@dataclass(eq=False)
class RecyclingDrafter(Drafter):
    """Proposes after each token what the target ranked highest when it last met that token.

    "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling" (arXiv
    2408.08696, section 3): each pass ranks the whole vocabulary after every node of the tree, and all but one token
    per accepted node is thrown away. Here the `top_k` best are kept, in a table with one list per token. The paper
    grows a fixed tree of 80 nodes from it; here each tree grows best-first by how often tokens of a rank and depth
    were accepted recently. The other tokens that the target ranked high when it picked the last token are proposed
    after that token too: such a token often comes one place later ("LogitSpec", arXiv 2507.01449).

    All calls of the drafter fill one table, so a call can be proposed what an earlier one learned. This never changes
    a token, but it can change how soon it comes: use one drafter per tenant, or `clear()`.

    Args:
        max_nodes: Largest tree, the root included.
        max_depth: Longest path.
        top_k: Length of the lists. The table takes 4 bytes for each of `vocabulary x top_k` entries: 4 MiB for 128k
            tokens and lists of 8.
        last_list: Propose after the last token what else the target ranked high in its place.
        prior_weight: Number of counted lists that the assumed rates are worth.
        memory: Number of lists after which a count has decayed to 1/e.
    """

    name = "recycling"

    max_nodes: int = 64
    max_depth: int = 8
    top_k: int = 8
    last_list: bool = True
    prior_weight: float = 5.0
    memory: float = 300.0
    _table: Lists | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        for name, least in (("max_nodes", 1), ("max_depth", 1), ("top_k", 1), ("prior_weight", 0.01), ("memory", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        self.num_top_tokens = self.top_k
        self._lock = threading.Lock()  # of the table and the counts
        self._target: Any = lambda: None
        self._counts = DecayedRates(assumed_rates(self.top_k), self.prior_weight, self.memory)

    def fresh(self) -> RecyclingDrafter:
        return replace(self)

    def settings(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    def bind(self, model: Any) -> None:
        with self._lock:
            if self._target() is not model:
                self._table = np.full((embedding_rows(model), self.top_k), -1, np.int32)
                self._counts.clear()
                self._target = ref(model)
        _compile_kernels()

    def start(self, context: DraftContext) -> DraftSession:
        if self._table is None:
            raise ValueError("bind(model) comes before anything is drafted; specdec.accelerate does so")
        return RecyclingSession(self, self._table)

    def state_dict(self) -> dict[str, Any]:
        with self._lock:
            return self._counts.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with self._lock:
            self._counts.load_state_dict(state)

    def clear(self) -> None:
        """Forgets all lists and counts."""
        with self._lock:
            if self._table is not None:
                self._table[:] = -1
            self._counts.clear()

    def grow(self, table: Lists, last: Lists, roots: Ints, max_depths: Ints, max_nodes: int) -> TokenTree:
        """Trees after some tokens.

        Args:
            table: Lists by token, `[vocab, top_k]`.
            last: Further children of the roots, -1 for none, `[rows, top_k]`.
            roots: `[rows]`.
            max_depths: Largest depth of a node, `[rows]`.
            max_nodes: Largest tree, the root included.
        """
        shape = len(roots), max(1, min(max_nodes, self.max_nodes))
        tokens, parents, scores = np.zeros(shape, np.int64), np.full(shape, -1), np.zeros(shape, np.float32)
        tokens[:, 0] = roots
        with self._lock:
            rates = self._counts.rates()
            if not self.last_list:
                rates[LAST] = 0.0
            depths = max_depths.clip(0, self.max_depth)
            used = grow_recycled(table, last, rates, depths, LEAST_LIKELY, tokens, parents, scores)
        return TokenTree.of_arrays(tokens[:, :used], parents[:, :used], scores[:, :used])

    def learn(self, table: Lists, last: Lists, step: Step) -> None:
        """Counts which listed tokens were right, and takes over the target's new lists.

        Args:
            table: Lists by token, changed.
            last: The lists from which each row's last token was picked, changed, `[rows, top_k]`.
            step: With `top_tokens`.
        """
        known = np.zeros((len(step.rows), 1 + max(map(len, step.new_tokens))), np.int64)
        known[:, 0] = step.tree.host_tokens[:, 0]
        for i, tokens in enumerate(step.new_tokens):
            known[i, 1 : 1 + len(tokens)] = tokens
        counts = np.array([1 + len(tokens) for tokens in step.new_tokens], np.int64)
        top_tokens = np.ascontiguousarray(step.top_tokens)
        with self._lock:
            count_listed(table, last, known, counts, self._counts.tried, self._counts.hit, self._counts.decay)
            keep_lists(step.tree.host_tokens, step.tree.host_parents, top_tokens, known, counts, table, last)


class RecyclingSession(DraftSession):
    """One call: keeps per row the list from which its last token was picked.

    Args:
        drafter: Holds settings and counts.
        table: Lists of the target by token, `[vocab, top_k]`.
    """

    def __init__(self, drafter: RecyclingDrafter, table: Lists) -> None:
        self.drafter, self.table = drafter, table
        self._nothing = np.full(drafter.top_k, -1, np.int32)
        self._last: dict[int, NDArray[np.int32]] = {}

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        roots = np.array([ids[-1] for ids in context.sequences], np.int64)
        last = np.stack([self._last.get(row, self._nothing) for row in context.rows])
        return self.drafter.grow(self.table, last, roots, np.array(context.max_depth, np.int64), max_nodes)

    def extend(self, context: DraftContext, paths: Sequence[NDArray[np.int32]], max_nodes: int) -> TokenTree | None:
        roots = np.array([path[-1] if len(path) else 0 for path in paths], np.int64)
        depths = np.array([most - len(path) for most, path in zip(context.max_depth, paths, strict=True)], np.int64)
        return self.drafter.grow(self.table, np.tile(self._nothing, (len(paths), 1)), roots, depths, max_nodes)

    def observe(self, context: DraftContext, step: Step) -> None:
        if step.top_tokens is None or not step.new_tokens:
            return
        last = np.stack([self._last.get(row, self._nothing) for row in step.rows])
        self.drafter.learn(self.table, last, step)
        self._last.update(zip(step.rows, last, strict=True))


def assumed_rates(ranks: int) -> Floats:
    """P(accepted | parent accepted) before anything is counted, `[1 + DEPTH_CLASSES, ranks]`.

    Lower than the paper's 2.8 accepted tokens per pass of 80 nodes, as high temperatures need: the first token is right
    three times out of ten, each next one half as often, and what ranked high in the root's place one time out of 25.
    """
    rates: Floats = np.tile(0.3 * 0.5 ** np.arange(ranks), (1 + DEPTH_CLASSES, 1))
    rates[LAST] = 0.04 * 0.7 ** np.arange(ranks)
    return rates


@functools.cache
def _compile_kernels() -> None:
    """Compiles the kernels, or loads them from Numba's cache, before a step of a generation needs them."""
    table, ids, rates = np.full((1, 2), -1, np.int32), np.zeros((1, 2), np.int64), np.zeros((2, 2))
    scores = np.zeros((1, 2), np.float32)
    grow_recycled(table, table.copy(), rates, ids[0], LEAST_LIKELY, ids.copy(), ids.copy(), scores)
    count_listed(table, table.copy(), ids, ids[:, 0].copy(), rates, rates.copy(), 1.0)
    keep_lists(ids, ids.copy(), ids[:, :, None].copy(), ids.copy(), ids[:, 0].copy(), table, table.copy())
