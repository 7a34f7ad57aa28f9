"""Heads on the target's hidden state, each predicting one token further ahead, as one tree."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.common.smollm2 import packaged_heads
from specdec.drafters.base import DraftContext, Drafter, DraftSession, Step
from specdec.drafters.trees.rank_tree import DecayedRates, count_ranks, draft_rows
from specdec.heads.medusa import MedusaHeads
from specdec.heads.output_embedding import OutputEmbedding
from specdec.kernels import Ints
from specdec.passes.cuda_graphs.call import CapturedCall
from specdec.passes.cuda_graphs.fingerprint import hooked, module_state
from specdec.passes.tensor_parallel import check_whole
from specdec.tree import TokenTree

NUM_CLASSES = 16
"""Classes of a head's probability in which its hits are counted."""

FOLDER = "medusa"
"""Folder of the heads in the folder of their model."""


@dataclass(eq=False)
class MedusaDrafter(Drafter):
    """Proposes the best tree of the tokens that each head ranks highest.

    "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads" (arXiv 2401.10774, sections 2.1.1
    and 2.3.3). One forward of all heads gives a list of tokens per depth; any path through the lists can be drafted.
    The paper fixes one tree of ranks beforehand; here each step has its own, grown best-first by how often a head was
    recently right with the probability that it gives: narrow and deep where heads are sure, wide where they are not.

    Args:
        heads: Heads for the target, or their folder or hub name, loaded in the target's precision; None for the folder
            `medusa` in the target's own.
        max_nodes: Largest tree, the root included.
        top_k: Length of each head's list.
        dynamic: Grow each step's tree by the heads' probabilities. Otherwise by the accuracies of their ranks, or use
            the tuned tree where the heads have one.
        prior_weight: Number of counted lists that the heads' own probabilities (or accuracies) are worth.
        memory: Number of lists after which a count has decayed to 1/e.
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
        self._lock = threading.Lock()  # of the counts and the passes
        self._passes: list[HeadsPass] = []  # of sessions that are over, with their CUDA graphs

    def fresh(self) -> MedusaDrafter:
        """Shares the heads; what was counted of their lists is forgotten."""
        new = copy.copy(self)
        new._lock, new._passes = threading.Lock(), []
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
            if self._heads is not None and _uses(self._heads, embedding):
                return
            heads = self._load(model).bind(model)
            self._reset_counts(heads)
            self._heads, self._passes = heads, []
        _compile_kernels()

    def start(self, context: DraftContext) -> DraftSession:
        with self._lock:
            if self._heads is None:
                raise ValueError("bind(model) comes before anything is drafted; specdec.accelerate does so")
            heads_pass = self._passes.pop() if self._passes else HeadsPass(self._heads, self._num_ranks)
        return MedusaSession(self, heads_pass)

    def give_back(self, heads_pass: HeadsPass) -> None:
        """Keeps the graphs of a session that is over for the next one."""
        with self._lock:
            if heads_pass.heads is self._heads and heads_pass not in self._passes:
                self._passes.append(heads_pass)

    def grow(self, roots: Sequence[int], max_depths: Ints, lists: HeadLists, width: int) -> TokenTree:
        """Trees out of the heads' lists.

        Args:
            roots: Last token of each row.
            max_depths: Largest depth of a node, `[rows]`.
            lists: Of these rows.
            width: Largest tree, the root included.
        """
        shape = len(roots), width
        tokens, parents, scores = np.zeros(shape, np.int64), np.full(shape, -1), np.zeros(shape, np.float32)
        tokens[:, 0] = roots
        with self._lock:
            rates = self._counts.rates()
        if self._tuned is None:
            used = draft_rows(lists.tokens, lists.probs, rates, self.dynamic, max_depths, tokens, parents, scores)
        else:
            depths, ranks, above = self._tuned[:, : width - 1]
            used = 1 + len(depths)
            tokens[:, 1:used] = lists.tokens[:, depths - 1, ranks]
            parents[:, 1:used] = np.where(depths <= max_depths[:, None], above, -1)
            scores[:, 1:used] = rates[depths - 1, ranks]
        return TokenTree.of_arrays(tokens[:, :used], parents[:, :used], scores[:, :used])

    def learn(self, lists: HeadLists, new_tokens: Sequence[NDArray[np.int32]]) -> None:
        """Counts the ranks of each row's new tokens in the lists."""
        known = np.zeros_like(lists.tokens[:, :, 0])  # [rows, heads]
        for i, tokens in enumerate(new_tokens):
            known[i, : len(tokens)] = tokens[: known.shape[1]]
        counts = np.array([len(tokens) for tokens in new_tokens], np.int64)
        with self._lock:
            tried, hit, decay = self._counts.tried, self._counts.hit, self._counts.decay
            count_ranks(lists.tokens, lists.probs, self.dynamic, known, counts, tried, hit, decay)

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
        """Starts counting from these heads' calibration."""
        num_heads, calibration = heads.config.num_heads, heads.calibration
        if calibration is not None and calibration.num_heads != num_heads:
            raise ValueError(
                f"the heads' calibration is of {calibration.num_heads} heads, and there are {num_heads}; measure it "
                "again with `specdec tune-tree`"
            )
        tree = calibration.tree if calibration is not None and not self.dynamic else None
        self._tuned = tuned_nodes(tree) if tree else None
        self._num_ranks = self.top_k if self._tuned is None else max(self.top_k, int(self._tuned[1].max()) + 1)
        if self.dynamic:
            middles = (np.arange(NUM_CLASSES) + 0.5) / NUM_CLASSES
            prior = np.tile(middles**2, (num_heads, 1))
        else:
            prior = np.zeros((num_heads, max(self._num_ranks, 2)))
            for head, ranks in enumerate(calibration.accuracies if calibration else default_accuracies(num_heads)):
                prior[head, : len(ranks)] = ranks[: prior.shape[1]]
        self._counts = DecayedRates(prior, self.prior_weight, self.memory)


