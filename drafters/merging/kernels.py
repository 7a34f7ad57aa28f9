"""The compiled loops of merging, all of them once."""

from __future__ import annotations

import functools

import numpy as np

from specdec.drafters.merging.chain import leaves_of
from specdec.drafters.merging.growth import (
    DEPTH_CLASSES,
    SCORE_BINS,
    CandidateStore,
    add_tree,
    follow_merged,
    grow_merged,
    mark_verified,
)
from specdec.tree import TokenTree


@functools.cache
def compile_kernels() -> None:
    """Compiles, or loads what was compiled before, so that no step of a generation waits for it."""
    ids, table = np.zeros((1, 2), np.int64), np.zeros((2, DEPTH_CLASSES, SCORE_BINS))
    parents, scores = np.array([[-1, 0]]), np.zeros((1, 2), np.float32)
    nodes = CandidateStore.of_roots(ids[0, :1].copy(), 2)
    add_tree(nodes, 0, ids, parents, scores, ids[0, :1].copy(), 1, ids.copy(), np.ones(1, np.int64))
    leaves_of(TokenTree.of_arrays(ids, parents, scores))
    grow_merged(nodes, table, table.copy(), 1.0, ids.copy(), ids.copy(), scores)
    counts = np.ones(1, np.int64)
    follow_merged(nodes, ids, counts, 1.0, table, table.copy(), ids[0].copy(), ids[:, :1].copy(), counts.copy())
    mark_verified(nodes, ids, parents, np.zeros((1, 2), np.bool_))
