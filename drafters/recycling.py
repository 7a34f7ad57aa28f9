"""The target's own second choices, kept and proposed again."""

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
from specdec.drafters.trees.recycled_lists import LAST, Lists, count_listed, grow_recycled, keep_lists
from specdec.kernels import Floats, Ints
from specdec.target import embedding_rows
from specdec.tree import TokenTree

LEAST_LIKELY = 0.005
"""A node that is right less often than this is not worth the time it takes to propose it."""
DEPTH_CLASSES = 3
"""Depths that are counted apart; deeper ones count as the last."""


@dataclass(eq=False)
class RecyclingDrafter(Drafter):
    """Proposes behind each token what the target held likely when it last met that token.

    "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling" (arXiv
    2408.08696, section 3): each pass ranks the whole vocabulary behind every node of the tree, and all but one token
    per accepted node is thrown away. Here the `top_k` best are kept, in a table with one list per token. The paper
    grows a fixed tree of 80 nodes out of it; here each tree grows best-first by how often tokens of a rank and depth
    were right of late, so that it is as large as it is worth. What else the target held likely when it picked the last
    token is proposed behind that token too: such a token often comes one place later ("LogitSpec", arXiv 2507.01449).

    The table is filled by all calls of the drafter, and what one call has taught it can be proposed to the next. It
    never decides which token comes, but how soon it comes may tell: use one drafter per tenant, or `clear()`.

    Args:
        max_nodes: Largest tree, the root included.
        max_depth: Longest path.
        top_k: Length of the lists. The table takes 4 bytes for each of `vocabulary x top_k` entries: 4 MiB for 128k
            tokens and lists of 8.
        last_list: Propose behind the last token what else the target held likely in its place.
        prior_weight: How many counted lists the rates that are supposed beforehand are worth.
        memory: Lists after which a count is worth 1/e.
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
        self._lock = threading.Lock()
        self._thread = threading.local()
        self._target: Any = lambda: None
        self._decay = float(np.exp(-1.0 / self.memory))
        self._prior = supposed_rates(self.top_k) * self.prior_weight
        self._tried, self._hit = np.zeros_like(self._prior), np.zeros_like(self._prior)

    def fresh(self) -> RecyclingDrafter:
        return replace(self)

    def settings(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    def bind(self, model: Any) -> None:
        with self._lock:
            if self._target() is not model:
                self._table = np.full((embedding_rows(model), self.top_k), -1, np.int32)
                self._tried[:] = self._hit[:] = 0.0
                self._target = ref(model)
        _compile_kernels()

    def state_dict(self) -> dict[str, Any]:
        with self._lock:
            return {"tried": self._tried.tolist(), "hit": self._hit.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with self._lock:
            self._tried[:], self._hit[:] = state["tried"], state["hit"]

    def clear(self) -> None:
        """Forgets all lists, and how good they were."""
        with self._lock:
            if self._table is not None:
                self._table[:] = -1
            self._tried[:] = self._hit[:] = 0.0

    def start(self, context: DraftContext) -> DraftSession:
        rows = max(context.rows, default=0) + 1
        self._thread.last = np.full((rows, self.top_k), -1, np.int32)
        self._thread.lengths = np.zeros(rows, np.int64)
        self._thread.lengths[context.rows] = [len(sequence) for sequence in context.sequences]
        return self

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        return self._trees(context, self._last(context), np.array([ids[-1] for ids in context.sequences]), 0, max_nodes)

    def extend(self, context: DraftContext, paths: Sequence[NDArray[np.int32]], max_nodes: int) -> TokenTree | None:
        roots = np.array([ids[-1] for ids in (path if len(path) else [0] for path in paths)])
        nothing = np.full((len(paths), self.top_k), -1, np.int32)
        return self._trees(context, nothing, roots, np.array([len(path) for path in paths]), max_nodes)

    def _trees(self, context: DraftContext, last: Lists, roots: Any, depths: Any, max_nodes: int) -> TokenTree:
        """Trees behind some tokens `[rows]`, which are to stand at these depths."""
        table, rows = self._bound_table(), len(context.rows)
        width = max(1, min(max_nodes, self.max_nodes))
        tokens = np.zeros((rows, width), np.int64)
        tokens[:, 0] = roots
        parents = np.full((rows, width), -1, np.int64)
        scores = np.zeros((rows, width), np.float32)
        max_depths = (np.array(context.max_depth, np.int64) - depths).clip(0, self.max_depth)
        with self._lock:
            rates = (self._hit + self._prior) / (self._tried + self.prior_weight)
            if not self.last_list:
                rates[LAST] = 0.0
            used = grow_recycled(table, last, rates, max_depths, LEAST_LIKELY, tokens, parents, scores)
        return TokenTree.of_arrays(tokens[:, :used], parents[:, :used], scores[:, :used])

    def observe(self, context: DraftContext, step: Step) -> None:
        if step.top_tokens is None:
            return
        table, last = self._bound_table(), self._last(context)
        known, counts = self._since(context)
        with self._lock:
            count_listed(table, last, known, counts, self._tried, self._hit, self._decay)
            keep_lists(
                step.tree.host_tokens,
                step.tree.host_parents,
                np.ascontiguousarray(step.top_tokens),
                known,
                counts,
                table,
                last,
            )
        self._thread.last[context.rows] = last
        self._thread.lengths[context.rows] = [len(sequence) for sequence in context.sequences]

    def finish(self, context: DraftContext) -> None:
        self._thread.__dict__.clear()

    def _bound_table(self) -> Lists:
        if self._table is None:
            raise ValueError("bind(model) comes before anything is drafted; specdec.accelerate does so")
        return self._table

    def _last(self, context: DraftContext) -> Lists:
        """The lists from which each row's last token was picked, `[rows, top_k]`, a copy."""
        if len(getattr(self._thread, "lengths", ())) <= max(context.rows):
            self.start(context)
        last: Lists = self._thread.last[context.rows]
        return last

    def _since(self, context: DraftContext) -> tuple[Ints, Ints]:
        """The last root of each row and the tokens since, `[rows, tokens]`, and how many they are, `[rows]`."""
        lengths = self._thread.lengths
        new = [sequence[lengths[row] - 1 :] for row, sequence in zip(context.rows, context.sequences, strict=True)]
        counts = [len(tokens) for tokens in new]
        known = np.zeros((len(new), max(counts)), np.int64)
        for i, tokens in enumerate(new):
            known[i, : counts[i]] = tokens
        return known, np.array(counts, np.int64)


