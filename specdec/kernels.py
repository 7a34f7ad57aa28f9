"""Hot loops on the host, compiled with Numba; with NUMBA_DISABLE_JIT=1 they run as Python."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.core import event
from numpy.typing import NDArray
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
PART = 64
"""Values of a long list that are looked at together."""


def kernel(function: Function) -> Function:
    """Compiles a hot loop with Numba, cached on disk where a folder for that can be written."""
    try:
        return cast(Function, numba.njit(cache=True, nogil=True)(function))
    except RuntimeError:  # "cannot cache function": neither __pycache__ nor the user's cache folder is writable
        return cast(Function, numba.njit(nogil=True)(function))


def kernel_part(function: Function) -> Function:
    """A function for kernels to call. Numba copies it into them: passing arrays on would count references each time."""
    return cast(Function, numba.njit(inline="always")(function))


class _FirstCompilation(event.Listener):
    """Tells of the first kernel of ours that Numba compiles; what it finds on the disk is not compiled."""

    tell: Callable[[], None] | None

    def on_start(self, event: Any) -> None:
        is_ours = event.data["dispatcher"].py_func.__module__.startswith("specdec")
        if is_ours and self.tell is not None:
            tell, self.tell = self.tell, None
            tell()

    def on_end(self, event: Any) -> None:
        """Nothing is told."""


_LISTENER = _FirstCompilation()
_LISTENER.tell = lambda: logging.getLogger("specdec").warning(
    "compiling loops that run on the CPU, which takes some seconds; the next process finds them in Numba's cache, if "
    "there is a folder for it that can be written (NUMBA_CACHE_DIR names one)"
)
event.register("numba:compile", _LISTENER)


def tell_of_compiling(tell: Callable[[], None]) -> None:
    """Has something else called before the first kernel of this process that must be compiled."""
    _LISTENER.tell = tell


def host_array(tensor: Tensor) -> NDArray[Any]:
    """A tensor's values as kernels take them: contiguous, so that they are compiled once. Waits for the device."""
    array: NDArray[Any] = (tensor if tensor.is_cpu else tensor.cpu()).numpy()
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


@kernel
def ancestors_and_depths(parents: Ints) -> tuple[Bools, Ints]:
    """Which nodes stand above each node, and how many.

    Args:
        parents: `[batch, nodes]`, every parent before its child; -1 at roots and padding.

    Returns:
        `[batch, nodes, nodes]`, true at the node itself, its ancestors and the root, and depths `[batch, nodes]`.
    """
    batch, nodes = parents.shape
    above = np.zeros((batch, nodes, nodes), np.bool_)
    depths = np.zeros((batch, nodes), np.int64)
    for row in range(batch):
        above[row, 0, 0] = True
        for node in range(1, nodes):
            parent = max(parents[row, node], 0)
            above[row, node] = above[row, parent]
            above[row, node, node] = True
            depths[row, node] = depths[row, parent] + 1
    return above, depths


@kernel
def visible_slots(parents: Ints, lengths: Ints, first: int = 0) -> tuple[Bools, Ints]:
    """What each node may attend to: the committed slots of its row, its ancestors and itself.

    Args:
        parents: `[batch, nodes]`, every parent before its child; -1 at roots and padding.
        lengths: Committed slots, `[batch]`; node i of a row is in the i-th slot behind them.
        first: Nodes before this one are left out.

    Returns:
        `[batch, nodes - first, max(lengths) + nodes]`, and the position of each node, `[batch, nodes - first]`.
    """
    batch, nodes = parents.shape
    seen = np.zeros((batch, nodes - first, lengths.max() + nodes), np.bool_)
    positions = np.zeros((batch, nodes - first), np.int64)
    for row in range(batch):
        root = lengths[row]
        for node in range(first, nodes):
            seen[row, node - first, : root + 1] = True
            positions[row, node - first] = root
            above = node
            while above > 0:
                seen[row, node - first, root + above] = True
                positions[row, node - first] += 1
                above = parents[row, above]
    return seen, positions


