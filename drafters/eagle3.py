"""EAGLE-3: one layer that reads the target's states drafts a tree, level by level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from specdec.common.smollm2 import packaged_heads
from specdec.drafters.base import DraftContext, Drafter, DraftSession, Step
from specdec.heads.eagle3 import Eagle3Head
from specdec.heads.output_embedding import OutputEmbedding
from specdec.passes.tensor_parallel import check_whole
from specdec.tree import TokenTree

FOLDER = "eagle3"
"""Where a head stands in the folder of its model."""
CHUNK = 1024
"""Tokens of a prompt that the head reads at once: bounds the mask."""
SLOTS = 256
"""Cache slots that are added at a time."""


@dataclass(eq=False)
class Eagle3Drafter(Drafter):
    """Proposes the tree of the paths that an EAGLE-3 head holds likeliest.

    "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test" (arXiv 2503.01840).
    Trees are those of EAGLE-2 (arXiv 2406.16858, section 4): at each level the `top_k` likeliest paths grow by `top_k`
    tokens each, and of all nodes the likeliest are drafted.

    Args:
        head: A head for the target, or its folder or hub name, loaded in the target's precision; None for the folder
            `eagle3` in the target's own.
        max_nodes: Largest tree, the root included.
        top_k: Paths that grow at each level, and tokens that each of them grows by.
        max_depth: Levels at most.
        least_probability: Stop growing where even the likeliest path is less probable than this: further levels would
            cost a pass of the head each, and are hardly ever reached.
    """

    name = "eagle3"

    head: Eagle3Head | str | Path | None = None
    max_nodes: int = 64
    top_k: int = 8
    max_depth: int = 7
    least_probability: float = 0.1
    _head: Eagle3Head | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        for name in ("max_nodes", "top_k", "max_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.least_probability <= 1:
            raise ValueError(f"least_probability={self.least_probability} must be between 0 and 1")

    def settings(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        return values | {"head": self.head if isinstance(self.head, str | Path) else type(self.head).__name__}

    def bind(self, model: Any) -> None:
        check_whole(model, "the target of an EAGLE-3 head")
        if self._head is None:
            head = self.head
            if not isinstance(head, Eagle3Head):
                source = own_head(model) if head is None else head
                if source is None:
                    raise ValueError(
                        f"no head is given, and the model's folder {model.config.name_or_path!r} has no {FOLDER!r}; "
                        "pass Eagle3Drafter(head=...): a head, a folder or a hub name"
                    )
                head = Eagle3Head.from_pretrained(source).to(
                    OutputEmbedding(model).device, OutputEmbedding(model).dtype
                )
            self._head = head.eval()
        self._head.bind(model)
        self.needs_layers = self._head.config.target_layers or ()

    def start(self, context: DraftContext) -> DraftSession:
        assert self._head is not None, "bind() comes first"
        return Eagle3Session(self, self._head, context)


class Eagle3Session(DraftSession):
    """One call: the head's kv cache, and what the target has committed since the head was last run.

    Position i of the head's cache holds the target's fused states of token i and the embedding of token i + 1. Drafted
    entries stand in front of it and are overwritten by the next tree: they were made from the head's own states.

    Args:
        drafter: Settings.
        head: Bound to the target.
        context: At the end of the prefill.
    """

    def __init__(self, drafter: Eagle3Drafter, head: Eagle3Head, context: DraftContext) -> None:
        self.drafter, self.head = drafter, head
        self.rows = list(context.rows)
        states = context.new_states(drafter.needs_layers)
        # States of an earlier turn's tokens are not at hand: the head begins behind them.
        self.first = [len(ids) - 1 - len(new) for ids, new in zip(context.sequences, states, strict=True)]
        self.pending: list[list[Tensor]] = [[new] for new in states]
        self.lengths = [0] * len(self.rows)
        self.tree_slots = drafter.top_k * max(drafter.max_depth - 1, 1)
        shape = len(self.rows), head.kv_heads, self.tree_slots, head.head_dim
        self.keys = torch.zeros(shape, device=head.device, dtype=head.dtype)
        self.values = torch.zeros_like(self.keys)

    def observe(self, context: DraftContext, step: Step) -> None:
        self._keep_rows(context.rows)
        for pending, new in zip(self.pending, context.new_states(self.drafter.needs_layers), strict=True):
            pending.append(new)

    @torch.no_grad()
    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        self._keep_rows(context.rows)
        width = min(max_nodes, self.drafter.max_nodes)
        depth = min(self.drafter.max_depth, max(context.max_depth))
        roots = torch.tensor([int(ids[-1]) for ids in context.sequences])
        if width <= 1 or depth < 1:
            return TokenTree.root_only(roots)
        state, normed = self._read(context)
        return self._tree(roots, state, normed, width, depth)

    def _keep_rows(self, rows: Sequence[int]) -> None:
        """Forgets rows that have ended."""
        if list(rows) == self.rows:
            return
        kept = [self.rows.index(row) for row in rows]
        self.rows, self.keys, self.values = list(rows), self.keys[kept], self.values[kept]
        self.first, self.lengths = [self.first[i] for i in kept], [self.lengths[i] for i in kept]
        self.pending = [self.pending[i] for i in kept]

    def _read(self, context: DraftContext) -> tuple[Tensor, Tensor]:
        """Runs the head over what is new; returns both its outputs at each row's last position, `[rows, hidden]`."""
        states = [torch.cat(pending) for pending in self.pending]
        counts = [len(new) for new in states]
        tokens = [
            torch.from_numpy(ids[len(ids) - n :].astype("int64"))
            for ids, n in zip(context.sequences, counts, strict=True)
        ]
        ends: list[tuple[Tensor, Tensor] | None] = [None] * len(counts)
        for begin in range(0, max(counts), CHUNK):
            parts = [slice(begin, min(begin + CHUNK, n)) for n in counts]
            sizes = [max(part.stop - part.start, 0) for part in parts]
            width = max(sizes)
            padded = [
                functional.pad(new[part], (0, 0, 0, width - size))
                for new, part, size in zip(states, parts, sizes, strict=True)
            ]
            ids = torch.stack(
                [
                    functional.pad(of[part], (0, width - size))
                    for of, part, size in zip(tokens, parts, sizes, strict=True)
                ]
            )
            out = self._read_part(torch.stack(padded), ids.to(self.head.device), sizes)
            for row, size in enumerate(sizes):
                if size and begin + size == counts[row]:
                    ends[row] = out[0][row, size - 1], out[1][row, size - 1]
        self.pending = [[] for _ in self.pending]
        state, normed = zip(*(end for end in ends if end is not None), strict=True)
        return torch.stack(state), torch.stack(normed)

    def _read_part(self, states: Tensor, tokens: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Runs the head over `[rows, new]` positions behind those in the cache, of which `sizes` are real."""
        rows, width = tokens.shape
        lengths = torch.tensor(self.lengths, device=tokens.device)[:, None]
        at = lengths + torch.arange(width, device=tokens.device)
        slots = self.tree_slots + max(self.lengths) + width
        self._make_room(slots)
        seen = torch.arange(slots, device=tokens.device)
        mask = (seen >= self.tree_slots) & (seen <= (at + self.tree_slots)[..., None])

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            row = torch.arange(rows, device=key.device)[:, None]
            self.keys[row, :, at + self.tree_slots] = key.transpose(1, 2)
            self.values[row, :, at + self.tree_slots] = value.transpose(1, 2)
            return self._attention(query, slots, mask)

        positions = at + torch.tensor(self.first, device=tokens.device)[:, None]
        out: tuple[Tensor, Tensor] = self.head(self.head.embed(tokens), self.head.fuse(states), positions, attend)
        self.lengths = [length + size for length, size in zip(self.lengths, sizes, strict=True)]
        return out

    def _make_room(self, slots: int) -> None:
        missing = slots - self.keys.shape[2]
        if missing > 0:
            room = (0, 0, 0, -(-missing // SLOTS) * SLOTS)
            self.keys, self.values = functional.pad(self.keys, room), functional.pad(self.values, room)

    def _attention(self, query: Tensor, slots: int, mask: Tensor) -> Tensor:
        keys, values = self.keys[:, :, :slots], self.values[:, :, :slots]
        is_grouped = self.head.kv_heads != self.head.heads
        return functional.scaled_dot_product_attention(query, keys, values, mask[:, None], enable_gqa=is_grouped)

    def _best(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest tokens behind each position and their log-probabilities, `[..., top_k]`."""
        logits = self.head.lm_head(normed).float()
        best, places = logits.topk(min(self.drafter.top_k, logits.shape[-1]), -1)
        return self.head.draft_tokens[places], best - logits.logsumexp(-1, keepdim=True)

    def _tree(self, roots: Tensor, state: Tensor, normed: Tensor, width: int, depth: int) -> TokenTree:
        """Grows the tree, and keeps its likeliest nodes, `[rows, width]`."""
        tokens, scores = self._best(normed)  # [rows, k]
        rows, k = tokens.shape
        all_tokens, all_scores, all_sums = [tokens], [scores], [scores]
        all_parents = [torch.full_like(tokens, -1)]
        states, beam, sums = (
            state[:, None].expand(-1, k, -1),
            torch.arange(k, device=tokens.device).expand(rows, k),
            scores,
        )
        ancestors = torch.zeros(rows, k, self.tree_slots, dtype=torch.bool, device=tokens.device)
        for level in range(1, depth):
            if float(sums[:, 0].max()) < _log(self.drafter.least_probability):
                break
            states, normed, ancestors = self._level(tokens, states, ancestors, level)
            grown, scores = self._best(normed)  # [rows, k, k]
            grown_sums = (sums[..., None] + scores).flatten(1)
            all_tokens.append(grown.flatten(1))
            all_scores.append(scores.flatten(1))
            all_sums.append(grown_sums)
            all_parents.append(beam.repeat_interleave(scores.shape[-1], 1))
            offset = sum(part.shape[1] for part in all_tokens[:-1])
            sums, places = grown_sums.topk(k, -1)
            tokens, of = grown.flatten(1).gather(1, places), places // scores.shape[-1]
            states = states.gather(1, of[..., None].expand(-1, -1, states.shape[-1]))
            ancestors = ancestors.gather(1, of[..., None].expand(-1, -1, ancestors.shape[-1]))
            beam = places + offset
        return self._chosen(
            roots, width, *(torch.cat(parts, 1) for parts in (all_tokens, all_parents, all_scores, all_sums))
        )

    def _level(self, tokens: Tensor, states: Tensor, ancestors: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the head over the nodes that grow, `[rows, k]`; `ancestors` are the tree's slots that they see."""
        rows, k = tokens.shape
        first = (level - 1) * self.drafter.top_k
        slots = self.tree_slots + max(self.lengths)
        lengths = torch.tensor(self.lengths, device=tokens.device)[:, None]
        own = torch.arange(first, first + k, device=tokens.device)
        ancestors = ancestors.scatter(2, own[None, :, None].expand(rows, -1, 1), True)
        committed = torch.arange(slots - self.tree_slots, device=tokens.device) < lengths
        mask = torch.cat([ancestors, committed[:, None].expand(-1, k, -1)], -1)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self.keys[:, :, first : first + k], self.values[:, :, first : first + k] = key, value
            return self._attention(query, slots, mask)

        positions = lengths + torch.tensor(self.first, device=tokens.device)[:, None] + level - 1
        states, normed = self.head(self.head.embed(tokens), states, positions.expand(rows, k), attend)
        return states, normed, ancestors

    def _chosen(
        self, roots: Tensor, width: int, tokens: Tensor, parents: Tensor, scores: Tensor, sums: Tensor
    ) -> TokenTree:
        """The likeliest nodes, best first; with one transfer to the host."""
        # A child may be as likely as its parent in this precision, and must stand after it.
        order = torch.arange(sums.shape[1], device=sums.device)
        ranked = (sums.double() - 1e-9 * order).argsort(-1, descending=True)[:, : width - 1]
        rank = torch.full_like(parents, -1).scatter(
            1, ranked, torch.arange(1, ranked.shape[1] + 1, device=sums.device).expand_as(ranked)
        )
        of = parents.gather(1, ranked)
        nodes = torch.where(of < 0, 0, rank.gather(1, of.clamp(min=0)))
        probs = scores.gather(1, ranked).exp()
        packed = torch.stack([tokens.gather(1, ranked).double(), nodes.double(), probs.double()]).cpu()
        root = torch.zeros(len(roots), 1)
        return TokenTree(
            torch.cat([roots[:, None], packed[0].long()], 1),
            torch.cat([root.long() - 1, packed[1].long()], 1),
            torch.cat([root, packed[2].float()], 1),
        )


def _log(probability: float) -> float:
    return float("-inf") if probability <= 0 else float(torch.tensor(probability).log())


def own_head(model: Any) -> Path | None:
    """The folder `eagle3` in the model's own folder, else the head that the package holds for the model."""
    name = model.config.name_or_path
    folder = Path(name) / FOLDER
    return folder if name and folder.is_dir() else packaged_heads(name, FOLDER)
