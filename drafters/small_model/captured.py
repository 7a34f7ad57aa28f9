"""A draft model's pass as a CUDA graph: a small model spends most of a pass in Python and in launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.kernels import Ints
from specdec.kv_cache import TreeCache
from specdec.passes.capability import Capability
from specdec.passes.compiled.forward import Layout, SlotForward
from specdec.passes.cuda_graphs.graphs import describe
from specdec.passes.cuda_graphs.store import StaticStore, acquire
from specdec.passes.cuda_graphs.target import width_of
from specdec.passes.cuda_graphs.transfers import Upload
from specdec.passes.masks import MaskFormat
from specdec.passes.tolerance import differ, noise_of
from specdec.target import CausalLM, input_device
from specdec.tree import TokenTree, bucket_of

MOST_NODES = 32
"""Nodes per row of a pass that is captured; wider ones, which come after long rests, are run as they are."""


class CapturedPass:
    """One call's passes of a draft model over new nodes, in static shapes: each shape is captured once, then replayed.

    The kv cache is in the store of the draft model, so that graphs of one call serve the next ones. As with the target,
    the first pass is compared with the pass as it is, and every replay when it is new; after a difference or an error
    the passes are run as they are, for good.

    Args:
        model: The draft model.
        mask_format: How it takes its mask.
        store: Of the draft model, acquired; `close` gives it back.
    """

    def __init__(self, model: CausalLM, mask_format: MaskFormat, store: StaticStore) -> None:
        self.model = model
        self.mask_format = mask_format
        self.store = store
        self._is_open = True
        self._uploads: dict[Any, Upload] = {}

    def close(self) -> None:
        """Gives the store back; the cache must not be used any more."""
        if self._is_open:
            self._is_open = False
            self.store.end()

    def __del__(self) -> None:  # of a call that broke off
        self.close()

    def new_cache(self, layer_types: Sequence[str], slots: int, batch: int) -> TreeCache:
        """A kv cache with room for `slots` tokens."""
        return TreeCache(layer_types, self.store.reserve(batch, width_of(slots)), storage=self.store)

    def run(
        self,
        cache: TreeCache,
        tokens: Ints,
        positions: Ints,
        tree: TokenTree,
        as_it_is: Callable[[], Tensor],
    ) -> Tensor | None:
        """Logits of new nodes, `[batch, nodes, vocab]`, valid until the next pass; None where there are none.

        Args:
            cache: Made by `new_cache`, after its prefill.
            tokens: `[batch, nodes]`.
            positions: `[batch, nodes]`.
            tree: All nodes behind the committed tokens, the new ones last; only its shape matters.
            as_it_is: The same pass without capture.
        """
        nodes = tokens.shape[1]
        if self.store.graphs.failure is not None or nodes > MOST_NODES or not cache.is_allocated:
            return None
        shape = len(tokens), bucket_of(nodes)
        used = cache.width + cache.staged + shape[1]
        if used > cache.capacity:
            cache.reserve(width_of(used))
            self._uploads.clear()
        width = min(width_of(used), cache.capacity)
        try:
            ints, masks = self._sent(cache, tokens, positions, tree, shape, width)
            step = self._step(cache, ints, masks, shape)
            if not self.store.is_compared:
                step()
                noise = noise_of(self.model, self.model.dtype)
                if differ(self._logits(shape)[:, :nodes], as_it_is(), self.model.dtype, noise):
                    self.store.graphs.fail("a pass of static shape gives other logits than the pass as it is")
                    return None
                self.store.is_compared = True
            key = (*shape, width, cache.addresses())
            known = (tuple(cache.lengths), cache.staged)
            self.store.graphs.run(key, step, lambda: [self._logits(shape)], known)
        except Exception as error:  # whatever a model may raise over static shapes, the pass as it is may be fine with
            self.store.graphs.fail(f"the static pass failed: {describe(error)}")
            return None
        return self._logits(shape)[:, :nodes]

    def _logits(self, shape: tuple[int, int]) -> Tensor:
        logits = self.store.kept("logits", shape)
        assert logits is not None
        return logits

    def _sent(
        self,
        cache: TreeCache,
        tokens: Ints,
        positions: Ints,
        tree: TokenTree,
        shape: tuple[int, int],
        width: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Fills the buffers: tokens, positions and slots, `[3, batch, nodes]`, and masks, `[batch, 1, nodes, width]`.

        Padding sees what the last node sees, as nothing to see would make numbers that are none.
        """
        batch, bucket = shape
        nodes = tokens.shape[1]
        upload = self._upload("ints", (3, batch, bucket), torch.int64)
        host = upload.host()
        host[0], host[1] = 0, positions[:, -1:]
        host[0, :, :nodes], host[1, :, :nodes] = tokens, positions
        host[2] = np.array(cache.lengths)[:, None] + cache.staged + np.arange(bucket)
        upload.send()
        masks = {}
        seen = self.mask_format.build_bool(tree, cache.lengths, tree.num_nodes - nodes)
        for kind, mask in seen.items():
            to = self._upload(f"mask {kind}", (batch, 1, bucket, width), torch.bool)
            host = to.host()
            host[..., mask.shape[-1] :] = False
            host[:, :, :nodes, : mask.shape[-1]] = mask.numpy()
            host[:, :, nodes:] = host[:, :, nodes - 1 : nodes]
            to.send()
            masks[kind] = to.buffer
        return upload.buffer, masks

    def _upload(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Upload:
        key = name, shape
        if key not in self._uploads:
            self._uploads[key] = Upload(self.store.buffer(name, shape, dtype))
        return self._uploads[key]

    def _step(
        self, cache: TreeCache, ints: Tensor, masks: dict[str, Tensor], shape: tuple[int, int]
    ) -> Callable[[], None]:
        """The pass: tensor functions on buffers."""
        rows = self.store.counting(shape[0])[:, None]
        tokens, positions, slots = ints.unbind()
        kinds = tuple(masks) if self.mask_format.by_layer_type else None
        pools, places = cache.pools()
        forward = SlotForward(self.model, Layout(places, kinds, True, ()))

        def step() -> None:
            mask = self.mask_format.formed(masks, self.model.dtype)
            seen = [*mask.values()] if isinstance(mask, dict) else [mask]
            self.store.keep("logits", shape, forward(tokens, rows, slots, positions, *seen, *pools)[0])

        return step


def captured_pass(model: CausalLM, capability: Capability) -> CapturedPass | str:
    """The captured passes of a call, or why there can be none."""
    if capability.mask_format is None:
        return f"it can be run on chains only ({capability.reason})"
    store = acquire(model, "auto", input_device(model))
    return store if isinstance(store, str) else CapturedPass(model, capability.mask_format, store)
