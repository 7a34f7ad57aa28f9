"""The loop's side of a drafter: its context, and what happens when it fails."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.budget import Budget
from specdec.drafters.base import DraftContext, Drafter, DrafterSwitchedOffWarning, DraftSession, Step, check_proposal
from specdec.kernels import Ints, host_array, largest_at
from specdec.passes.hidden_states import HiddenStates
from specdec.report import SpeculationReport
from specdec.rows.sequences import Sequences
from specdec.sampling import Sampler
from specdec.tree import TokenTree

__all__ = ["CallFacts", "DrafterSwitchedOffWarning", "GuardedDrafter"]

RANKED_NODES = 16
"""First nodes of a tree whose top tokens are looked up on a CPU even where they are not accepted; raise it for drafters
to learn from more nodes, at the cost of a pass over the vocabulary for each."""


@dataclass(frozen=True)
class CallFacts:
    """What a drafter may know of a call, the same for all its steps.

    Args:
        vocab_size: Draft tokens must be below.
        strict: Raise a drafter's errors.
        num_top_tokens: How many of the target's likeliest tokens the drafter wants to know per node.
        hidden_states: The target's, for a drafter that needs them.
        sampler: How the target's tokens are picked.
        is_sampled_from: See `DraftContext`.
    """

    vocab_size: int
    strict: bool = False
    num_top_tokens: int = 0
    hidden_states: HiddenStates | None = None
    sampler: Sampler | None = None
    is_sampled_from: bool = False


class GuardedDrafter:
    """Calls a drafter, and continues without it after an error.

    Args:
        drafter: None for drafting off.
        report: Takes the error.
        facts: What the drafter may know of the call.
        budget: Knows how long a target pass takes.
    """

    def __init__(
        self, drafter: Drafter | None, report: SpeculationReport, facts: CallFacts, budget: Budget | None = None
    ) -> None:
        self.drafter = drafter
        self.report = report
        self.facts = facts
        self.budget = budget
        self.session: DraftSession | None = None
        self._is_resting = False
        self._has_odd_tokens = False

    def kind(self) -> tuple[Hashable, ...]:
        """See `Drafter.kind`; nothing where there is no drafter."""
        return self._call("kind") or ()

    def start(self, sequences: Sequences, rows: Sequence[int]) -> None:
        """Opens the drafter's session of this call."""
        known = self.facts.vocab_size
        self._has_odd_tokens = any(int(sequences.real(row).max(initial=0)) >= known for row in rows)
        self.session = self._call("start", self._context(sequences, rows))

    def propose(self, sequences: Sequences, rows: Sequence[int], max_nodes: int) -> TokenTree | None:
        """The drafter's tree, or None when there is no draft token in it."""
        self._is_resting = max_nodes == 1
        if self.drafter is None or self._is_resting:
            return None
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
        """Whether there is a drafter that has not failed."""
        return self.drafter is not None

    @property
    def sits_out(self) -> bool:
        """Whether the next step has no draft, whatever comes of this one."""
        return self.drafter is None or (self._is_resting and self.budget is not None and self.budget.rests_next)

    @property
    def num_top_tokens(self) -> int:
        """How many of the target's likeliest tokens the drafter wants to know per node."""
        return self.facts.num_top_tokens if self.drafter is not None else 0

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
        if self.session is not None and type(self.session).observe not in (DraftSession.observe, Drafter.observe):
            texts = [sequences.real(row) for row in rows]
            new_tokens = [ids[len(ids) - count :] for ids, count in zip(texts, num_new, strict=True)]
            step = Step(list(rows), tree, [len(nodes) for nodes in accepted], top_tokens, new_tokens)
            self._call("observe", self._context(sequences, rows), step)

    def sources_of(self, row: int, path: Sequence[int]) -> list[tuple[str, ...]]:
        """Who had drafted each token of an accepted path; see `Drafter.sources_of`."""
        if self.drafter is None or not path:
            return [(self.report.drafter,)] * len(path)
        return self._call("sources_of", row, path) or [(self.report.drafter,)] * len(path)

    def finish(self, sequences: Sequences) -> None:
        """Tells the drafter that the call is over."""
        # Rows that ended have no hidden states.
        context = self._context(sequences, range(len(sequences)), has_ended=True)
        self.report.drafter_figures = self._call("figures", context) or {}
        self._call("finish", context)

    def _without_odd_tokens(self, tree: Any) -> Any:
        """A tree without draft tokens of a meaning of their own, such as pictures of the prompt."""
        if not self._has_odd_tokens or not isinstance(tree, TokenTree):
            return tree
        is_odd = tree.tokens >= self.facts.vocab_size
        is_odd[:, 0] = False
        behind = (tree.ancestor_mask & is_odd[:, None]).any(-1)
        return TokenTree(tree.tokens.masked_fill(is_odd, 0), tree.parents.masked_fill(behind, -1), tree.scores)

    def _context(self, sequences: Sequences, rows: Sequence[int], has_ended: bool = False) -> DraftContext:
        facts, hidden = self.facts, self.facts.hidden_states
        needs_seconds = self.budget is not None and self.drafter is not None and self.drafter.needs_step_seconds
        return DraftContext(
            rows=list(rows),
            sequences=[sequences.real(row) for row in rows],
            prompt_lengths=[sequences.prompt - sequences.padding[row] for row in rows],
            max_depth=[sequences.room(row) - 1 for row in rows],
            device=sequences.device,
            hidden_states=hidden.last() if hidden is not None and not has_ended else None,
            target_states=hidden,
            sampler=facts.sampler,
            is_sampled_from=facts.is_sampled_from,
            step_seconds=self.budget.step_seconds if self.budget is not None and needs_seconds else None,
            strict=facts.strict,
        )

    def _call(self, method: str, *args: Any) -> Any:
        if self.drafter is None or (self.session is None and method not in ("kind", "start")):
            return None
        try:
            of = self.drafter if method in ("kind", "start") else self.session
            result = getattr(of, method)(*args)
            if method == "propose":
                context, max_nodes = args
                result = self._without_odd_tokens(result)
                check_proposal(result, context, max_nodes, self.facts.vocab_size)
            return result
        except Exception as error:
            if self.facts.strict:
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
