"""The loop's side of a drafter: its context, and what happens when it fails."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.budget import Budget
from specdec.drafters.base import DraftContext, Drafter, DrafterSwitchedOffWarning, DraftSession, Step, check_proposal
from specdec.kernels import Floats, Ints, host_array, largest_at
from specdec.passes.hidden_states import HiddenStates
from specdec.report import SpeculationReport
from specdec.rows.sequences import Sequences
from specdec.sampling import Sampler
from specdec.tree import TokenTree

__all__ = ["DrafterSwitchedOffWarning", "GuardedDrafter"]

RANKED_NODES = 16
"""Nodes of a tree, best first, behind which a drafter is told the target's likeliest tokens whatever comes of them."""
MOST_RESTED = 64
"""Steps without drafting of which the drafter is told at once."""


class GuardedDrafter:
    """Calls a drafter, and goes on without it after an error.

    Args:
        drafter: None for drafting off.
        vocab_size: Draft tokens must be below.
        report: Takes the error.
        strict: Raise a drafter's errors instead.
        hidden_states: The target's, for a drafter that needs them.
        sampler: How the target's tokens are picked.
        is_sampled_from: See `DraftContext`.
        budget: Knows how long a target pass takes.
        num_top_tokens: How many of the target's likeliest tokens the drafter wants to know per node.
    """

    def __init__(
        self,
        drafter: Drafter | None,
        vocab_size: int,
        report: SpeculationReport,
        strict: bool,
        hidden_states: HiddenStates | None = None,
        sampler: Sampler | None = None,
        is_sampled_from: bool = False,
        budget: Budget | None = None,
        num_top_tokens: int = 0,
    ) -> None:
        self._num_top_tokens = num_top_tokens
        self.drafter = drafter
        self.vocab_size = vocab_size
        self.report = report
        self.strict = strict
        self.hidden_states = hidden_states
        self.sampler = sampler
        self.is_sampled_from = is_sampled_from
        self.budget = budget
        self.session: DraftSession | None = None
        self._rested: list[tuple[list[int], Ints]] = []
        self._is_resting = False

    def kind(self) -> tuple[Hashable, ...]:
        """See `Drafter.kind`; nothing where there is no drafter."""
        return self._call("kind") or ()

    def start(self, sequences: Sequences, rows: Sequence[int]) -> None:
        """Tells the drafter that a call begins."""
        self.session = self._call("start", self._context(sequences, rows))

    def propose(self, sequences: Sequences, rows: Sequence[int], max_nodes: int) -> TokenTree | None:
        """The drafter's tree, or None when there is no draft token in it."""
        self._is_resting = max_nodes == 1
        if self.drafter is None or self._is_resting:
            return None
        self._tell_of_rest(sequences, rows)
        context = self._context(sequences, rows)
        if max(context.max_depth) < 1:
            return None
        tree: TokenTree | None = self._call("propose", context, max_nodes)
        if tree is None or tree.num_nodes == 1:
            return None
        # Beyond the length limit there may be no position for a token.
        return tree.up_to_depth(context.max_depth)

    @property
    def is_on(self) -> bool:
        """Whether there is a drafter, and it has not failed."""
        return self.drafter is not None

    @property
    def sits_out(self) -> bool:
        """Whether the next step has no draft, whatever comes of this one."""
        return self.drafter is None or (self._is_resting and self.budget is not None and self.budget.rests_next)

    @property
    def num_top_tokens(self) -> int:
        """How many of the target's likeliest tokens the drafter wants to know per node."""
        return self._num_top_tokens if self.drafter is not None else 0

    def top_tokens(self, logits: Tensor, accepted: Tensor) -> Tensor | None:
        """What the target holds likeliest, as far as the drafter wants to know it.

        Args:
            logits: The target's, `[batch, nodes, vocab]`.
            accepted: The accepted draft nodes, `[batch, depth]`, -1 behind the end.

        Returns:
            Token ids, best first, `[batch, nodes, count]`, int64, on the logits' device; None for a drafter that does
            not ask. On a CPU, where each node takes its time, -1 at those neither accepted nor among the first.
        """
        if not self.num_top_tokens:
            return None
        count = min(self.num_top_tokens, logits.shape[-1])
        if logits.device.type == "cpu":
            return torch.from_numpy(largest_at(host_array(logits.float()), count, RANKED_NODES, host_array(accepted)))
        return logits.topk(count).indices

    def observe(
        self,
        sequences: Sequences,
        rows: Sequence[int],
        tree: TokenTree,
        accepted: list[list[int]],
        num_new: Sequence[int],
        top_tokens: Ints | None = None,
    ) -> None:
        """Tells the drafter what became of a tree.

        Args:
            sequences: With the accepted tokens.
            rows: That took part.
            tree: The verified tree.
            accepted: Per row the accepted draft nodes.
            num_new: Per row how many tokens were committed.
            top_tokens: See `Step`.
        """
        if self._is_resting:
            if top_tokens is not None and top_tokens.shape[-1]:
                self._rested.append((list(rows), top_tokens))
            if len(self._rested) >= MOST_RESTED:
                self._tell_of_rest(sequences, rows)
            return
        if self.session is not None and type(self.session).observe not in (DraftSession.observe, Drafter.observe):
            ids = [sequences.real(row) for row in rows]
            new_tokens = [tokens[len(tokens) - count :] for tokens, count in zip(ids, num_new, strict=True)]
            step = Step(list(rows), tree, [len(nodes) for nodes in accepted], top_tokens, new_tokens)
            self._call("observe", self._context(sequences, rows), step)

    def sources_of(self, row: int, path: Sequence[int]) -> list[tuple[str, ...]]:
        """Who had drafted each token of an accepted path; see `Drafter.sources_of`."""
        if self.drafter is None or not path:
            return [(self.report.drafter,)] * len(path)
        return self._call("sources_of", row, path) or [(self.report.drafter,)] * len(path)

    def _tell_of_rest(self, sequences: Sequences, rows: Sequence[int]) -> None:
        """Tells the drafter of all the steps in which drafting rested, as if one tree had held their tokens."""
        rested, self._rested = self._rested, []
        if not rested:
            return
        count = len(rested)
        top_tokens = np.concatenate([parts[[of.index(row) for row in rows]] for of, parts in rested], 1)
        tokens = np.stack([sequences.real(row)[-count - 1 : -1] for row in rows]).astype(np.int64)
        new_tokens = [sequences.real(row)[-count:] for row in rows]
        parents = np.tile(np.arange(-1, count - 1), (len(rows), 1))
        tree = TokenTree.of_arrays(tokens, parents, np.zeros(tokens.shape, np.float32))
        step = Step(list(rows), tree, [count - 1] * len(rows), top_tokens, new_tokens)
        self._call("observe", self._context(sequences, rows), step)

    def finish(self, sequences: Sequences) -> None:
        """Tells the drafter that the call is over."""
        if self._is_resting and self._rested:
            self._tell_of_rest(sequences, self._rested[-1][0])
        self.hidden_states = None  # rows that ended have none
        context = self._context(sequences, range(len(sequences)))
        self.report.drafter_figures = self._call("figures", context) or {}
        self._call("finish", context)

    def _context(self, sequences: Sequences, rows: Sequence[int]) -> DraftContext:
        return DraftContext(
            rows=list(rows),
            sequences=[sequences.real(row) for row in rows],
            prompt_lengths=[sequences.prompt - sequences.padding[row] for row in rows],
            max_depth=[sequences.room(row) - 1 for row in rows],
            device=sequences.device,
            hidden_states=self.hidden_states.of_rows if self.hidden_states is not None else None,
            sampler=self.sampler,
            is_sampled_from=self.is_sampled_from,
            step_seconds=self._step_seconds(),
            strict=self.strict,
        )

    def _step_seconds(self) -> tuple[Ints, Floats] | None:
        if self.budget is None or self.drafter is None or not self.drafter.needs_step_seconds:
            return None
        return self.budget.step_seconds

    def _call(self, method: str, *args: Any) -> Any:
        if self.drafter is None or (self.session is None and method not in ("kind", "start")):
            return None
        try:
            of = self.drafter if method in ("kind", "start") else self.session
            result = getattr(of, method)(*args)
            if method == "propose":
                context, max_nodes = args
                check_proposal(result, context, max_nodes, self.vocab_size)
            return result
        except Exception as error:
            if self.strict:
                raise
            self.report.drafter_error = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"drafter {self.report.drafter!r} failed in {method}() and is switched off for the rest of this call; "
                f"the output is complete and the same as without it. {self.report.drafter_error}. "
                "Pass strict=True to raise instead.",
                DrafterSwitchedOffWarning,
                stacklevel=2,
            )
            self.drafter = self.session = None
            return None
