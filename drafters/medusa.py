"""Heads on the target's hidden state, each a list of tokens one place further ahead, as one tree."""

from __future__ import annotations

import copy
import functools
import threading
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.common.smollm2 import packaged_heads
from specdec.drafters.base import DraftContext, Drafter, Step
from specdec.drafters.trees.rank_tree import count_ranks, draft_rows
from specdec.heads.medusa import MedusaHeads
from specdec.heads.output_embedding import OutputEmbedding
from specdec.passes.cuda_graphs.call import CapturedCall
from specdec.passes.cuda_graphs.fingerprint import hooked, module_state
from specdec.passes.tensor_parallel import check_whole
from specdec.tree import TokenTree

NUM_CLASSES = 16
"""Classes of a head's probability, over which its hits are counted."""

FOLDER = "medusa"
"""Where heads stand in the folder of their model."""


@dataclass(eq=False)
class MedusaDrafter(Drafter):
    """Proposes the best tree out of what each head holds likely.

    "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads" (arXiv 2401.10774, sections 2.1.1
    and 2.3.3). One forward of all heads gives a list of tokens per depth; any path through the lists can be drafted.
    The paper fixes one tree of ranks beforehand; here each step has its own, grown best-first by how often a head was
    right of late with the probability that it gives: narrow and deep where heads are sure, wide where they are not.

    Args:
        heads: Heads for the target, or their folder or hub name, loaded in the target's precision; None for the folder
            `medusa` in the target's own.
        max_nodes: Largest tree, the root included.
        top_k: Length of each head's list.
        dynamic: Grow each step's tree by the heads' probabilities. Otherwise by the accuracies of their ranks, or take
            the tuned tree where the heads have one.
        prior_weight: How many counted lists the heads' own probabilities (or calibrated accuracies) are worth.
        memory: Lists after which a count is worth 1/e.
        cuda_graphs: On a GPU, replay the heads' pass as a CUDA graph.
    """

    name = "medusa"
    needs_hidden_states = True

    heads: MedusaHeads | str | None = None
    max_nodes: int = 64
    top_k: int = 10
    dynamic: bool = True
    prior_weight: float = 10.0
    memory: float = 500.0
    cuda_graphs: bool = True
    _heads: MedusaHeads | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        for name, least in (("max_nodes", 1), ("top_k", 1), ("prior_weight", 0.01), ("memory", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        self._lock = threading.Lock()
        self._thread = threading.local()
        self._state: tuple[int, int] | None = None  # what graphs take for granted in this call

    def fresh(self) -> MedusaDrafter:
        """Shares the heads; what was counted of their ranks is forgotten."""
        new = copy.copy(self)
        new._lock, new._thread = threading.Lock(), threading.local()
        if self._heads is not None:
            new._reset_counts(self._heads)
        return new

    def settings(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        heads = self.heads if self._heads is None else self._heads.config.__dict__
        return values | {"heads": heads if heads is None or isinstance(heads, dict) else str(heads)}

    def bind(self, model: Any) -> None:
        check_whole(model, "the target of Medusa heads")
        embedding = model.get_output_embeddings()
        with self._lock:
            self._state = None
            if self._heads is not None and _uses(self._heads, embedding):
                return
            heads = self._load(model).bind(model)
            self._reset_counts(heads)
            self._heads = heads
        _compile_kernels()

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        rows, width = len(context.rows), min(max_nodes, self.max_nodes)
        roots = [int(sequence[-1]) for sequence in context.sequences]
        self._thread.pending = None
        if width <= 1 or context.hidden_states is None or self._heads is None:
            return TokenTree.root_only(torch.tensor(roots))
        listed, probs = self._lists(self._heads, context.hidden_states)
        self._thread.pending = context.rows, [len(sequence) for sequence in context.sequences], listed, probs
        tokens = np.zeros((rows, width), np.int64)
        tokens[:, 0] = roots
        parents = np.full((rows, width), -1, np.int64)
        scores = np.zeros((rows, width), np.float32)
        max_depths = np.array(context.max_depth).clip(0)
        if self._tuned is not None:
            used = self._fill_tuned(listed, max_depths, tokens, parents, scores)
        else:
            used = draft_rows(listed, probs, self._rates(), self.dynamic, max_depths, tokens, parents, scores)
        tokens, parents, scores = tokens[:, :used], parents[:, :used], scores[:, :used]
        return TokenTree(torch.from_numpy(tokens), torch.from_numpy(parents), torch.from_numpy(scores))

    def observe(self, context: DraftContext, step: Step) -> None:
        pending, self._thread.pending = getattr(self._thread, "pending", None), None
        if pending is None or pending[0] != context.rows:
            return
        _, lengths, listed, probs = pending
        known = np.zeros(listed.shape[:2], np.int64)
        counts = np.zeros(len(listed), np.int64)
        for i, (sequence, length) in enumerate(zip(context.sequences, lengths, strict=True)):
            new = sequence[length : length + known.shape[1]]
            known[i, : len(new)] = new
            counts[i] = len(new)
        with self._lock:
            count_ranks(listed, probs, self.dynamic, known, counts, self._tried, self._hit, self._decay)

    def finish(self, context: DraftContext) -> None:
        self._thread.pending = None

    def _load(self, model: Any) -> MedusaHeads:
        if isinstance(self.heads, MedusaHeads):
            return self.heads
        source = own_heads(model) if self.heads is None else self.heads
        if source is None:
            raise ValueError(
                f"no heads are given, and the model's folder {model.config.name_or_path!r} has no {FOLDER!r}; train "
                "heads with `specdec train-medusa`, or pass MedusaDrafter(heads=...): heads, a folder or a hub name"
            )
        return MedusaHeads.from_pretrained(source, dtype=OutputEmbedding(model).dtype)

    def _reset_counts(self, heads: MedusaHeads) -> None:
        """Forgets what was counted of other heads, and takes up their calibration."""
        num_heads, calibration = heads.config.num_heads, heads.calibration
        if calibration is not None and calibration.num_heads != num_heads:
            raise ValueError(
                f"the heads' calibration is of {calibration.num_heads} heads, and there are {num_heads}; measure it "
                "again with `specdec tune-tree`"
            )
        tree = calibration.tree if calibration is not None and not self.dynamic else None
        self._tuned = TunedTree.of_paths(tree) if tree else None
        self._num_ranks = self.top_k if self._tuned is None else max(self.top_k, int(self._tuned.ranks.max()) + 1)
        if self.dynamic:
            middles = (np.arange(NUM_CLASSES) + 0.5) / NUM_CLASSES
            prior = np.tile(middles**2, (num_heads, 1))
        else:
            prior = np.zeros((num_heads, max(self._num_ranks, 2)))
            for head, ranks in enumerate(calibration.accuracies if calibration else default_accuracies(num_heads)):
                prior[head, : len(ranks)] = ranks[: prior.shape[1]]
        self._prior = prior * self.prior_weight
        self._tried, self._hit = np.zeros_like(prior), np.zeros_like(prior)
        self._decay = float(np.exp(-1.0 / self.memory))

    def _rates(self) -> NDArray[np.float64]:
        """P(accepted | parent accepted) by head and class."""
        with self._lock:
            return (self._hit + self._prior) / (self._tried + self.prior_weight)

    @torch.no_grad()
    def _lists(self, heads: MedusaHeads, hidden: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Each head's best tokens and their probabilities, `[rows, heads, ranks]`, with one transfer to the host."""
        hidden = hidden.to(heads.device)
        embedding = heads.output_embedding.module
        if self.cuda_graphs and hooked(embedding) is None:
            if self._state is None:
                self._state = module_state(heads), module_state(embedding)
            tokens, probs = self._captured(heads)(hidden, key=(self._state, self._num_ranks))
        else:
            tokens, probs = self._best(heads, hidden)
        if tokens.device.type == "cpu":
            return tokens.numpy(), probs.numpy()
        packed = torch.stack([tokens.int(), probs.view(torch.int32)]).cpu().numpy()
        return packed[0].astype(np.int64), packed[1].view(np.float32)

    def _best(self, heads: MedusaHeads, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Each head's best tokens and their probabilities, `[rows, heads, ranks]`, on the device."""
        logits = heads(hidden).float()  # [heads, rows, V]
        best, places = logits.topk(min(self._num_ranks, logits.shape[-1]), dim=-1)
        probs = (best - logits.logsumexp(-1, keepdim=True)).exp().transpose(0, 1).contiguous()
        return heads.tokens(places).transpose(0, 1).contiguous(), probs

    def _captured(self, heads: MedusaHeads) -> CapturedCall:
        """The thread's own graphs of these heads."""
        of, call = getattr(self._thread, "captured", (None, None))
        if of is not heads or call is None:
            call = CapturedCall(partial(self._best, heads), heads.device)
            self._thread.captured = heads, call
        return call

    def _fill_tuned(
        self,
        listed: NDArray[np.int64],
        max_depths: NDArray[np.int64],
        tokens: NDArray[np.int64],
        parents: NDArray[np.int64],
        scores: NDArray[np.float32],
    ) -> int:
        """Writes the tuned tree after the roots; returns its number of nodes."""
        assert self._tuned is not None
        size = min(tokens.shape[1], len(self._tuned.ranks) + 1)
        depths, ranks = self._tuned.depths[: size - 1], self._tuned.ranks[: size - 1]
        tokens[:, 1:size] = listed[:, depths - 1, ranks]
        parents[:, 1:size] = np.where(depths <= max_depths[:, None], self._tuned.parents[: size - 1], -1)
        scores[:, 1:size] = self._rates()[depths - 1, ranks]
        return size


@dataclass(frozen=True)
class TunedTree:
    """A tree of ranks, the root left out.

    Args:
        depths: Distance of each node from the root, `[nodes]`.
        ranks: Its rank in the list of its depth, `[nodes]`.
        parents: Its parent's index in the tree, root included, `[nodes]`.
    """

    depths: NDArray[np.int64]
    ranks: NDArray[np.int64]
    parents: NDArray[np.int64]

    @classmethod
    def of_paths(cls, paths: list[list[int]]) -> TunedTree:
        """Of paths of ranks, a path after the one it extends."""
        nodes = {(): 0} | {tuple(path): node for node, path in enumerate(paths, 1)}
        return cls(
            np.array([len(path) for path in paths], np.int64),
            np.array([path[-1] for path in paths], np.int64),
            np.array([nodes[tuple(path[:-1])] for path in paths], np.int64),
        )


def own_heads(model: Any) -> Path | None:
    """The folder `medusa` in the model's own folder, else the heads that the package holds for the model."""
    name = model.config.name_or_path
    folder = Path(name) / FOLDER
    return folder if name and folder.is_dir() else packaged_heads(name)


def default_accuracies(num_heads: int, num_ranks: int = 10) -> list[list[float]]:
    """What heads that were not measured are taken for: about what is reported of Medusa on chat models.

    The first head's best token is right six times out of ten and one of its best five eight times; each next head is
    right four times as often where its predecessor is five times.
    """
    ranks = [0.6] + [0.12 * 0.55**rank for rank in range(num_ranks - 1)]
    return [[0.8**head * accuracy for accuracy in ranks] for head in range(num_heads)]


def _uses(heads: MedusaHeads, embedding: Any) -> bool:
    """Whether heads are bound to this output embedding, and are where it is."""
    return heads.output_embedding.module is embedding and heads.output_embedding.device == heads.device


@functools.cache
def _compile_kernels() -> None:
    """Compiles, or loads what was compiled before, so that no step of a generation waits for it."""
    listed, ids = np.zeros((1, 1, 2), np.int64), np.zeros((1, 2), np.int64)
    probs, table = np.zeros((1, 1, 2), np.float32), np.zeros((1, 2))
    draft_rows(listed, probs, table, True, ids[:, 0].copy(), ids, ids.copy(), np.zeros((1, 2), np.float32))
    count_ranks(listed, probs, True, ids[:, :1].copy(), ids[0], table, table.copy(), 1.0)
