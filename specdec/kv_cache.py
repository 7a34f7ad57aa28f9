"""The kv cache of the target: preallocated, ragged, holding a token tree behind the committed tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicSlidingWindowLayer

from specdec.compat import DummyLayer, add_layers
from specdec.passes.cache_commit import move_slots

ATTENTION_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
GROWTH = 256
"""Slots added at least when a cache must grow; growing copies it once."""


class TreeLayer(CacheLayerMixin):
    """Keys and values of one layer: a view of a pool that all layers of the same shape share."""

    is_sliding = False

    def __init__(self, cache: TreeCache, layer_type: str) -> None:
        super().__init__()
        self.cache = cache
        self.layer_type = layer_type
        self.num_appended = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True
        self.cache.allocate(self, key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.cache.write(self, key_states, value_states)

    def get_seq_length(self) -> int:
        if self.cache.static is not None:
            return self.cache.static.width - self.cache.static.slots.shape[1]
        return self.num_appended if self.cache.is_prefilling else self.cache.width + self.cache.staged

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


@dataclass(frozen=True)
class StaticSlots:
    """Where a pass writes and how far it looks, without a value that the host must know: fit for a captured step.

    Args:
        rows: `[batch, 1]`, int64.
        slots: Per row and node its slot, `[batch, nodes]`, int64.
        width: Slots that attention is given, whatever the rows' lengths are.
    """

    rows: Tensor
    slots: Tensor
    width: int


class Storage(ABC):
    """Keys and values that outlive a cache, so that captured steps find them where they were."""

    @abstractmethod
    def take(self, kind: tuple[Any, ...], layers: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Zeros for a pool, `[layers, batch, heads, slots, head_dim]` each.

        Args:
            kind: Distinct for each pool of a cache.
            layers: Layers in the pool.
            key: Keys of one layer, `[batch, heads, any, head_dim]`.
            value: Its values.
        """

    @abstractmethod
    def replace(self, pools: Mapping[tuple[Any, ...], tuple[Tensor, Tensor]], slots: int) -> None:
        """Tells that the cache has moved to larger pools."""


