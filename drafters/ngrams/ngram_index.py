"""N-gram index over an arena of token ids: O(1) append, most recent matches first.

Every position is linked, per order k, to the previous position whose last k tokens have the same hash:
`head[hash]` is the newest one, `prev[position]` the one before it. Position 0 is a separator and means "none".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from specdec.kernels import Floats, Ints, kernel, kernel_part

SEPARATOR = -1
"""Precedes each document in the arena; no match and no continuation crosses it."""

IntArray = NDArray[np.int32]

_HASH_SEED = 0x2545F491
_HASH_FACTOR = 0x5BD1E995
_HASH_MASK = 0x7FFFFFFF


Links = tuple[IntArray, IntArray, IntArray, Ints]
"""The arrays of one index, as the kernels take them (a plain tuple, because Numba unpacks that fastest):

- text: token ids and separators, `[capacity]`, int32; separators at 0 and after the last token;
- prev: link of each position and order to the match before it, `[capacity, orders]`, int32;
- head: newest position of each order and hash, `[orders, slots]`, int32; slots is a power of two;
- orders: lengths of the indexed n-grams, ascending, `[orders]`, int64.
"""

Matches = tuple[Ints, Floats]
"""Places where the last tokens of a row were seen before:

- places: scope, position of the token that followed, and how many tokens before it match, `[matches, 3]`, int64;
- weights: weight of the place itself (scope and recency), `[matches]`, float64.
"""


def room_for_matches(count: int) -> Matches:
    """Arrays for `count` matches."""
    return np.empty((count, 3), np.int64), np.empty(count, np.float64)


@kernel_part
def mix_hash(value: int, token: int) -> int:
    """Adds one token to a 31-bit hash; the product stays below 2**62, so it is the same compiled or not."""
    product = (value ^ token) * _HASH_FACTOR
    return (product ^ (product >> 29)) & _HASH_MASK


@kernel_part
def hash_up_to(order: int, text: IntArray, last: int, value: int, length: int) -> tuple[int, int]:
    """Extends the hash of the `length` tokens up to `last` to `order` tokens, or to the separator before them."""
    while length < order and text[last - length] >= 0:
        value = mix_hash(value, int(text[last - length]))
        length += 1
    return value, length


@kernel
def append_tokens(links: Links, position: int, tokens: IntArray) -> None:
    """Writes tokens from `position` on and links every new position."""
    text, prev, head, orders = links
    for i in range(tokens.shape[0]):
        here = position + i
        text[here] = tokens[i]
        value, length = _HASH_SEED, 0
        for k in range(orders.shape[0]):
            value, length = hash_up_to(orders[k], text, here, value, length)
            prev[here, k] = 0
            if length == orders[k]:
                slot = value & (head.shape[1] - 1)
                prev[here, k] = head[k, slot]
                head[k, slot] = here


@kernel
def remove_tokens(links: Links, position: int, count: int) -> None:
    """Takes back the last `count` tokens, which end before `position`."""
    text, prev, head, orders = links
    for here in range(position - 1, position - count - 1, -1):
        value, length = _HASH_SEED, 0
        for k in range(orders.shape[0]):
            value, length = hash_up_to(orders[k], text, here, value, length)
            if length == orders[k]:
                head[k, value & (head.shape[1] - 1)] = prev[here, k]


@kernel_part
def match_length(text: IntArray, position: int, query: IntArray) -> int:
    """How many tokens up to and with `position` equal the last ones of `query`."""
    last = query.shape[0] - 1
    length = 0
    while length <= last and text[position - length] == query[last - length]:
        length += 1
    return length


@kernel
def find_matches(
    links: Links,
    query: IntArray,
    skip_start: int,
    skip_end: int,
    max_hits: int,
    scope: int,
    weight: float,
    recency: float,
    count: int,
    matches: Matches,
) -> int:
    """Follows the chains from the longest order down and appends the matches it finds.

    A chain of order k gives matches shorter than the next order only: the longer ones were found there.

    Args:
        links: The index.
        query: The last tokens of the row, `[up to the longest match]`, int32.
        skip_start: First position of a region to leave out.
        skip_end: End of that region.
        max_hits: Most matches taken per order; twice as many positions are looked at.
        scope: Number of this scope, written with each match.
        weight: Weight of this scope.
        recency: Factor on the weight from one match of a chain to the next older one.
        count: Matches written so far.
        matches: Written.

    Returns:
        The new number of matches.
    """
    places, weights = matches
    text, prev, head, orders = links
    slots = np.empty(orders.shape[0], np.int64)
    value, length, usable = _HASH_SEED, 0, 0
    while usable < orders.shape[0] and orders[usable] <= query.shape[0]:
        value, length = hash_up_to(orders[usable], query, query.shape[0] - 1, value, length)
        slots[usable] = value & (head.shape[1] - 1)
        usable += 1
    last = text.shape[0] - 1
    too_long = query.shape[0] + 1
    for k in range(usable - 1, -1, -1):
        position = int(head[k, slots[k]])
        hits = 0
        seen = 0
        hit_weight = weight
        while 0 < position < last and hits < max_hits and seen < 2 * max_hits:
            seen += 1
            if text[position + 1] >= 0 and not skip_start <= position < skip_end:
                length = match_length(text, position, query)
                if orders[k] <= length < too_long and count < weights.shape[0]:
                    places[count, 0] = scope
                    places[count, 1] = position + 1
                    places[count, 2] = length
                    weights[count] = hit_weight
                    hit_weight *= recency
                    count += 1
                    hits += 1
            position = int(prev[position, k])
        too_long = orders[k]
    return count


def power_of_two(at_least: int) -> int:
    """The smallest power of two that is not below `at_least`."""
    return 1 << max(at_least - 1, 0).bit_length()


class NgramIndex:
    """Documents one after the other in one arena, the oldest dropped under a budget.

    Args:
        orders: Lengths of the indexed n-grams, ascending.
        capacity: Tokens there is room for at first.
        slots: Entries of each hash table at first, a power of two. The table doubles with the text up to `max_slots`.
        max_slots: Largest size of each hash table.
        max_tokens: Most tokens kept, separators included; None for no bound.
    """

    def __init__(
        self,
        orders: tuple[int, ...],
        capacity: int = 1024,
        slots: int = 1024,
        max_slots: int = 2**20,
        max_tokens: int | None = None,
    ) -> None:
        self.max_slots = max_slots
        self.max_tokens = max_tokens
        self.num_evicted = 0
        self.links: Links = (
            np.empty(capacity, np.int32),
            np.empty((capacity, len(orders)), np.int32),
            np.zeros((len(orders), slots), np.int32),  # zeroed lazily by the system: an empty index costs nothing
            np.array(orders, np.int64),
        )
        self.length = 1
        self.links[0][:2] = SEPARATOR

    @classmethod
    def from_links(cls, links: Links) -> NgramIndex:
        """The index made of these arrays, whose text ends with a separator."""
        index = cls(tuple(int(order) for order in links[3]), capacity=2, slots=1)
        index.links = links
        index.length = len(links[0]) - 1
        return index

    @property
    def num_tokens(self) -> int:
        """Tokens held, separators included."""
        return self.length if self.length > 1 else 0

    @property
    def num_bytes(self) -> int:
        """Memory in use. Room that was reserved and never written is not counted: the system has not handed it out."""
        text, prev, head, _ = self.links
        return self.length * (text.itemsize + prev.itemsize * prev.shape[1]) + head.nbytes

    def add_document(self, tokens: IntArray) -> None:
        """Appends a document, dropping the oldest ones when it would not fit otherwise."""
        if self.max_tokens is not None:
            tokens = tokens[-(self.max_tokens - 2) :]
            if self.length + len(tokens) + 1 > self.max_tokens:
                self._evict(self.max_tokens - len(tokens) - 1)
        if self.links[0][self.length - 1] != SEPARATOR:
            self.extend(np.array([SEPARATOR], np.int32))
        self.extend(tokens)

    def extend(self, tokens: IntArray) -> None:
        """Appends tokens to the last document.

        Args:
            tokens: Token ids, `[tokens]`, int32, contiguous and writable (one compiled signature serves all).
        """
        self._reserve(len(tokens))
        append_tokens(self.links, self.length, tokens)
        self.length += len(tokens)
        self.links[0][self.length] = SEPARATOR

    def retract(self, count: int) -> None:
        """Takes back the last tokens that `extend` has appended."""
        remove_tokens(self.links, self.length, count)
        self.length -= count
        self.links[0][self.length] = SEPARATOR

    def _reserve(self, more: int) -> None:
        needed = self.length + more + 1
        text, prev, head, orders = self.links
        if needed > len(text):
            capacity = max(needed, len(text) + len(text) // 2)
            text, prev = np.empty(capacity, np.int32), np.empty((capacity, len(orders)), np.int32)
            text[: self.length] = self.links[0][: self.length]
            prev[: self.length] = self.links[1][: self.length]
            self.links = (text, prev, head, orders)
        if needed > head.shape[1] and head.shape[1] < self.max_slots:
            self._rebuild(min(power_of_two(2 * needed), self.max_slots))

    def _rebuild(self, slots: int) -> None:
        """Links every position anew, in hash tables of `slots` entries."""
        text, prev, _, orders = self.links
        self.links = (text, prev, np.zeros((len(orders), slots), np.int32), orders)
        append_tokens(self.links, 1, text[1 : self.length])

    def _evict(self, allowed: int) -> None:
        """Drops the oldest documents until at most `allowed` tokens, or three quarters of the budget, are left."""
        assert self.max_tokens is not None
        cut = max(self.length - min(allowed, self.max_tokens * 3 // 4), 0)
        text, prev, head, _ = self.links
        # Whole documents if one ends soon; of a very long one the older part.
        separators = np.flatnonzero(text[cut : min(cut + self.max_tokens // 8, self.length)] == SEPARATOR)
        cut += int(separators[0]) if len(separators) else 0
        self.length -= cut
        self.num_evicted += cut
        text[: self.length] = text[cut : cut + self.length].copy()
        text[0] = text[self.length] = SEPARATOR
        prev[: self.length] = prev[cut : cut + self.length].copy()
        for positions in (prev[: self.length], head):
            positions -= cut
            np.maximum(positions, 0, out=positions)


class PeerOutputs:
    """Outputs of the rows of a call in one index, a region for each row, so that all of them can grow.

    Args:
        orders: Lengths of the indexed n-grams, ascending.
        rows: Batch size.
        room: Tokens per region at first.
    """

    def __init__(self, orders: tuple[int, ...], rows: int, room: int = 254) -> None:
        self.lengths = [0] * rows
        self._orders = np.array(orders, np.int64)
        self._allocate(room)

    def region(self, row: int) -> tuple[int, int]:
        """First position of a row's region and the position after it."""
        return row * self._stride, (row + 1) * self._stride

    def extend(self, row: int, tokens: IntArray) -> None:
        """Appends tokens, `[tokens]`, int32, contiguous and writable, to a row's output."""
        needed = self.lengths[row] + len(tokens)
        if needed + 2 > self._stride:
            starts, text = [1 + self.region(other)[0] for other in range(len(self.lengths))], self.links[0]
            outputs = [text[start : start + n] for start, n in zip(starts, self.lengths, strict=True)]
            self._allocate(2 * needed)
            for other, output in enumerate(outputs):
                append_tokens(self.links, self.region(other)[0] + 1, output)
        append_tokens(self.links, self.region(row)[0] + 1 + self.lengths[row], tokens)
        self.lengths[row] = needed

    def _allocate(self, room: int) -> None:
        self._stride = room + 2
        capacity = self._stride * len(self.lengths)
        self.links: Links = (
            np.full(capacity, SEPARATOR, np.int32),
            np.empty((capacity, len(self._orders)), np.int32),
            np.zeros((len(self._orders), power_of_two(capacity)), np.int32),
            self._orders,
        )
