"""The budget's loops over the nodes of a tree."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from specdec.kernels import Floats, Ints, kernel, kernel_part


@kernel_part
def calibrated(score: float, rates: Floats) -> float:
    """A score's rate of acceptance, interpolated between the two nearest bins."""
    bins = rates.shape[0]
    at = min(max(score * bins - 0.5, 0.0), bins - 1.0)
    low = min(int(at), bins - 2)
    return float(min(max(rates[low] + (at - low) * (rates[low + 1] - rates[low]), 1e-6), 1.0))


@kernel_part
def seconds_of(nodes: int, known: Ints, seconds: Floats) -> float:
    """Time of a pass over `nodes` nodes: interpolated over the logarithm of the node count between what is known."""
    if nodes <= known[0]:
        return float(seconds[0])
    for i in range(1, known.shape[0]):
        if nodes <= known[i]:
            share = np.log2(nodes / known[i - 1]) / np.log2(known[i] / known[i - 1])
            return float(seconds[i - 1] + share * (seconds[i] - seconds[i - 1]))
    return float(seconds[-1])


@kernel
def best_size(
    parents: Ints,
    scores: NDArray[np.float32],
    tried: Floats,
    hit: Floats,
    prior: float,
    known: Ints,
    seconds: Floats,
    spent: float,
) -> tuple[int, float, float, float]:
    """How many of a tree's first nodes make the most tokens per second.

    Args:
        parents: `[batch, nodes]`.
        scores: The drafter's P(accepted | parent accepted), `[batch, nodes]`.
        tried: Drafts whose parent was accepted, by bin of their score, `[bins]`.
        hit: Those among them that were accepted, `[bins]`.
        prior: How many drafts a score is worth against the counts.
        known: Node counts whose time is known, ascending, `[sizes]`.
        seconds: Their times, never falling, `[sizes]`.
        spent: Seconds of the drafting, whatever size is taken.

    Returns:
        One of the known sizes, or all nodes; the tokens expected of it, over all rows; seconds of a pass of this size,
        and of one without a draft.
    """
    batch, nodes = parents.shape
    bins = tried.shape[0]
    rates = (hit + prior * (np.arange(bins) + 0.5) / bins) / (tried + prior)
    gain = np.zeros(nodes)
    path = np.ones(nodes)
    for row in range(batch):
        for node in range(1, nodes):
            parent = parents[row, node]
            path[node] = path[parent] * calibrated(scores[row, node], rates) if parent >= 0 else 0.0
            gain[node] += path[node]
    plain = seconds_of(1, known, seconds)
    best, best_tokens, best_seconds, best_rate = 1, float(batch), plain, batch / (plain + spent)
    tokens = float(batch)
    bucket = 0
    for size in range(2, nodes + 1):
        tokens += gain[size - 1]
        while bucket < known.shape[0] and known[bucket] < size:
            bucket += 1
        if size == nodes or (bucket < known.shape[0] and known[bucket] == size):
            taken = seconds_of(size, known, seconds)
            rate = tokens / (taken + spent)
            if rate > best_rate:
                best, best_tokens, best_seconds, best_rate = size, tokens, taken, rate
    return best, best_tokens, best_seconds, plain


@kernel
def count_followed(
    tokens: Ints,
    parents: Ints,
    scores: NDArray[np.float32],
    known: Ints,
    tried: Floats,
    hit: Floats,
    decay: float,
) -> None:
    """Adds the drafts whose parent was right to the decayed counts `tried` and `hit`, by bin of their score.

    A score between the middles of two bins counts for both, as `calibrated` reads it.

    Args:
        tokens: `[batch, nodes]`.
        parents: `[batch, nodes]`.
        scores: `[batch, nodes]`.
        known: The tokens after the root, -1 after the last one, `[batch, depth]`.
        tried: Changed, `[bins]`.
        hit: Changed, `[bins]`.
        decay: Factor on the counts so far.
    """
    batch, nodes = parents.shape
    bins = tried.shape[0]
    tried *= decay
    hit *= decay
    depths = np.zeros(nodes, np.int64)  # of nodes on the target's path, -1 for others
    for row in range(batch):
        for node in range(1, nodes):
            parent = parents[row, node]
            depth = depths[parent] if parent >= 0 else -1
            depths[node] = -1
            if depth < 0 or depth >= known.shape[1] or known[row, depth] == -1:
                continue
            at = min(max(scores[row, node] * bins - 0.5, 0.0), bins - 1.0)
            low = min(int(at), bins - 2)
            share = at - low
            tried[low] += 1.0 - share
            tried[low + 1] += share
            if tokens[row, node] == known[row, depth]:
                depths[node] = depth + 1
                hit[low] += 1.0 - share
                hit[low + 1] += share
