"""The draft model's forwards: its own kv cache, fed with what it has not seen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from specdec.compat import CACHE
from specdec.drafters.small_model.captured import CapturedPass
from specdec.kernels import Ints, visible_slots
from specdec.kv_cache import TreeCache
from specdec.passes.capability import Capability
from specdec.passes.compiled.passes import CompiledPasses, begin_compiled
from specdec.target import CausalLM, accepts, cache_layer_types, input_device, is_on_one_device
from specdec.tree import TokenTree


class DraftPasses(ABC):
    """One call's forwards of a draft model.

    Behind the tokens of `lengths` the cache holds the nodes fed since the last `commit`, in the order in which they
    were fed; node 0 is the root.

    Args:
        model: The draft model.
        capability: What the probe has found out about it.
        compiled: Runs the passes behind the prompt, in the model's place.
        captured: The same by replaying them, as far as it can; or why it cannot.
    """

    lengths: list[int]
    """Tokens of each row in the cache, the nodes of the tree left out."""
    num_fed: int = 0
    """Nodes of the tree in the cache, padding included."""
    num_fed_tokens: int = 0
    """Tokens fed since the start, padding left out."""

    def __init__(
        self,
        model: CausalLM,
        capability: Capability,
        compiled: CompiledPasses | None = None,
        captured: CapturedPass | str | None = None,
    ) -> None:
        self.model = model
        self.capability = capability
        self.compiled = compiled
        self.captured = captured if isinstance(captured, CapturedPass) else None
        self.obstacle = captured if isinstance(captured, str) else None
        self.dtype: torch.dtype = model.dtype
        self.device = input_device(model)
        self._last_only = {"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}

    def figures(self) -> dict[str, str]:
        """For the report: whether passes are replayed, and why not, where that is a question."""
        if self.captured is not None:
            return {"draft_cuda_graphs": self.captured.store.describe()}
        if self.obstacle is not None and self.device.type != "cpu":
            return {"draft_cuda_graphs": f"none, because {self.obstacle}"}
        return {}

    def close(self) -> None:
        """The call is over."""
        if self.captured is not None:
            self.captured.close()

    @abstractmethod
    def prefill(self, sequences: Sequence[Ints], room: int) -> None:
        """Fills the cache with whole sequences.

        Args:
            sequences: Per row its tokens, all of them to be kept.
            room: Tokens to come that get their slots at once.
        """

    @abstractmethod
    def feed_pending(self, pending: Sequence[Ints]) -> Tensor:
        """Feeds what follows the cached tokens; the last token of each row is the root.

        Returns:
            Logits behind the root, `[rows, vocab]`.
        """

    @abstractmethod
    def feed_level(self, tokens: Ints, parents: Ints) -> Tensor:
        """Feeds nodes of the tree.

        Args:
            tokens: `[rows, width]`.
            parents: Place of each node's parent among the nodes fed, -1 at padding, `[rows, width]`.

        Returns:
            Logits behind each node, `[rows, width, vocab]`.
        """

    @abstractmethod
    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keeps the nodes listed per row, by their places among the nodes fed, and forgets the others."""

    @abstractmethod
    def rollback(self, lengths: Sequence[int]) -> None:
        """Forgets tokens at the end of rows, between a `commit` and the next feeding.

        Args:
            lengths: How many tokens a row keeps at most. Where a cache cannot go back, it keeps fewer.
        """

    @abstractmethod
    def keep_rows(self, rows: Sequence[int]) -> None:
        """Ends all rows that are not listed (indices among the rows that are left)."""


