"""The target over a kv cache of static layout: every pass of one width is the same work on the same buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache

from specdec.kernels import ancestors_and_depths
from specdec.kv_cache import StaticSlots, TreeCache
from specdec.passes.attention.base import TreeAttention
from specdec.passes.attention.plan import TreePlan
from specdec.passes.attention.switch import switched_attention
from specdec.passes.cuda_graphs.graphs import describe, first_error
from specdec.passes.cuda_graphs.store import StaticStore
from specdec.passes.cuda_graphs.transfers import Upload
from specdec.passes.masks import MaskFormat
from specdec.passes.tolerance import differ, noise_of
from specdec.rows.sequences import Sequences
from specdec.target import CausalLM, TreeTarget
from specdec.tree import TokenTree, padded_width

LEAST_WIDTH = 256
"""Slots that attention is given at least."""


def width_of(slots: int) -> int:
    """Slots that attention is given when so many are needed: few widths, at most half as many again as needed."""
    width = LEAST_WIDTH
    while width < slots:
        width = width * 3 // 2 if width.bit_count() == 1 else width // 3 * 4
    return width


class Tail(Protocol):
    """What follows the pass inside a captured step."""

    def key(self) -> Any:
        """Tells apart tails that launch other work."""

    def kept(self) -> Any:
        """What holds tensors that the tail reads."""

    def outputs(self, batch: int, nodes: int) -> list[Tensor]:
        """The buffers that the tail writes, for a tree of this shape."""

    def run(self, tree: TokenTree, logits: Tensor, lengths: Tensor) -> None:
        """Reads and writes buffers only. `logits`: `[batch, nodes, vocab]`; `lengths`: `[batch]`."""


class StaticTarget(TreeTarget):
    """Branching trees in passes of static shapes, which can be captured.

    Lengths, positions, masks and slots are computed on the device; attention sees as many slots as the next bucket has.
    Rows that ended stay in the batch, with nothing to say, until half of it has ended. Where the static pass cannot be
    had, the call goes on as that of a `TreeTarget`.

    Args:
        model: See `TreeTarget`, as for the next ones.
        generation_config: See there.
        model_kwargs: See there.
        mask_format: See there.
        keep_cache: See there.
        max_nodes: See there.
        attention: See there.
        store: What outlives the call; acquired by the caller, given back by `close`.
    """

    def __init__(
        self,
        model: CausalLM,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        mask_format: MaskFormat,
        keep_cache: bool,
        max_nodes: int,
        attention: TreeAttention | None,
        store: StaticStore,
    ) -> None:
        super().__init__(model, generation_config, model_kwargs, mask_format, keep_cache, max_nodes, attention)
        self.store = store
        self.is_static = True
        if store.graphs.failure is None:
            self.manner += ", static" if store.graphs.recorder is None else ", captured"
        self.is_committed = False
        """The last step has committed on the device, so that `commit` need only take note."""
        self.places: list[int] = []
        """Row of the cache of each row that goes on."""
        self._uploads: dict[tuple[int, int], tuple[Upload, Upload]] = {}

    def close(self) -> None:
        """Gives the store back; the cache must not be used any more."""
        super().close()
        self.store.end()

    def place(self, tree: TokenTree) -> TokenTree:
        if self.is_static:  # in these widths wherever the tree is
            tree = tree.padded_to(padded_width(tree.num_nodes))
        return super().place(tree)

    def _new_cache(self, types: list[str], capacity: int, batch: int) -> TreeCache:
        slots = self.store.reserve(batch, width_of(capacity))
        return TreeCache(types, slots, storage=self.store)

    def _select(self, rows: Sequence[int]) -> None:
        super()._select(rows)
        if self.is_static:
            self.places = list(range(len(rows)))
            self._fill_row_buffers()

    def _fill_row_buffers(self) -> None:
        """Writes what stays the same from pass to pass: positions and padding of each row."""
        if self.positions is not None:
            offset = self._row_buffer("offset", self.positions.shape[:-2], 1)
            offset.zero_()
            offset[..., self.places, :] = self.positions - self.prefilled
        if self.prompt_mask is not None:
            visible = self._row_buffer("visible", (), self.cache.capacity, torch.bool)
            visible.fill_(True)
            visible[self.places, : self.prompt_mask.shape[1]] = self.prompt_mask

    def _row_buffer(self, name: str, shape: Sequence[int], width: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return self.store.buffer(name, (*shape, self.cache.batch_size, width), dtype)

    def forward(self, tree: TokenTree) -> Tensor:
        if self.is_static and not self.launch(tree, None):
            self._leave()
        if not self.is_static:
            return super().forward(tree)
        logits = self.store.kept("logits", (self.cache.batch_size, tree.num_nodes))
        assert logits is not None
        return logits if len(self.places) == len(logits) else logits[self.places]

    def launch(self, tree: TokenTree, tail: Tail | None, roots: Tensor | None = None, ahead: int = 0) -> bool:
        """Starts a static step; nothing is waited for once the step of this shape is captured.

        Args:
            tree: One row per row that goes on, padded to a bucket.
            tail: What follows the pass; None: nothing, the logits are kept.
            roots: In place of the tree's, `[batch]`, on the device.
            ahead: Tokens that each row will have committed before.

        Returns:
            Whether that could be done; if not, nothing has changed.
        """
        if self.store.graphs.failure is not None:
            return False
        lengths = [length + ahead for length in self.cache.lengths]
        needed = max(lengths) + tree.num_nodes
        self.make_room(tree.num_nodes)
        width = min(width_of(needed), self.cache.capacity)
        try:
            self._send(tree, lengths, roots)
            if not self._is_right(tree, width):
                return False
            step = self._step(tree.num_nodes, width, tail)
            key = self._key(tree.num_nodes, width, tail)
            kept = self.runner, None if tail is None else tail.kept()
            self.store.graphs.run(key, step, lambda: self._outputs(tree.num_nodes, tail), tuple(lengths), kept)
            self._take_hidden(tree.num_nodes)
        except Exception as error:  # whatever a model may raise over a static layout, the other one may be fine with
            self.store.graphs.fail(f"the static step failed: {describe(error)}", first_error(error))
            return False
        finally:
            self.cache.static = None
        return True

    def make_room(self, nodes: int) -> None:
        """Lets the cache grow if a tree needs it; all buffers are then new ones."""
        needed = self.cache.width + nodes
        if needed > self.cache.capacity:
            self.cache.reserve(width_of(needed))
            self._uploads.clear()
            self._fill_row_buffers()

    def _send(self, tree: TokenTree, lengths: list[int], roots: Tensor | None) -> None:
        """Fills the buffers that the step reads: lengths, tokens and parents of each row, and who sees whom."""
        nodes = tree.num_nodes
        ints, ancestors = self._buffers(nodes)
        host = ints.host()
        host[:, : 1 + nodes] = 0
        host[:, 1 + nodes :] = -1
        host[self.places, 0] = [lengths[place] for place in self.places]
        host[self.places, 1 : 1 + nodes] = tree.host_tokens
        host[self.places, 1 + nodes :] = tree.host_parents
        ancestors.host()[:] = ancestors_and_depths(np.ascontiguousarray(host[:, 1 + nodes :]))[0]
        ints.send()
        ancestors.send()
        if roots is not None:
            ints.buffer[:, 1].copy_(roots)

    def _buffers(self, nodes: int) -> tuple[Upload, Upload]:
        key = self.cache.batch_size, nodes
        if key not in self._uploads:
            batch = self.cache.batch_size
            ints = self.store.buffer("ints", (batch, 1 + 2 * nodes))
            ancestors = self.store.buffer("ancestors", (batch, nodes, nodes), torch.bool)
            self._uploads[key] = Upload(ints), Upload(ancestors)
        return self._uploads[key]

    def _step(self, nodes: int, width: int, tail: Tail | None) -> Callable[[], None]:
        """The static step: tensor functions on buffers."""
        ints, ancestors = (upload.buffer for upload in self._buffers(nodes))
        rows, places = self.store.counting(len(ints))[:, None], self.store.counting(nodes)
        visible = self._visible(width)

        def step() -> None:
            tree = TokenTree.on_device(ints[:, 1 : 1 + nodes], ints[:, 1 + nodes :], ancestors)
            lengths = ints[:, 0]
            self.cache.static = StaticSlots(rows, lengths[:, None] + places, width)
            positions = None
            if self.positions is not None:
                offset = self._row_buffer("offset", self.positions.shape[:-2], 1)
                positions = offset + lengths[:, None] + tree.depths
            with self._masked_on_device(tree, lengths, width, visible) as mask:
                logits = self.run_pass(tree.tokens, mask, positions)
            self.cache.static = None
            if self.hidden_states is not None and self.hidden_states.last_pass is not None:
                self.store.keep("hidden", (len(ints), nodes), self.hidden_states.last_pass)
            if tail is None:
                self.store.keep("logits", (len(ints), nodes), logits)
            else:
                tail.run(tree, logits, lengths)

        return step

    def _masked_on_device(
        self, tree: TokenTree, lengths: Tensor, width: int, visible: Tensor | None
    ) -> AbstractContextManager[Tensor | dict[str, Tensor]]:
        """As `_masked`, without a value of the host."""
        if self.attention is None:
            return nullcontext(self.mask_format.build_on_device(tree, lengths, width, visible, self.dtype))
        plan = TreePlan(tree, lengths, width, self.mask_format, visible, self.is_left_padded)
        return switched_attention(self.runner, plan, self.attention)

    def _visible(self, width: int) -> Tensor | None:
        if self.prompt_mask is None:
            return None
        return self._row_buffer("visible", (), self.cache.capacity, torch.bool)[:, :width]

    def _outputs(self, nodes: int, tail: Tail | None) -> list[Tensor]:
        """Buffers with the results of a step."""
        shape = self.cache.batch_size, nodes
        found = [self.store.kept("logits", shape)] if tail is None else tail.outputs(*shape)
        found += [self.store.kept("hidden", shape)] if self.hidden_states is not None else []
        return [tensor for tensor in found if tensor is not None]

    def _take_hidden(self, nodes: int) -> None:
        """Hidden states of the rows that go on: a replay calls no hook."""
        hidden = self.store.kept("hidden", (self.cache.batch_size, nodes))
        if self.hidden_states is not None and hidden is not None:
            self.hidden_states.last_pass = hidden if len(self.places) == len(hidden) else hidden[self.places]

    def _key(self, nodes: int, width: int, tail: Tail | None) -> tuple[Any, ...]:
        return (
            self.cache.batch_size,
            nodes,
            width,
            self.cache.addresses(),
            self.positions is None or self.positions.shape[:-2],
            self.prompt_mask is None,
            None if self.hidden_states is None else self.hidden_states.layers,
            self.compiled is None,
            None if self.attention is None else self.attention.name,
            repr(sorted(self.extra.items())),
            None if tail is None else tail.key(),
        )

    def _is_right(self, tree: TokenTree, width: int) -> bool:
        """Compares the first static pass of a model with the pass of changing shapes."""
        if self.store.is_compared:
            return True
        self._step(tree.num_nodes, width, None)()
        mine = self.store.kept("logits", (self.cache.batch_size, tree.num_nodes))
        assert mine is not None
        placed = TokenTree(tree.tokens, tree.parents).to(self.device)
        noise = noise_of(self.model, self.model.dtype)
        if differ(mine, super().forward(placed), self.model.dtype, noise):
            self.store.graphs.fail("a pass over a static layout gives other logits than one that is as long as needed")
            return False
        self.store.is_compared = True
        return True

    def _leave(self) -> None:
        """Goes on with shapes that change: rows that ended leave the cache."""
        self.is_static = False
        if len(self.places) < self.cache.batch_size:
            self.cache.keep_rows(self.places)
            self.places = list(range(len(self.places)))

    def _commit(self, paths: Sequence[Sequence[int]], unfinished: Sequence[int] | None) -> None:
        of_batch: list[Sequence[int]] = [[]] * self.cache.batch_size
        for place, path in zip(self.places, paths, strict=True):
            of_batch[place] = path
        if self.is_committed:
            self.cache.lengths = [n + len(path) for n, path in zip(self.cache.lengths, of_batch, strict=True)]
        else:
            self.cache.commit(of_batch)
        self.is_committed = False

    def _place_of(self, row: int) -> int:
        return self.places[row]

    def _drop_rows(self, rows: Sequence[int]) -> None:
        places = [self.places[row] for row in rows]
        is_small = 2 * len(places) <= self.cache.batch_size or not self.store.is_compared
        if is_small or not self.is_static:
            self.cache.keep_rows(places)
            places = list(range(len(places)))
        self.cache.lengths = [n if place in places else 0 for place, n in enumerate(self.cache.lengths)]
        super()._select(self.rows)
        self.places = places
        if self.is_static:
            self._fill_row_buffers()

    def finish(self, sequences: Sequences, pad_token: int) -> Cache | None:
        self.is_static = False
        return super().finish(sequences, pad_token)