@kernel
def is_valid(tokens: Ints, parents: Ints, vocab_size: int) -> bool:
    """Whether all tokens are below `vocab_size` and every parent stands before its child, `[batch, nodes]` each."""
    for row in range(tokens.shape[0]):
        for node in range(tokens.shape[1]):
            if not (0 <= tokens[row, node] < vocab_size and -1 <= parents[row, node] < node):
                return False
    return True


@kernel
def child_with(tokens: Ints, parents: Ints, parent: int, token: int) -> int:
    """A node's first child that holds a token, -1 for none; `[nodes]` each."""
    for node in range(parent + 1, tokens.shape[0]):
        if parents[node] == parent and tokens[node] == token:
            return node
    return -1


@kernel
def followed(tokens: Ints, parents: Ints, picks: Ints) -> tuple[Ints, Ints, Ints]:
    """Walks each row's tree from the root as long as a child holds the pick of its parent.

    Args:
        tokens: `[batch, nodes]`.
        parents: `[batch, nodes]`, every parent before its child; -1 at roots and padding.
        picks: The target's token at each node of that path, `[batch, nodes]`.

    Returns:
        The nodes of the path without the root, -1 behind the end, `[batch, nodes]`; their tokens and then the last
        one's pick, `[batch, nodes + 1]`; and how many nodes there are, `[batch]`.
    """
    batch, width = tokens.shape
    path = np.full((batch, width), -1)
    taken = np.zeros((batch, width + 1), np.int64)
    counts = np.zeros(batch, np.int64)
    for row in range(batch):
        node = 0
        for child in range(1, width):
            if parents[row, child] == node and tokens[row, child] == picks[row, node]:
                node = child
                path[row, counts[row]] = node
                taken[row, counts[row]] = tokens[row, node]
                counts[row] += 1
        taken[row, counts[row]] = picks[row, node]
    return path, taken, counts


@kernel_part
def write_largest(values: NDArray[np.float32], count: int, found: Ints, highest: NDArray[np.float32]) -> None:
    """Writes where a list's largest values stand, and the values, `[count]` each."""
    size, held = values.shape[0], 0
    for start in range(0, size, PART):
        part = values[start : min(start + PART, size)]
        if held == count:  # most parts hold nothing new, which many values at once can be asked
            least, is_new = highest[count - 1], False
            for i in range(part.shape[0]):
                is_new |= part[i] > least
            if not is_new:
                continue
        for i in range(part.shape[0]):
            if held == count and not part[i] > highest[count - 1]:
                continue
            at = min(held, count - 1)
            while at > 0 and highest[at - 1] < part[i]:
                highest[at] = highest[at - 1]
                found[at] = found[at - 1]
                at -= 1
            highest[at] = part[i]
            found[at] = start + i
            held = min(held + 1, count)


@kernel
def largest(values: NDArray[np.float32], count: int) -> tuple[Ints, NDArray[np.float32]]:
    """The largest values of each list, the largest first; among equals the first.

    Args:
        values: `[batch, nodes, values]`.
        count: How many are wanted, at most as many as there are.

    Returns:
        Where they stand, and the values, `[batch, nodes, count]` each.
    """
    batch, nodes = values.shape[:2]
    found = np.empty((batch, nodes, count), np.int64)
    highest = np.empty((batch, nodes, count), np.float32)
    for row in range(batch):
        for node in range(nodes):
            write_largest(values[row, node], count, found[row, node], highest[row, node])
    return found, highest


@kernel
def largest_at(values: NDArray[np.float32], count: int, first: int, more: Ints) -> Ints:
    """Where the largest values of some lists stand, the largest first; among equals the first.

    Args:
        values: `[batch, nodes, values]`.
        count: How many are wanted, at most as many as there are.
        first: Nodes whose lists are looked at in every row.
        more: Further ones by row, each less than the one behind it, -1 at the end, `[batch, up to nodes]`.

    Returns:
        `[batch, nodes, count]`, -1 where nothing is wanted.
    """
    batch, nodes = values.shape[:2]
    found = np.full((batch, nodes, count), -1)
    highest = np.empty(count, np.float32)
    for row in range(batch):
        for node in range(min(first, nodes)):
            write_largest(values[row, node], count, found[row, node], highest)
        for node in more[row]:
            if node >= first:
                write_largest(values[row, node], count, found[row, node], highest)
    return found