class TreePasses(DraftPasses):
    """Branching trees over ragged rows, a level per pass."""

    _parents: Ints
    _is_chain: bool

    def prefill(self, sequences: Sequence[Ints], room: int) -> None:
        self.lengths = [len(sequence) for sequence in sequences]
        longest = max(self.lengths)
        if self.compiled is not None and not self.compiled.begin(self.model):
            self.compiled = None
        self.cache = self._new_cache(longest + room, len(sequences))
        if longest:
            # Padding stands on the right, where no real token sees it; the first pending tokens overwrite it.
            tokens = np.zeros((len(sequences), longest), np.int64)
            for row, sequence in enumerate(sequences):
                tokens[row, : len(sequence)] = sequence
            positions = np.arange(longest)[None].repeat(len(sequences), 0)
            self._forward(tokens, positions, None, self._last_only)
        self.cache.end_prefill(len(sequences))
        self.cache.lengths = self.lengths
        self.num_fed_tokens += sum(self.lengths)

    def _new_cache(self, slots: int, batch: int) -> TreeCache:
        types = cache_layer_types(self.model)
        if self.captured is not None:
            return self.captured.new_cache(types, slots, batch)
        return TreeCache(types, slots, is_on_one_device(self.model))

    def feed_pending(self, pending: Sequence[Ints]) -> Tensor:
        counts = [len(tokens) for tokens in pending]
        width = max(counts)
        self._begin(np.array(counts), width)
        tokens = np.zeros((len(pending), width), np.int64)
        for row, new in enumerate(pending):
            tokens[row, : len(new)] = new
        is_even = min(counts) == width
        logits = self._pass(tokens, 0, self._last_only if is_even else {})
        self.num_fed_tokens += sum(counts)
        self.cache.commit([range(count - 1) for count in counts])
        self.cache.stage(1)
        self._parents, self._is_chain = np.full((len(pending), 1), -1), True
        self.lengths, self.num_fed = self.cache.lengths, 1
        if is_even:
            return logits[:, -1]
        return logits[torch.arange(len(counts)), torch.tensor(counts, device=logits.device) - 1]

    def feed_level(self, tokens: Ints, parents: Ints) -> Tensor:
        first = self.num_fed
        self._is_chain = self._is_chain and parents.shape[1] == 1 and bool((parents == first - 1).all())
        self._parents = np.concatenate([self._parents, parents], 1)
        logits = self._pass(tokens, first, {})
        self.num_fed += tokens.shape[1]
        self.num_fed_tokens += int(np.count_nonzero(parents >= 0))
        self.cache.stage(self.num_fed)
        return logits

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        self.cache.commit(paths)
        self.lengths, self.num_fed = self.cache.lengths, 0

    def commit_above(self, paths: Sequence[Sequence[int]], places: Ints, parents: Ints) -> None:
        """Like `commit`, but with nodes below the paths that stay in the cache as the next tree's first ones.

        Args:
            paths: See `commit`.
            places: Per row the places of these nodes among those fed, the new root first, -1 behind them,
                `[rows, kept]`.
            parents: Place of each one's parent among those kept, -1 at the root and at padding, `[rows, kept]`.
        """
        kept = [[place for place in row if place >= 0] for row in places.tolist()]
        self.cache.commit([[*path, *more] for path, more in zip(paths, kept, strict=True)])
        self.cache.lengths = [length - len(more) for length, more in zip(self.cache.lengths, kept, strict=True)]
        self.num_fed = places.shape[1]
        self.cache.stage(self.num_fed)
        self.lengths, self._parents = self.cache.lengths, parents
        self._is_chain = bool((parents == np.arange(-1, self.num_fed - 1)).all())

    def rollback(self, lengths: Sequence[int]) -> None:
        self.cache.lengths = [min(pair) for pair in zip(self.cache.lengths, lengths, strict=True)]
        self.cache.stage(0)
        self.lengths = self.cache.lengths

    def keep_rows(self, rows: Sequence[int]) -> None:
        self.cache.keep_rows(rows)
        self.lengths = self.cache.lengths

    def _begin(self, counts: Ints, width: int) -> None:
        """Starts the tree with a chain of so many nodes per row."""
        chain = np.arange(-1, width - 1)
        self._parents = np.where(np.arange(width) < counts[:, None], chain, -1)
        self._is_chain = bool((counts == width).all())

    def _pass(self, tokens: Ints, first: int, options: dict[str, Any]) -> Tensor:
        """A forward over the tree's nodes from `first` on."""
        if self.captured is not None:
            tree = self._tree()
            positions = np.array(self.cache.lengths)[:, None] + tree.depths.numpy()[:, first:]
            as_it_is = partial(self._pass_as_it_is, tokens, first, {})
            logits = self.captured.run(self.cache, tokens, positions, tree, as_it_is)
            if logits is not None:
                return logits
        return self._pass_as_it_is(tokens, first, options)

    def _tree(self) -> TokenTree:
        """The nodes in the cache and those to come, of which only the shape matters."""
        parents = torch.from_numpy(self._parents)
        return TokenTree(parents, parents)

    def _pass_as_it_is(self, tokens: Ints, first: int, options: dict[str, Any]) -> Tensor:
        mask_format, lengths = self.capability.mask_format, self.cache.lengths
        assert mask_format is not None
        if self._is_chain and tokens.shape[1] == 1 and not self.cache.is_ragged and not mask_format.is_local:
            positions = np.full(tokens.shape, lengths[0] + first)
            return self._forward(tokens, positions, None, options)
        seen, positions = visible_slots(self._parents, np.array(lengths), first)
        if mask_format.is_local:
            mask = mask_format.build(self._tree(), lengths, None, self.dtype, first)
        else:
            masks = dict.fromkeys(mask_format.layer_types, torch.from_numpy(seen)[:, None])
            mask = mask_format.formed(masks, self.dtype)
        return self._forward(tokens, positions, mask, options)

    def _forward(self, tokens: Ints, positions: Ints, mask: Any, options: dict[str, Any]) -> Tensor:
        if self.device.type != "cpu" and mask is not None:
            on = {kind: part.to(self.device) for kind, part in mask.items()} if isinstance(mask, dict) else None
            mask = on or mask.to(self.device)
        ids, at = (torch.from_numpy(array).to(self.device) for array in (tokens, positions))

        def as_it_is(**options: Any) -> tuple[Tensor, None]:
            logits: Tensor = self.model(
                input_ids=ids,
                position_ids=at,
                attention_mask=mask,
                use_cache=True,
                return_dict=True,
                **{CACHE: self.cache},
                **options,
            ).logits
            return logits, None

        if self.compiled is not None and self.cache.is_allocated and not self.cache.is_prefilling:
            return self.compiled(self.model, self.cache, ids, at, mask, {}, as_it_is)[0]
        return as_it_is(**options)[0]


