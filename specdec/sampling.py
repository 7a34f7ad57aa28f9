"""Which token the target picks at each node of a tree."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation import logits_process as lp
from transformers.generation.logits_process import LogitsProcessorList

from specdec.kernels import child_with
from specdec.rows.draws import NoiseQueue
from specdec.rows.sequences import Sequences
from specdec.rows.stopping import StopRule
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


Scored = tuple[Tensor, Tensor]
"""Processed scores and logits at one position, `[vocab]` each."""


class Sampler:
    """Applies the logits processors along each node's own path and picks the target's token there.

    Args:
        processors: As prepared by `generate`.
        do_sample: Sample with `noise`; otherwise take the most likely token.
        sequences: The tokens so far.
        noise: The random draws; needed when `do_sample`.
        keep_scores: Keep scores and logits of the nodes for `output_scores` / `output_logits`.
        stop: Where rows end: no processor is asked what comes after. None: nowhere.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        do_sample: bool,
        sequences: Sequences,
        noise: NoiseQueue | None = None,
        keep_scores: bool = False,
        stop: StopRule | None = None,
    ) -> None:
        self.processors: Any = processors
        self.sequences = sequences
        self.noise = noise if do_sample else None
        self.keep_scores = keep_scores
        self.kept_scores: list[list[Scored]] = [[] for _ in sequences.lengths]
        """Per row of the batch processed scores and logits of each committed position, if `keep_scores`."""
        self.stop = stop
        self.is_score_only = {type(p) for p in processors} <= SCORE_ONLY
        # On a CPU it is cheaper to look at few nodes; a device that is not waited for takes all of them at once.
        self.is_flat = self.is_score_only and sequences.device.type != "cpu"
        self.scores: Tensor | None = None  # [B, N, V] of the last call, rows of unvisited nodes undefined
        self.logits: Tensor | None = None
        self._walked: list[list[Scored]] | None = None  # per row of the last walk, in order
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
        if not self.is_flat:  # only the nodes on the path are converted
            return self._walk(tree, logits, rows)
        logits = logits.float()
        scores = self.process_flat(tree, logits)
        self._keep(scores, logits)
        return self.select(scores, tree, rows)

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
        self._keep(scores, logits)
        return scores

    def _keep(self, scores: Tensor, logits: Tensor) -> None:
        self._walked = None
        if self.keep_scores:
            self.logits, self.scores = logits, scores

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

    def commit(self, i: int, row: int, path: Sequence[int]) -> None:
        """Keeps scores and logits of the nodes of row `i`'s path in the last tree, if they are wanted."""
        if self.keep_scores:
            self.kept_scores[row] += self._scored(i, path)

    def pad(self, row: int, logits: Tensor, pad_token: int) -> None:
        """Keeps scores and logits of the padding that plain decoding feeds a row that has ended.

        Args:
            row: Of the batch; finished.
            logits: Behind its last token and behind each padding token but the last, `[missing, vocab]`.
            pad_token: The padding.
        """
        processors = for_rows(self.processors, [row], len(self.sequences))
        for count, given in enumerate(logits.to(torch.float32, copy=True).split(1)):
            ids = self.sequences.prefixes([row], [[pad_token] * count])
            self.kept_scores[row].append((processors(ids, given)[0], given[0]))

    def scores_after(self, i: int, row: int, path: Sequence[int], count: int) -> tuple[Tensor, ...]:
        """What a stopping criterion is given: scores up to the `count`-th node of a path of the last tree."""
        scored = [*self.kept_scores[row], *self._scored(i, path[:count])]
        return tuple(scores[None] for scores, _ in scored)

    def _scored(self, i: int, path: Sequence[int]) -> list[Scored]:
        if self._walked is not None:
            return self._walked[i][: len(path)]
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

    def _walk(self, tree: TokenTree, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """Picks from the root down the target's own path, one node per row and depth, up to where a row ends."""
        picks = np.full(tree.tokens.shape, -1)
        self._margins = torch.full(picks.shape, torch.inf, device=logits.device) if self.keeps_margins else None
        self._walked = [[] for _ in rows]
        node = dict.fromkeys(range(len(rows)), 0)
        paths: dict[int, list[int]] = {i: [] for i in node}
        while node:
            for group in [list(node)] if self.is_score_only else self._same_length(rows, paths, node):
                nodes = [node[i] for i in group]
                values = self._values_at(logits, nodes, rows, group, paths)
                if self._margins is not None:
                    self._margins[group, nodes] = margins(values, self.noise is not None)
                for i, at, token in zip(group, nodes, _argmax(values), strict=True):
                    picks[i, at] = token
                    paths[i].append(token)
                    child = child_with(tree.host_tokens[i], tree.host_parents[i], at, token)
                    if self._ends(i, rows[i], paths[i]) or child < 0:
                        del node[i]
                    else:
                        node[i] = child
        return torch.from_numpy(picks).to(tree.tokens.device)

    def _ends(self, i: int, row: int, path: list[int]) -> bool:
        """Whether a row is finished with the last token of a path that was picked."""
        if self.stop is None:
            return False
        scores = partial(self.scores_after, i, row, range(len(path))) if self.keep_scores else None
        return self.stop.ends(row, path, scores)

    def _values_at(
        self, logits: Tensor, nodes: list[int], rows: Sequence[int], group: list[int], paths: dict[int, list[int]]
    ) -> Tensor:
        """What the highest is picked of at one node in each row of a group, `[group, vocab]`, float32."""
        # A processor may write into its copy; the logits that are returned are then changed too, as plain ones are.
        given = _at(logits, group, nodes).to(torch.float32, copy=bool(self.processors) or self.keep_scores)
        scores = given
        if self.processors:
            of_batch = [rows[i] for i in group]
            ids = None if self.is_score_only else self.sequences.prefixes(of_batch, [paths[i] for i in group])
            scores = for_rows(self.processors, of_batch, len(self.sequences))(ids, given)
        if self.keep_scores:
            assert self._walked is not None
            for i, scored in zip(group, zip(scores, given, strict=True), strict=True):
                self._walked[i].append(scored)
        if self.noise is None:
            return scores.float()
        probs = torch.softmax(scores, dim=-1)  # of the scores' own type, as plain decoding has it
        positions = [self.sequences.num_generated(rows[i]) + len(paths[i]) for i in group]
        _check_probs(probs)
        noise = [self.noise.at(at, rows[i], probs.dtype) for at, i in zip(positions, group, strict=True)]
        return (probs / (noise[0] if len(noise) == 1 else torch.stack(noise))).float()

    def _same_length(self, rows: Sequence[int], paths: dict[int, list[int]], node: dict[int, int]) -> list[list[int]]:
        """Rows whose prefixes have the same length: processors need a rectangle of ids."""
        groups = defaultdict(list)
        for i in node:
            groups[self.sequences.lengths[rows[i]] + len(paths[i])].append(i)
        return list(groups.values())


def _check_probs(probs: Tensor) -> None:
    """Raises what `torch.multinomial` raises where no token is left to sample; one value per row tells."""
    if probs.is_cpu and bool(probs[:, 0].isnan().any()):  # one NaN makes all of a softmax NaN
        with torch.random.fork_rng(devices=[]):
            torch.multinomial(probs, 1)


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
