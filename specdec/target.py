"""The user's model: prefill, and one forward over a whole tree."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache

from specdec.compat import CACHE, PREFILL_ONLY, prefill, token_types
from specdec.kv_cache import ATTENTION_LAYER_TYPES, TreeCache, store
from specdec.passes.attention.base import TreeAttention
from specdec.passes.attention.plan import TreePlan
from specdec.passes.attention.switch import switched_attention
from specdec.passes.hidden_states import FINAL, HiddenStates
from specdec.passes.masks import MaskFormat
from specdec.passes.models import CausalLM as CausalLM
from specdec.passes.models import accepts as accepts
from specdec.passes.models import cache_layer_types as cache_layer_types
from specdec.passes.models import embedding_rows as embedding_rows
from specdec.passes.models import input_device as input_device
from specdec.passes.models import is_on_one_device as is_on_one_device
from specdec.passes.models import unwrapped as unwrapped
from specdec.passes.moe import ExpertsSwitch
from specdec.passes.replica import replica_of
from specdec.rows.sequences import Sequences
from specdec.tree import NODE_BUCKETS, TokenTree, padded_width

if TYPE_CHECKING:
    from specdec.passes.compiled.auto import EagerPasses
    from specdec.passes.compiled.passes import CompiledPasses

MAX_NEW_SLOTS = 1024
"""New tokens that get slots from the start; for more the cache grows."""

DECODE_KWARGS_HANDLED = frozenset(
    {"attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep", "inputs_embeds"}
)
"""Arguments of the model's forward that a pass sets itself or that belong to the prefill."""


class CacheNotFilledError(RuntimeError):
    """The model ran the prompt with a cache of its own in place of the one it was given."""