class ChainPasses(DraftPasses):
    """One chain per row, each row with a cache of the model's own kind and its rollback.

    For draft models to which no branching tree can be shown. Such caches roll all rows back alike, so each row has its
    own and goes through the model alone.
    """

    def prefill(self, sequences: Sequence[Ints], room: int) -> None:
        self.caches = [self._new_cache() for _ in sequences]
        self.lengths = [len(sequence) for sequence in sequences]
        for row, sequence in enumerate(sequences):
            if len(sequence):
                self._forward(row, sequence[None], self._last_only)
            self.caches[row].activate_past_recording()
            if len(sequence):
                self.caches[row].crop(0)
        self.num_fed_tokens += sum(self.lengths)

    def feed_pending(self, pending: Sequence[Ints]) -> Tensor:
        logits = [self._forward(row, tokens[None], self._last_only)[0, -1] for row, tokens in enumerate(pending)]
        self.num_fed_tokens += sum(map(len, pending))
        self.lengths = [length + len(tokens) - 1 for length, tokens in zip(self.lengths, pending, strict=True)]
        self._in_cache = [[0] for _ in pending]
        self.num_fed = 1
        return torch.stack(logits)

    def feed_level(self, tokens: Ints, parents: Ints) -> Tensor:
        logits: list[Tensor | None] = [None] * len(tokens)
        for row in range(len(tokens)):
            if parents[row, 0] >= 0:
                assert parents[row, 0] == self._in_cache[row][-1], "a chain grows at its end"
                logits[row] = self._forward(row, tokens[row : row + 1, :1], {})[0]
                self._in_cache[row].append(self.num_fed)
                self.num_fed_tokens += 1
        self.num_fed += tokens.shape[1]
        some = next(row for row in logits if row is not None)
        return torch.stack([torch.zeros_like(some) if row is None else row for row in logits])

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        for row, path in enumerate(paths):
            assert list(path) == self._in_cache[row][: len(path)], "a chain is kept from its beginning"
            self.caches[row].crop(len(path) - len(self._in_cache[row]))
            self.lengths[row] += len(path)
        self.num_fed = 0

    def rollback(self, lengths: Sequence[int]) -> None:
        for row, most in enumerate(lengths):
            if self.lengths[row] <= most:
                continue
            if all(type(layer) is DynamicLayer for layer in self.caches[row].layers):
                self.caches[row].crop(most - self.lengths[row])
                self.lengths[row] = most
            else:  # what was before a window, or in a state, is gone: the row is read anew
                self.caches[row] = self._new_cache()
                self.caches[row].activate_past_recording()
                self.lengths[row] = 0

    def keep_rows(self, rows: Sequence[int]) -> None:
        self.caches = [self.caches[row] for row in rows]
        self.lengths = [self.lengths[row] for row in rows]
        if self.num_fed:
            self._in_cache = [self._in_cache[row] for row in rows]

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config.get_text_config(decoder=True))

    def _forward(self, row: int, tokens: Ints, options: dict[str, Any]) -> Tensor:
        ids = torch.from_numpy(np.asarray(tokens, np.int64)).to(self.device)
        logits: Tensor = self.model(
            input_ids=ids, use_cache=True, return_dict=True, **{CACHE: self.caches[row]}, **options
        ).logits
        return logits


@torch.no_grad()
def warmed_up(model: CausalLM, capability: Capability) -> CompiledPasses | None:
    """The model's compiled passes, ready for one row; None where they cannot be had now, which is told once.

    Raises:
        ValueError: The model's passes have no fixed places for keys and values.
    """
    if capability.mode != "tree":
        raise ValueError(
            f"compiled=True cannot be used with {type(model).__name__}: it can only be run on chains "
            f"({capability.reason}); leave it out"
        )
    if (compiled := begin_compiled(model, capability)) is None:
        return None
    passes = TreePasses(model, capability, compiled)
    passes.prefill([np.zeros(1, np.int64)], 4)
    passes.feed_pending([np.zeros(1, np.int64)])
    passes.feed_level(np.zeros((1, 2), np.int64), np.zeros((1, 2), np.int64))
    return compiled