class MedusaSession(DraftSession):
    """One call: keeps the lists of the step that is being verified.

    Args:
        drafter: Holds settings and counts.
        heads_pass: Used by this session alone.
    """

    def __init__(self, drafter: MedusaDrafter, heads_pass: HeadsPass) -> None:
        self.drafter, self.heads_pass = drafter, heads_pass
        self._state: Hashable = None  # what graphs rely on, looked up once per call
        self._pending: tuple[list[int], HeadLists] | None = None

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        roots, width = [int(sequence[-1]) for sequence in context.sequences], min(max_nodes, self.drafter.max_nodes)
        self._pending = None
        if width <= 1 or context.hidden_states is None:
            return TokenTree.root_only(torch.tensor(roots))
        lists = self._lists(context.hidden_states)
        self._pending = context.rows, lists
        return self.drafter.grow(roots, np.array(context.max_depth, np.int64).clip(0), lists, width)

    def observe(self, context: DraftContext, step: Step) -> None:
        pending, self._pending = self._pending, None
        if pending is not None and pending[0] == step.rows and step.new_tokens:
            self.drafter.learn(pending[1], step.new_tokens)

    def finish(self, context: DraftContext) -> None:
        self.drafter.give_back(self.heads_pass)

    def _lists(self, hidden: Tensor) -> HeadLists:
        key = None
        if self.drafter.cuda_graphs and hooked(embedding := self.heads_pass.heads.output_embedding.module) is None:
            self._state = self._state or (module_state(self.heads_pass.heads), module_state(embedding))
            key = self._state
        return self.heads_pass.run(hidden, key)


class HeadLists(NamedTuple):
    """The tokens that each head ranks highest, and their probabilities, `[rows, heads, ranks]`."""

    tokens: Ints
    probs: NDArray[np.float32]


class HeadsPass:
    """The forward of all heads, captured as CUDA graphs where it can be. Not for several threads at once.

    Args:
        heads: Bound to their model.
        num_ranks: Length of each head's list.
    """

    def __init__(self, heads: MedusaHeads, num_ranks: int) -> None:
        self.heads, self.num_ranks = heads, num_ranks
        self.captured = CapturedCall(self._best, heads.device)

    @torch.no_grad()
    def run(self, hidden: Tensor, key: Hashable) -> HeadLists:
        """The lists, with one transfer to the host.

        Args:
            hidden: What the target's output embedding is given, `[rows, hidden]`.
            key: What graphs rely on besides the shape; None: do not capture.
        """
        hidden = hidden.to(self.heads.device)
        tokens, probs = self._best(hidden) if key is None else self.captured(hidden, key=key)
        if tokens.device.type == "cpu":
            return HeadLists(tokens.numpy(), probs.numpy())
        packed = torch.stack([tokens.int(), probs.view(torch.int32)]).cpu().numpy()
        return HeadLists(packed[0].astype(np.int64), packed[1].view(np.float32))

    def _best(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.heads(hidden).float()  # [heads, rows, V]
        best, places = logits.topk(min(self.num_ranks, logits.shape[-1]), dim=-1)
        probs = (best - logits.logsumexp(-1, keepdim=True)).exp().transpose(0, 1).contiguous()
        return self.heads.tokens(places).transpose(0, 1).contiguous(), probs


def tuned_nodes(paths: Sequence[Sequence[int]]) -> Ints:
    """Depth, rank and parent (the root is 0) of each node of a tree of ranks, without the root, `[3, nodes]`.

    Args:
        paths: Paths of ranks, a path after the one it extends.
    """
    nodes = {(): 0} | {tuple(path): node for node, path in enumerate(paths, 1)}
    return np.array([(len(path), path[-1], nodes[tuple(path[:-1])]) for path in paths], np.int64).T


def own_heads(model: Any) -> Path | None:
    """The folder `medusa` in the model's own folder, else the heads that the package holds for the model."""
    name = model.config.name_or_path
    folder = Path(name) / FOLDER
    return folder if name and folder.is_dir() else packaged_heads(name)


def default_accuracies(num_heads: int, num_ranks: int = 10) -> list[list[float]]:
    """Accuracies assumed of heads that were not measured: about what is reported of Medusa on chat models.

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
    """Compiles the kernels, or loads them from Numba's cache, before a step of a generation needs them."""
    listed, ids = np.zeros((1, 1, 2), np.int64), np.zeros((1, 2), np.int64)
    probs, table = np.zeros((1, 1, 2), np.float32), np.zeros((1, 2))
    draft_rows(listed, probs, table, True, ids[:, 0].copy(), ids, ids.copy(), np.zeros((1, 2), np.float32))
    count_ranks(listed, probs, True, ids[:, :1].copy(), ids[0], table, table.copy(), 1.0)
