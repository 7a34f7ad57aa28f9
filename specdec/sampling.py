"""Which token the target picks at each node of a tree."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation import logits_process as lp
from transformers.generation.logits_process import LogitsProcessorList

from specdec.kernels import child_with
from specdec.rows.draws import NoiseQueue
from specdec.rows.sequences import Sequences
from specdec.tree import TokenTree

SCORE_ONLY = frozenset(
    {
        lp.TemperatureLogitsWarper,
        lp.TopKLogitsWarper,
        lp.TopPLogitsWarper,
        lp.TopHLogitsWarper,
        lp.MinPLogitsWarper,
        lp.TypicalLogitsWarper,
        lp.EpsilonLogitsWarper,
        lp.EtaLogitsWarper,
        lp.InfNanRemoveLogitsProcessor,
        lp.LogitNormalization,
        lp.SuppressTokensLogitsProcessor,
    }
)
"""Processors that look at the scores alone: any number of nodes in one call."""

PREFIX = frozenset(
    {
        lp.MinLengthLogitsProcessor,
        lp.MinNewTokensLengthLogitsProcessor,
        lp.NoRepeatNGramLogitsProcessor,
        lp.SequenceBiasLogitsProcessor,
        lp.NoBadWordsLogitsProcessor,
        lp.ForcedBOSTokenLogitsProcessor,
        lp.ForcedEOSTokenLogitsProcessor,
        lp.ExponentialDecayLengthPenalty,
        lp.SuppressTokensAtBeginLogitsProcessor,
        lp.WatermarkLogitsProcessor,
    }
)
"""Processors that are a function of one row's own tokens and scores."""

BATCH_INDEXED = {
    lp.RepetitionPenaltyLogitsProcessor: "prompt_ignore_length",
    lp.EncoderRepetitionPenaltyLogitsProcessor: "encoder_input_ids",
}
"""Processors that keep one entry per row of the batch, and where."""


def not_row_wise(processors: LogitsProcessorList) -> list[str]:
    """Names of processors that may depend on the batch or on earlier calls.

    With one row even those are exact, because every walk calls them once per committed token, in order, as plain
    decoding does. In a batch the rows of a tree step are at different positions, so plain decoding must be used.
    """
    return [type(p).__name__ for p in processors if type(p) not in SCORE_ONLY | PREFIX | BATCH_INDEXED.keys()]


def for_rows(processors: LogitsProcessorList, rows: Sequence[int], batch: int) -> Any:
    """The processors as they apply to some rows of the batch."""
    if list(rows) == list(range(batch)):
        return processors
    out = LogitsProcessorList()
    for processor in processors:
        name = BATCH_INDEXED.get(type(processor))
        if name and isinstance(entries := getattr(processor, name), Tensor):
            processor = copy.copy(processor)
            setattr(processor, name, entries[list(rows)])
        out.append(processor)
    return out