class _Pool:
    """Keys and values of several layers of one shape, `[layers, batch, heads, slots, head_dim]` each."""

    def __init__(self, kind: tuple[Any, ...], keys: Tensor, values: Tensor) -> None:
        self.kind = kind
        self.keys, self.values = keys, values
        self.members: list[TreeLayer] = []

    def replace(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        for i, layer in enumerate(self.members):
            layer.keys, layer.values = keys[i], values[i]


class TreeCache(Cache):
    """A transformers `Cache` that keeps the committed tokens of every row and, behind them, one token tree.

    Row `b` holds its committed tokens in slots `0 .. lengths[b]` (left padding included, as the prompt came) and node
    `i` of the tree in slot `lengths[b] + i`. Nothing is copied per step: a tree pass writes behind the committed
    tokens, `commit` moves the accepted path forward (only where it is not in place already), and what was rejected is
    overwritten by the next tree. What a row has beyond its own length must be hidden by the attention mask. A tree may
    also come in several passes, level by level: `stage` keeps the nodes of the passes so far in their slots.

    Args:
        layer_types: Per layer `"full_attention"`, `"sliding_attention"`, `"chunked_attention"` or `"dummy"`. Layers
            with a window keep every token too; the window is the mask's work.
        capacity: Slots to allocate at first. Grows when needed.
        one_device: Whether all layers live on one device; if so, layers of the same shape share one allocation.
        storage: Where keys and values stay when the cache is gone; `capacity` is then that of the storage.
    """

    def __init__(
        self, layer_types: Sequence[str], capacity: int, one_device: bool = True, storage: Storage | None = None
    ) -> None:
        layers: list[Any] = [DummyLayer() if kind == "dummy" else TreeLayer(self, kind) for kind in layer_types]
        super().__init__(layers=layers)
        self.capacity = capacity
        self.lengths: list[int] = []
        self.staged = 0
        self.is_prefilling = True
        self.static: StaticSlots | None = None
        """Set while a pass runs whose shapes do not depend on the rows' lengths."""
        self.storage = storage
        self._layers_of_type = Counter(layer_types) if one_device else Counter()
        self._pools: list[_Pool] = []
        self._slots: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def width(self) -> int:
        """Committed slots of the longest row."""
        return max(self.lengths, default=0)

    @property
    def is_ragged(self) -> bool:
        """Whether rows have different lengths."""
        return len(set(self.lengths)) > 1

    @property
    def is_allocated(self) -> bool:
        """Whether every layer has its keys and values; they come with the first tokens."""
        return all(layer.is_initialized for layer in self.tree_layers())

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(t.numel() * t.element_size() for pool in self._pools for t in (pool.keys, pool.values))

    def tree_layers(self) -> list[TreeLayer]:
        """The layers that hold keys and values."""
        return [layer for layer in self.layers if isinstance(layer, TreeLayer)]

    def pools(self) -> tuple[list[Tensor], tuple[tuple[int, int] | None, ...]]:
        """Keys and values of each pool in turn, and per layer the number of its pool and its place there, or None."""
        at = {id(layer): (n, i) for n, pool in enumerate(self._pools) for i, layer in enumerate(pool.members)}
        tensors = [part for pool in self._pools for part in (pool.keys, pool.values)]
        return tensors, tuple(at.get(id(layer)) for layer in self.layers)

    def allocate(self, layer: TreeLayer, key: Tensor, value: Tensor) -> None:
        """Gives `layer` its place in a pool of its shape, creating the pool if there is none."""
        kind = (layer.layer_type, key.shape[1], key.shape[-1], value.shape[1], value.shape[-1], key.dtype, key.device)
        pool = next((p for p in self._pools if p.kind == kind and len(p.members) < len(p.keys)), None)
        if pool is None:
            self.capacity = max(self.capacity, key.shape[-2])
            pool = _Pool(kind, *self._new_pool(kind, max(self._layers_of_type[layer.layer_type], 1), key, value))
            self._layers_of_type[layer.layer_type] = 0
            self._pools.append(pool)
        pool.members.append(layer)
        pool.replace(pool.keys, pool.values)

    def _new_pool(self, kind: tuple[Any, ...], layers: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.storage is not None:
            return self.storage.take((len(self._pools), *kind), layers, key, value)
        keys, values = (
            part.new_zeros((layers, *part.shape[:2], self.capacity, part.shape[-1])) for part in (key, value)
        )
        return keys, values

    def reserve(self, slots: int) -> None:
        """Makes room for `slots` slots in all."""
        if slots <= self.capacity:
            return
        more = max(slots - self.capacity, GROWTH, self.capacity // 4)
        self.capacity += more
        for pool in self._pools:
            pool.replace(*(torch.nn.functional.pad(t, (0, 0, 0, more)) for t in (pool.keys, pool.values)))
        if self.storage is not None:
            pools = {(i, *pool.kind): (pool.keys, pool.values) for i, pool in enumerate(self._pools)}
            self.storage.replace(pools, self.capacity)

    def write(self, layer: TreeLayer, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new keys and values, `[batch, heads, new, head_dim]`, and returns all that attention may look at."""
        new, at = key.shape[-2], None
        if self.static is not None:
            end, at = self.static.width, (self.static.rows, self.static.slots)
        else:
            end = layer.get_seq_length() + new
            self.reserve(end)
            if self.is_prefilling:
                layer.num_appended += new
            elif self.is_ragged:
                at = self.new_slots(new, key.device)
        keys, values = layer.keys, layer.values
        assert keys is not None and values is not None
        for pool, part in ((keys, key), (values, value)):
            if at is None:
                pool[:, :, end - new : end] = part
            else:
                pool[at[0], :, at[1]] = part.transpose(1, 2)
        return keys[:, :, :end], values[:, :, :end]

    def new_slots(self, new: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows, `[batch, 1]`, and the slots that `new` more nodes of each row go to, `[batch, new]`."""
        cached = self._slots.get(device)
        if cached is None or cached[1].shape[1] != new:
            lengths = torch.tensor(self.lengths, device=device) + self.staged
            rows = torch.arange(len(self.lengths), device=device)[:, None]
            cached = self._slots[device] = (rows, lengths[:, None] + torch.arange(new, device=device))
        return cached

    def end_prefill(self, batch: int) -> None:
        """Declares all that was appended so far committed, and tree passes to follow."""
        layers = self.tree_layers()
        self.lengths = [max((layer.num_appended for layer in layers), default=0)] * batch
        self.is_prefilling = False

    def stage(self, nodes: int) -> None:
        """Keeps the tree's first `nodes` nodes in their slots: the next pass brings the nodes behind them."""
        self.staged = nodes
        self._slots.clear()

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keeps one path of the tree per row and forgets the other nodes.

        Args:
            paths: Per row the nodes to keep, from the root (node 0) down. An empty path keeps nothing.
        """
        moves = [row for row, path in enumerate(paths) if any(node != i for i, node in enumerate(path))]
        if all(pool.keys.is_cpu for pool in self._pools):
            for row in moves:
                self._move_path(row, paths[row])
        elif moves:
            longest = max(len(paths[row]) for row in moves)
            source = [
                [self.lengths[row] + (paths[row][i] if i < len(paths[row]) else i) for i in range(longest)]
                for row in moves
            ]
            target = [[self.lengths[row] + i for i in range(longest)] for row in moves]
            for device in dict.fromkeys(pool.keys.device for pool in self._pools):
                rows = torch.tensor(moves, device=device)[:, None]
                old, new = torch.tensor([source, target], device=device)
                self.move(rows, old, new)
        self.lengths = [length + len(path) for length, path in zip(self.lengths, paths, strict=True)]
        self.staged = 0
        self._slots.clear()

    def _move_path(self, row: int, path: Sequence[int]) -> None:
        """Copies nodes to the slots behind a row's committed tokens, in all layers."""
        start = self.lengths[row]
        for pool in self._pools:
            source = torch.tensor([start + node for node in path])
            for tensor in (pool.keys[:, row], pool.values[:, row]):
                tensor.narrow(2, start, len(path)).copy_(tensor.index_select(2, source))

    def move(self, rows: Tensor, source: Tensor, target: Tensor) -> None:
        """Copies slots to slots, in all layers on the device of the arguments, from which the host reads nothing.

        Args:
            rows: `[rows, 1]`.
            source: `[rows, count]`.
            target: Of the same shape, ascending; none is behind its source.
        """
        for pool in self._pools:
            if pool.keys.device == source.device:
                move_slots(pool.keys, pool.values, rows, source, target)

    def addresses(self) -> tuple[int, ...]:
        """Where keys and values are."""
        return tuple(tensor.data_ptr() for pool in self._pools for tensor in (pool.keys, pool.values))

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drops every row of the batch that is not listed; with a storage, the others move to its front."""
        for pool in self._pools:
            index = torch.tensor(rows, device=pool.keys.device)
            kept = [tensor.index_select(1, index) for tensor in (pool.keys, pool.values)]
            if self.storage is not None:
                old = pool.keys[:, : len(rows)], pool.values[:, : len(rows)]
                kept = [tensor.copy_(new) for tensor, new in zip(old, kept, strict=True)]
            pool.replace(*kept)
        self.lengths = [self.lengths[row] for row in rows]
        self._slots.clear()

    def row(self, row: int) -> list[tuple[Tensor, Tensor] | None]:
        """Committed keys and values of one row per layer, `[heads, length, head_dim]`; None for a dummy layer."""
        out: list[tuple[Tensor, Tensor] | None] = []
        for layer in self.layers:
            if isinstance(layer, TreeLayer) and layer.keys is not None and layer.values is not None:
                length = self.lengths[row]
                out.append((layer.keys[row, :, :length], layer.values[row, :, :length]))
            else:
                out.append(None)
        return out

    @classmethod
    def of_rows(cls, layer_types: Sequence[str], rows: Sequence[Sequence[Any]], capacity: int) -> TreeCache:
        """A cache made of rows as `row` gives them, for instance of rows that have ended.

        Args:
            layer_types: As for the constructor.
            rows: Per row and layer keys and values, `[heads, length, head_dim]`, or None for a dummy layer.
            capacity: Slots to allocate.
        """
        cache = cls(layer_types, capacity, one_device=False)
        for index, layer in enumerate(cache.layers):
            if not isinstance(layer, TreeLayer) or rows[0][index] is None:
                continue
            shapes = [part.new_zeros((len(rows), part.shape[0], 0, part.shape[2])) for part in rows[0][index]]
            layer.lazy_initialization(*shapes)
            assert layer.keys is not None and layer.values is not None
            for i, row in enumerate(rows):
                layer.keys[i, :, : row[index][0].shape[1]] = row[index][0]
                layer.values[i, :, : row[index][1].shape[1]] = row[index][1]
        cache.end_prefill(len(rows))
        cache.lengths = [max((part[0].shape[1] for part in row if part), default=0) for row in rows]
        return cache

    def load(self, past: Cache) -> None:
        """Copies the tokens of another cache to the front of this empty one.

        Raises:
            ValueError: A layer's kind cannot be read.
        """
        theirs: Any
        for mine, theirs in zip(self.layers, past.layers, strict=True):
            length = theirs.get_seq_length() if isinstance(theirs, CacheLayerMixin) else 0
            if not isinstance(mine, TreeLayer) or length == 0:
                continue
            keys, values = theirs.keys, theirs.values
            if keys is None or values is None:
                raise ValueError(f"the kv cache handed in holds a {type(theirs).__name__}, whose tokens cannot be read")
            if not mine.is_initialized:
                mine.lazy_initialization(keys, values)
            self.reserve(length)
            assert mine.keys is not None and mine.values is not None
            # A layer with a window holds its last tokens only; the window hides the ones before them anyway.
            mine.keys[:, :, length - keys.shape[-2] : length] = keys
            mine.values[:, :, length - values.shape[-2] : length] = values
            mine.num_appended = length


def supports(cache: Cache | None) -> bool:
    """Whether a cache that a user handed in can be read into a `TreeCache` and written back."""
    return cache is None or (isinstance(cache, DynamicCache) and not cache.offloading)


def store(rows: Sequence[Sequence[tuple[Tensor, Tensor] | None]], past: Cache) -> None:
    """Writes committed rows back into a `DynamicCache`, as plain decoding would have left it.

    Args:
        rows: Per row what `TreeCache.row` returned when the row ended. Shorter rows are filled up with zeros.
        past: The cache to fill; what it held is replaced.
    """
    add_layers(past, len(rows[0]))
    layer: Any
    for index, layer in enumerate(past.layers):
        parts = [part for row in rows if (part := row[index]) is not None]
        if not parts:
            continue
        length = max(key.shape[1] for key, _ in parts)
        kept = length
        if isinstance(layer, DynamicSlidingWindowLayer):
            kept = min(length, layer.sliding_window - 1)
            layer.cumulative_length = length

        def stacked(which: int, parts: Any = parts, length: int = length, kept: int = kept) -> Tensor:
            padded = [torch.nn.functional.pad(p[which], (0, 0, 0, length - p[which].shape[1])) for p in parts]
            return torch.stack(padded)[:, :, length - kept :]

        keys, values = stacked(0), stacked(1)
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
