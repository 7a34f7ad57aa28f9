"""The decoding loop: propose, target pass, verify, commit, observe."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from specdec.budget import Budget
from specdec.drafting import GuardedDrafter
from specdec.passes.tensor_parallel import Ranks
from specdec.report import SpeculationReport
from specdec.rows.sequences import Sequences
from specdec.rows.stopping import StopRule
from specdec.rows.streaming import StreamFeeder
from specdec.sampling import Sampler
from specdec.step import Outcome, Step
from specdec.target import TargetModel
from specdec.tree import TokenTree


@dataclass
class Decoder:
    """One call of `generate`: the objects that each own one arrow of the loop, and the loop."""

    target: TargetModel
    drafter: GuardedDrafter
    step: Step
    sampler: Sampler
    stop: StopRule
    budget: Budget
    sequences: Sequences
    streamer: StreamFeeder
    report: SpeculationReport
    ranks: Ranks | None = None
    rows: list[int] = field(default_factory=list)
    num_new: Sequence[int] = ()
    error: BaseException | None = None
    """Raised where the other processes of a tensor-parallel model hear of it."""

    def run(self, input_ids: Tensor) -> None:
        """Generates until every row is finished; the tokens are then in `sequences`.

        `rows` are the rows that still generate, by their index in the batch. Trees, logits, accepted nodes and counts
        have one entry per such row.

        Args:
            input_ids: The prompts as `generate` prepared them, `[batch, prompt]`.
        """
        self.rows = list(range(len(self.sequences)))
        with self.report.timed("prefill"):
            logits = self.target.prefill(input_ids)  # [B, 1, V]
        self.report.count_pass([0] * len(self.rows))
        tree = self._last_prompt_tokens(input_ids)
        with self.report.timed("verify"):
            outcome = self.step.verify(tree, logits, self.rows)
        unfinished = self._commit(tree, outcome)
        if unfinished:
            with self.report.timed("compile"):
                self.target.compile_passes(self.sequences.roots(self.rows)[:, None])
        try:
            self._tell(self.drafter.start, self.sequences, self.rows)
            while unfinished:
                self._end_rows(unfinished)
                with self.report.timed("draft"):
                    tree = self._propose()
                started = time.perf_counter()
                outcome = self.step.run(tree, self.rows)  # target pass, verify
                with self.report.timed("commit"):
                    unfinished = self._commit(tree, outcome, is_in_cache=False)
                    is_exact = self.report.guarantee == "token-identical"
                    self.budget.observe(tree, outcome.accepted, outcome.tokens if is_exact else None)
                    of_tree = outcome.accepted, self.num_new, outcome.top_tokens
                    self._tell(self.drafter.observe, self.sequences, self.rows, tree, *of_tree)
                self.budget.record(tree.num_nodes, time.perf_counter() - started)
        finally:
            self.drafter.finish(self.sequences)
        if self.error is not None:
            raise self.error
        self.budget.end()
        self.streamer.end()

    def _last_prompt_tokens(self, input_ids: Tensor) -> TokenTree:
        """The tree that the prefill has verified: the prompt's last token alone."""
        if input_ids.shape[1] == 0:  # the prompt came as embeddings
            return TokenTree.root_only(input_ids.new_zeros(len(input_ids)))
        return TokenTree.root_only(input_ids[:, -1])

    def _propose(self) -> TokenTree:
        """The next tree: what is worth verifying of the drafter's, or the roots alone."""
        tree = None
        if self.drafter.is_on or self.ranks is not None:
            tree = self._draft()
        self.report.count_pass([0] * len(self.rows) if tree is None else tree.num_drafted)
        return TokenTree.root_only(self.sequences.roots(self.rows)) if tree is None else tree

    def _draft(self) -> TokenTree | None:
        """The drafter's tree, cut to what is worth verifying; None when there is no draft."""
        if self.ranks is None:
            return self._chosen()
        return self.ranks.share(self._chosen, len(self.rows), self.budget.max_nodes)

    def _tell(self, method: Callable[..., None], *args: Any) -> None:
        """Tells the drafter of something; with several processes an error waits until all of them can be told."""
        try:
            method(*args)
        except BaseException as error:
            if self.ranks is None:
                raise
            self.error = error

    def _chosen(self) -> TokenTree | None:
        if self.error is not None:
            raise self.error
        self.budget.set_size(len(self.rows), max(self.sequences.lengths[row] for row in self.rows))
        nodes, started = self.budget.nodes_to_draft(), time.perf_counter()
        tree = self.drafter.propose(self.sequences, self.rows, nodes)
        spent = time.perf_counter() - started
        if tree is None and nodes > 1:
            self.budget.record_empty_proposal(spent)
        if tree is not None:
            tree = self.budget.choose(tree.first_chain() if self.target.lockstep else tree, spent)
        return tree

    def _commit(self, tree: TokenTree, outcome: Outcome, is_in_cache: bool = True) -> list[int]:
        """Keeps new tokens up to where their row ends; the cache gets all but the last, which is the next root.

        Returns:
            Which rows go on, as indices into `rows`.
        """
        counts, is_done = zip(*(self._count(i, row, outcome) for i, row in enumerate(self.rows)), strict=True)
        unfinished = [i for i, done in enumerate(is_done) if not done]
        if self.target.lockstep and unfinished:
            shortest = min(counts[i] for i in unfinished)
            counts = tuple(min(count, shortest) if i in unfinished else count for i, count in enumerate(counts))
        self.num_new, paths = counts, []
        for i, row in enumerate(self.rows):
            self.sequences.append(row, outcome.tokens[i][: counts[i]])
            paths.append([0, *outcome.accepted[i]][: counts[i]])
            self.sampler.commit(i, row, paths[i])
        if outcome.near_ties is not None:
            self.report.count_near_ties([row[:count] for row, count in zip(outcome.near_ties, counts, strict=True)])
        if not is_in_cache:
            for path in filter(None, paths):
                self.report.count_accepted(len(path) - 1)
            self.target.commit(paths, unfinished)
        if self.report.trace is not None:
            kept = [tokens[:count] for tokens, count in zip(outcome.tokens, counts, strict=True)]
            sources = [self.drafter.sources_of(i, tokens[:-1]) for i, tokens in enumerate(kept)]
            self.report.trace.add_pass(self.rows, kept, sources, tree.num_drafted)
        self.streamer.feed([self.rows[i] for i in unfinished])
        return unfinished

    def _count(self, i: int, row: int, outcome: Outcome) -> tuple[int, bool]:
        """How many of a row's new tokens are kept, and whether it is finished with them."""
        path = [0, *outcome.accepted[i]]
        scores = partial(self.sampler.scores_after, i, row, path) if self.sampler.keep_scores else None
        return self.stop.count(row, outcome.tokens[i], scores)

    def _end_rows(self, unfinished: list[int]) -> None:
        """Takes finished rows out of the computation and frees what no row needs any more."""
        if len(unfinished) < len(self.rows):
            self.target.keep_rows(unfinished)
            self.rows = [self.rows[i] for i in unfinished]
        if self.sampler.noise is not None:
            self.sampler.noise.forget(min(self.sequences.num_generated(row) for row in self.rows))
