"""A heap of node indices, ordered by keys in a separate array."""

from __future__ import annotations

from specdec.kernels import Floats, Ints, kernel_part


@kernel_part
def push_best(heap: Ints, size: int, keys: Floats, item: int) -> int:
    """Adds an item to a heap whose root has the largest key, the older item first among equals; returns its size."""
    at = size
    while at > 0:
        above = (at - 1) >> 1
        other = heap[above]
        if keys[other] >= keys[item]:
            break
        heap[at] = other
        at = above
    heap[at] = item
    return size + 1


@kernel_part
def pop_best(heap: Ints, size: int, keys: Floats) -> int:
    """Moves the item with the largest key to `heap[size - 1]`; returns the size without it."""
    best = heap[0]
    size -= 1
    item = heap[size]
    at = 0
    while True:
        below = 2 * at + 1
        if below >= size:
            break
        if below + 1 < size and (
            keys[heap[below + 1]] > keys[heap[below]]
            or (keys[heap[below + 1]] == keys[heap[below]] and heap[below + 1] < heap[below])
        ):
            below += 1
        if keys[item] > keys[heap[below]] or (keys[item] == keys[heap[below]] and item < heap[below]):
            break
        heap[at] = heap[below]
        at = below
    heap[at] = item
    heap[size] = best
    return size