def supposed_rates(ranks: int) -> Floats:
    """P(accepted | parent accepted) before anything is counted, `[1 + DEPTH_CLASSES, ranks]`.

    Less than what the paper's 80 nodes and 2.8 accepted tokens a pass amount to, as high temperatures need: the first
    is right three times out of ten, each next one half as often; what stood in the root's place, one time out of 25.
    """
    rates: Floats = np.tile(0.3 * 0.5 ** np.arange(ranks), (1 + DEPTH_CLASSES, 1))
    rates[LAST] = 0.04 * 0.7 ** np.arange(ranks)
    return rates


@functools.cache
def _compile_kernels() -> None:
    """Compiles, or loads what was compiled before, so that no step of a generation waits for it."""
    table, ids, rates = np.full((1, 2), -1, np.int32), np.zeros((1, 2), np.int64), np.zeros((2, 2))
    grow_recycled(
        table, table.copy(), rates, ids[0], LEAST_LIKELY, ids.copy(), ids.copy(), np.zeros((1, 2), np.float32)
    )
    count_listed(table, table.copy(), ids, ids[:, 0].copy(), rates, rates.copy(), 1.0)
    keep_lists(ids, ids.copy(), ids[:, :, None].copy(), ids.copy(), ids[:, 0].copy(), table, table.copy())