class Sampler:
    """Applies the logits processors along each node's own path and picks the target's token there.

    Args:
        processors: As prepared by `generate`.
        do_sample: Sample with `noise`; otherwise take the most likely token.
        sequences: The tokens so far.
        noise: The random draws; needed when `do_sample`.
        keep_scores: Keep scores and logits of the nodes for `output_scores` / `output_logits`.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        do_sample: bool,
        sequences: Sequences,
        noise: NoiseQueue | None = None,
        keep_scores: bool = False,
    ) -> None:
        self.processors: Any = processors
        self.sequences = sequences
        self.noise = noise if do_sample else None
        self.keep_scores = keep_scores
        self.is_score_only = {type(p) for p in processors} <= SCORE_ONLY
        # On a CPU it is cheaper to look at few nodes; a device that is not waited for takes all of them at once.
        self.is_flat = self.is_score_only and sequences.device.type != "cpu"
        self.scores: Tensor | None = None  # [B, N, V] of the last call, rows of unvisited nodes undefined
        self.logits: Tensor | None = None
        self.keeps_margins = False
        self._margins: Tensor | None = None  # [B, N] of the last call, or what to make them of:
        self._values: Tensor | None = None  # [B, N, V], of which the highest was picked

    def margins_at(self, nodes: Tensor) -> Tensor:
        """How far the picks of the last call were ahead of the second best; needs `keeps_margins` before the call.

        Args:
            nodes: `[batch, count]`, on the path that was picked.

        Returns:
            Difference of scores, or of log probabilities minus the logarithms of the draws, `[batch, count]`.
        """
        if self._values is None:
            assert self._margins is not None
            return self._margins.gather(1, nodes)
        rows = torch.arange(len(nodes), device=nodes.device)[:, None]
        return margins(self._values[rows, nodes], self.noise is not None)

    def pick(self, tree: TokenTree, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """The target's token at each node.

        Args:
            tree: The verified tree, `[batch, nodes]`.
            logits: The target's logits, `[batch, nodes, vocab]`, any float dtype.
            rows: Index in the whole batch of each row of the tree.

        Returns:
            Token ids `[batch, nodes]`, int64. On a CPU, and where processors need a prefix, only the nodes on the
            target's own path are computed; the others are -1 (equal to no token).
        """
        logits = self._begin(logits)
        self._values = None
        if self.is_flat or self.keep_scores:  # else only the nodes on the path are converted
            logits = logits.float()
        if self.is_flat:
            scores = self.process_flat(tree, logits)
            picks = self.select(scores, tree, rows)
        else:
            scores = logits.clone() if self.keep_scores else logits
            picks = self._walk(tree, logits, scores, rows)
        if self.keep_scores:
            self.logits, self.scores = logits, scores
        return picks

    def process(self, tree: TokenTree, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """Processed scores at every node, each on its own prefix, for rules that look at the target's probabilities.

        Args:
            tree: The verified tree, `[batch, nodes]`.
            logits: The target's logits, `[batch, nodes, vocab]`, any float dtype.
            rows: Index in the whole batch of each row of the tree.

        Returns:
            `[batch, nodes, vocab]`, float32; undefined at padding nodes.
        """
        logits = self._begin(logits).float()
        scores = self.process_flat(tree, logits) if self.is_score_only else self._process_levels(tree, logits, rows)
        if self.keep_scores:
            self.logits, self.scores = logits, scores
        return scores

    def select(self, scores: Tensor, tree: TokenTree, rows: Sequence[int]) -> Tensor:
        """The target's token at every node by its processed scores `[batch, nodes, vocab]`."""
        if self.noise is None:
            self._values = scores if self.keeps_margins else None
            return scores.argmax(-1)
        probs = torch.softmax(scores, dim=-1)
        depths = tree.depths
        picks = torch.empty_like(tree.tokens)
        for i, row in enumerate(rows):
            first = self.sequences.num_generated(row)
            noise = torch.stack([self.noise.at(first + depth, row) for depth in range(tree.deepest + 1)])
            probs[i] /= noise[depths[i]]
            picks[i] = probs[i].argmax(-1)
        self._values = probs if self.keeps_margins else None
        return picks

    def kept(self, i: int, path: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Processed scores and raw logits, `[vocab]` each, at the nodes of row `i`'s path in the last tree."""
        assert self.scores is not None and self.logits is not None
        return list(zip(self.scores[i, path], self.logits[i, path], strict=True))

    def _begin(self, logits: Tensor) -> Tensor:
        if self.noise is not None:
            self.noise.begin(logits.shape[-1])
        return logits.to(self.sequences.device)

    def process_flat(self, tree: TokenTree, logits: Tensor) -> Tensor:
        """Processes all nodes in one call."""
        if not self.processors:
            return logits
        flat = logits.reshape(-1, logits.shape[-1])
        processed: Tensor = self.processors(tree.tokens.reshape(-1, 1), flat.clone())
        return processed.view_as(logits)

    def _process_levels(self, tree: TokenTree, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """Processes all nodes; in one call those of one depth in rows of one length, for a rectangle of ids."""
        scores = logits.clone()
        tokens, parents = tree.tokens.tolist(), tree.parents.tolist()
        levels = defaultdict(list)
        for i, row in enumerate(rows):
            paths: dict[int, list[int]] = {0: []}
            for node in range(tree.num_nodes):
                if parents[i][node] in paths:
                    paths[node] = [*paths[parents[i][node]], tokens[i][node]]
            for node, path in paths.items():
                levels[self.sequences.lengths[row], len(path)].append((i, node, path))
        for level in levels.values():
            at, nodes, prefixes = (list(column) for column in zip(*level, strict=True))
            of_batch = [rows[i] for i in at]
            ids = self.sequences.prefixes(of_batch, prefixes)
            processors = for_rows(self.processors, of_batch, len(self.sequences))
            scores[at, nodes] = processors(ids, logits[at, nodes])
        return scores

    def _walk(self, tree: TokenTree, logits: Tensor, scores: Tensor, rows: Sequence[int]) -> Tensor:
        """Picks from the root down the target's own path, one node per row and depth."""
        picks = np.full(tree.tokens.shape, -1)
        self._margins = torch.full(picks.shape, torch.inf, device=logits.device) if self.keeps_margins else None
        node = dict.fromkeys(range(len(rows)), 0)
        paths: dict[int, list[int]] = {i: [] for i in node}
        while node:
            for group in [list(node)] if self.is_score_only else self._same_length(rows, paths, node):
                nodes = [node[i] for i in group]
                processed = self._processed(_at(logits, group, nodes).float(), rows, group, paths)
                if self.keep_scores:
                    scores[group, nodes] = processed
                values = self._values_of(processed, rows, group, paths)
                if self._margins is not None:
                    self._margins[group, nodes] = margins(values, self.noise is not None)
                for i, at, token in zip(group, nodes, _argmax(values), strict=True):
                    picks[i, at] = token
                    child = child_with(tree.host_tokens[i], tree.host_parents[i], at, token)
                    if child < 0:
                        del node[i]
                    else:
                        node[i] = child
                        paths[i].append(token)
        return torch.from_numpy(picks).to(tree.tokens.device)

    def _processed(self, logits: Tensor, rows: Sequence[int], group: list[int], paths: dict[int, list[int]]) -> Tensor:
        """Processed scores of one node in each row of a group, `[group, vocab]`."""
        if not self.processors:
            return logits
        of_batch = [rows[i] for i in group]
        ids = None if self.is_score_only else self.sequences.prefixes(of_batch, [paths[i] for i in group])
        processed: Tensor = for_rows(self.processors, of_batch, len(self.sequences))(ids, logits.clone())
        return processed

    def _same_length(self, rows: Sequence[int], paths: dict[int, list[int]], node: dict[int, int]) -> list[list[int]]:
        """Rows whose prefixes have the same length: processors need a rectangle of ids."""
        groups = defaultdict(list)
        for i in node:
            groups[self.sequences.lengths[rows[i]] + len(paths[i])].append(i)
        return list(groups.values())

    def _values_of(self, scores: Tensor, rows: Sequence[int], group: list[int], paths: dict[int, list[int]]) -> Tensor:
        """What the highest is picked of, one per row of a group, `[group, vocab]`, from `scores` of that shape."""
        if self.noise is None:
            return scores
        positions = [self.sequences.num_generated(rows[i]) + len(paths[i]) for i in group]
        noise = [self.noise.at(at, rows[i]) for at, i in zip(positions, group, strict=True)]
        return torch.softmax(scores, dim=-1) / (noise[0] if len(noise) == 1 else torch.stack(noise))


def _at(logits: Tensor, group: list[int], nodes: list[int]) -> Tensor:
    """Logits at one node in each row of a group, `[group, vocab]`."""
    if len(group) == 1:
        return logits[group[0], nodes[0] : nodes[0] + 1]
    return logits[group, nodes]


def _argmax(values: Tensor) -> list[int]:
    """The place of each list's highest value, among equals of the first, on the host."""
    if values.is_cpu:  # numpy does it in a fraction of the time, and breaks ties as torch does
        return values.numpy().argmax(-1).tolist()
    return values.argmax(-1).tolist()


def margins(values: Tensor, is_sampled: bool = False) -> Tensor:
    """How far the highest is ahead of the second, `[..., vocab] -> [...]`.

    Args:
        values: Scores, or probabilities divided by draws.
        is_sampled: Whether `values` are divided probabilities, whose logarithms are compared.
    """
    best = _two_highest(values)
    if is_sampled:
        best = best.log()
    return best[..., 0] - best[..., 1]


def _two_highest(values: Tensor) -> Tensor:
    """The two highest values, `[..., vocab] -> [..., 2]`."""
    if not values.is_cpu:
        return values.topk(2).values
    lists = values.numpy().reshape(-1, values.shape[-1])  # two scans take an eighth of the time of `topk`
    found = np.empty((len(lists), 2), lists.dtype)
    for i, scores in enumerate(lists):
        at = scores.argmax()
        rest = scores[:at].max(initial=-np.inf), scores[at + 1 :].max(initial=-np.inf)
        found[i] = scores[at], max(rest)
    return torch.from_numpy(found).view(*values.shape[:-1], 2)