class TargetModel(ABC):
    """The user's unmodified model during one call of `generate`.

    Args:
        model: Any causal LM of transformers.
        generation_config: As prepared by `generate`.
        model_kwargs: As prepared by `generate`: masks, positions, the cache, whatever else the forward takes.
    """

    lockstep = False
    """Whether all rows must keep the same number of tokens in each step."""
    manner = ""
    """How passes are computed, as far as their times depend on it."""

    def __init__(self, model: CausalLM, generation_config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
        self.model = self.runner = model
        self.generation_config = generation_config
        self.model_kwargs = model_kwargs
        self.past: Cache | None = model_kwargs.get(CACHE)
        self.device = torch.device("cpu")
        self.hidden_states: HiddenStates | None = None
        self.compiled: CompiledPasses | EagerPasses | None = None
        self.extra = {
            name: value
            for name, value in model_kwargs.items()
            if name not in DECODE_KWARGS_HANDLED | PREFILL_ONLY and not isinstance(value, Tensor)
        }
        self.token_types = token_types(model_kwargs) or {}

    def use_replica(self) -> CausalLM:
        """Makes the passes of this call run a replica of the model, whose config and hooks are the call's own."""
        if self.runner is self.model:
            self.runner = replica_of(self.model)
        return self.runner

    def prefill(self, input_ids: Tensor) -> Tensor:
        """Runs the prompt as `generate` itself would.

        Returns:
            Logits after the last token, `[batch, 1, vocab]`.

        Raises:
            CacheNotFilledError: The prompt is not in the cache; the caller's own cache is as it was.
        """
        self.device = input_ids.device
        kwargs = {**self.model_kwargs, CACHE: self._start_cache(input_ids)}
        logits = prefill(self.runner, input_ids, self.generation_config, kwargs).logits[:, -1:]
        self._end_prefill(input_ids)
        if self.hidden_states is not None:
            self.hidden_states.keep_prompt()
        return logits

    @abstractmethod
    def _start_cache(self, input_ids: Tensor) -> Cache:
        """The cache to fill."""

    @abstractmethod
    def _end_prefill(self, input_ids: Tensor) -> None:
        """Sets up what the passes need."""

    def place(self, tree: TokenTree) -> TokenTree:
        """A tree from the host as the passes take it: on the model's device, there padded to one of few widths."""
        # Padding of a chain would stand at positions that may not exist.
        if self.device.type != "cpu" and not self.lockstep:
            tree = tree.padded_to(padded_width(tree.num_nodes))
        return tree.to(self.device)

    @abstractmethod
    def forward(self, tree: TokenTree) -> Tensor:
        """One target pass.

        Args:
            tree: One row per row still in the cache, `[batch, nodes]`.

        Returns:
            Logits at every node, `[batch, nodes, vocab]`.
        """

    def commit(self, paths: Sequence[Sequence[int]], unfinished: Sequence[int] | None = None) -> None:
        """Keeps the nodes listed per row and rolls back the others.

        Args:
            paths: Per row the nodes to keep, from the root down.
            unfinished: The rows that go on, where only they matter (a finished row's path may then be ignored).
        """
        self._commit(paths, unfinished)
        if self.hidden_states is not None:
            self.hidden_states.keep(paths)

    @abstractmethod
    def _commit(self, paths: Sequence[Sequence[int]], unfinished: Sequence[int] | None) -> None:
        """Commits in the kv cache."""

    def compile_passes(self, tokens: Tensor) -> None:
        """Does what compiled passes take longer for at first. `tokens` are run and rolled back, `[batch, 1]`."""

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Ends all rows that are not listed (indices among the rows still in the cache)."""
        self._keep_rows(rows)
        if self.hidden_states is not None:
            self.hidden_states.keep_rows(rows)

    @abstractmethod
    def _keep_rows(self, rows: Sequence[int]) -> None:
        """Ends rows in the kv cache."""

    def close(self) -> None:
        """Called at the end of the call, whatever has happened in it."""

    @abstractmethod
    def finish(self, sequences: Sequences, pad_token: int) -> Cache | None:
        """Leaves the cache that `generate` was given as plain decoding would leave it, and returns it."""

    def _positions(self, batch: int) -> Tensor | None:
        """Position of the first generated token, `[..., batch, 1]`, or None where the model takes no positions."""
        positions: Tensor | None = self.model_kwargs.get("position_ids")
        if positions is None:
            return None
        return (positions[..., -1:] + 1).expand(*positions.shape[:-2], batch, 1)


class TreeTarget(TargetModel):
    """Branching trees: own kv cache, 4-D masks, explicit positions.

    Args:
        mask_format: How this model takes its mask, as the probe found out.
        keep_cache: Whether the caller will look at the cache afterwards.
        max_nodes: Widest tree to expect.
        attention: What computes attention over a tree; None for what the model was loaded with, given a mask.
    """

    def __init__(
        self,
        model: CausalLM,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        mask_format: MaskFormat,
        keep_cache: bool = False,
        max_nodes: int = NODE_BUCKETS[-1],
        attention: TreeAttention | None = None,
    ) -> None:
        super().__init__(model, generation_config, model_kwargs)
        self.attention = attention
        own = model.config.get_text_config(decoder=True)._attn_implementation
        self.manner = f"attention of the model ({own})" if attention is None else f"attention {attention.name}"
        self.mask_format = mask_format
        self.keep_cache = keep_cache
        self.max_nodes = max_nodes
        self.ended: dict[int, Any] = {}
        self.padding_logits: dict[int, Tensor] = {}
        """Of rows that ended before the last one: logits of what follows them, `[missing, vocab]`, after `finish`."""
        self.experts = ExpertsSwitch(model, input_device(model))
        if attention is not None or self.experts.names:
            self.use_replica()

    @cached_property
    def dtype(self) -> torch.dtype:
        """Type of the mask, when it is additive."""
        return self.model.dtype

    def _start_cache(self, input_ids: Tensor) -> TreeCache:
        types = cache_layer_types(self.model)
        assert set(types) <= ATTENTION_LAYER_TYPES | {"dummy"}
        past = self.past.get_seq_length() if self.past is not None else 0
        embeds = self.model_kwargs.get("inputs_embeds")
        prompt = input_ids.shape[1] if embeds is None else embeds.shape[1]
        prompt += past if prompt <= past else 0  # input_ids hold all tokens, or only those behind the past
        new = min(self.generation_config.max_length - input_ids.shape[1], MAX_NEW_SLOTS)
        self.cache = self._new_cache(types, prompt + new + self.max_nodes, len(input_ids))
        if past and self.past is not None:
            self.cache.load(self.past)
        return self.cache

    def _new_cache(self, types: list[str], capacity: int, batch: int) -> TreeCache:
        return TreeCache(types, capacity, is_on_one_device(self.model))

    def _end_prefill(self, input_ids: Tensor) -> None:
        batch = input_ids.shape[0]
        if any(layer.num_appended == 0 for layer in self.cache.tree_layers()):
            raise CacheNotFilledError("the model does not use the kv cache it is given")
        self.cache.end_prefill(batch)
        self.rows = list(range(batch))
        self.prefilled = self.cache.width
        self.all_positions = self._positions(batch)
        mask: Tensor | None = self.model_kwargs.get("attention_mask")
        self.all_masks = None if mask is None or bool(mask.all()) else mask.bool()
        self.is_left_padded = self.all_masks is None or not bool((self.all_masks.int().diff(dim=1) < 0).any())
        self._select(self.rows)

    def forward(self, tree: TokenTree) -> Tensor:
        # One node, nothing padded: the model's own mask is the right one, and often none at all. With a window, some
        # models leave it to a cache that forgets.
        is_plain = tree.num_nodes == 1 and self.prompt_mask is None and not self.cache.is_ragged
        is_plain = is_plain and not self.mask_format.is_local
        positions = self.positions
        if positions is not None:
            generated = torch.tensor(self.cache.lengths, device=positions.device)[:, None] - self.prefilled
            positions = positions + generated + tree.depths
        with self._masked(tree, is_plain) as mask:
            return self.run_pass(tree.tokens, mask, positions)

    def compile_passes(self, tokens: Tensor) -> None:
        if self.compiled is None or self.compiled.is_eager:
            return
        for nodes in (1, 2)[: self.max_nodes]:
            trial = tokens.expand(-1, nodes)
            # In changing shapes, as what is captured must be compared before. Padding is never too deep.
            TreeTarget.forward(self, TokenTree(trial, torch.full_like(trial, -1)))
            self.cache.commit([[]] * len(tokens))

    def run_pass(self, tokens: Tensor, mask: Tensor | dict[str, Tensor] | None, positions: Tensor | None) -> Tensor:
        """The model's own forward behind what is in the cache.

        Args:
            tokens: `[batch, nodes]`.
            mask: In the model's own format; None where its own mask is the right one.
            positions: `[..., batch, nodes]`, or None where the model takes none.

        Returns:
            Logits, `[batch, nodes, vocab]`.
        """
        self.experts.use_for(self.runner, tokens.shape[1])
        inputs: dict[str, Any] = {"attention_mask": mask} if mask is not None else {}
        inputs |= {"position_ids": positions} if positions is not None else {}
        inputs |= {name: torch.full_like(tokens, value) for name, value in self.token_types.items()}
        inputs |= {"input_ids": tokens, CACHE: self.cache, "use_cache": True, "return_dict": True}

        def as_it_is() -> tuple[Tensor, Tensor | None]:
            logits: Tensor = self.runner(**inputs, **self.extra).logits
            return logits, None if self.hidden_states is None else self.hidden_states.last_pass

        if self.compiled is None:
            return as_it_is()[0]
        states = (FINAL,) if self.hidden_states is None else self.hidden_states.layers
        inputs_and_masks = self.cache, tokens, positions, mask, self.extra
        logits, hidden = self.compiled(self.model, *inputs_and_masks, as_it_is, states=states)
        if self.hidden_states is not None:
            self.hidden_states.last_pass = hidden
        return logits

    def _masked(self, tree: TokenTree, is_plain: bool) -> AbstractContextManager[Tensor | dict[str, Tensor] | None]:
        """Gives the mask to pass; inside, the chosen backend computes attention."""
        lengths = self.cache.lengths
        if self.attention is None:
            mask = None if is_plain else self.mask_format.build(tree, lengths, self.prompt_mask, self.dtype)
            return nullcontext(mask)
        plan = TreePlan(
            tree,
            torch.tensor(lengths, device=tree.tokens.device),
            self.cache.width + tree.num_nodes,
            self.mask_format,
            self.prompt_mask,
            self.is_left_padded,
            is_plain,
        )
        return switched_attention(self.runner, plan, self.attention)

    def _commit(self, paths: Sequence[Sequence[int]], unfinished: Sequence[int] | None) -> None:
        self.cache.commit(paths)

    def _keep_rows(self, rows: Sequence[int]) -> None:
        if self.keep_cache:
            for i in set(range(len(self.rows))) - set(rows):
                row = self.cache.row(self._place_of(i))
                # A clone only where more rows go on: the pools of the last ones are not written any more.
                self.ended[self.rows[i]] = [p and (p[0].clone(), p[1].clone()) for p in row] if rows else row
        self.rows = [self.rows[i] for i in rows]
        if rows:
            self._drop_rows(rows)

    def _place_of(self, row: int) -> int:
        """Where in the cache a row is that goes on."""
        return row

    def _drop_rows(self, rows: Sequence[int]) -> None:
        self.cache.keep_rows(rows)
        self._select(self.rows)

    def _select(self, rows: Sequence[int]) -> None:
        """Takes mask and positions of some rows of the batch."""
        self.prompt_mask, self.positions = self.all_masks, self.all_positions
        if self.prompt_mask is not None:
            self.prompt_mask = self.prompt_mask[list(rows)]
        if self.positions is not None:
            self.positions = self.positions[..., list(rows), :]

    def finish(self, sequences: Sequences, pad_token: int) -> Cache | None:
        if not self.keep_cache or self.past is None:
            return self.past
        self.keep_rows([])
        longest = max(sequences.lengths)
        short = [row for row, length in enumerate(sequences.lengths) if length < longest]
        if short:
            self._decode_padding(short, sequences, longest, pad_token)
        store([self.ended[row] for row in sorted(self.ended)], self.past)
        return self.past

    def _decode_padding(self, rows: Sequence[int], sequences: Sequences, longest: int, pad_token: int) -> None:
        """Runs what plain decoding feeds a row that has ended: its last token, then padding until the last row ends."""
        self.cache = TreeCache.of_rows(cache_layer_types(self.model), [self.ended[row] for row in rows], longest)
        self._select(rows)
        missing = [longest - sequences.lengths[row] for row in rows]
        tokens = [
            [int(sequences.ids[row, sequences.lengths[row] - 1])] + [pad_token] * (count - 1)
            for row, count in zip(rows, missing, strict=True)
        ]
        chain = TokenTree.from_rows(tokens, [range(-1, len(row) - 1) for row in tokens])
        logits = self.forward(chain.to(sequences.device))
        self.cache.commit([range(count) for count in missing])
        for i, row in enumerate(rows):
            self.ended[row] = self.cache.row(i)
            if missing[i]:
                self.padding_logits[row] = logits[i, : missing[i]]
