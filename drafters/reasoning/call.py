"""SpecReason during one call of `generate`: which rows draft a step, and what becomes of it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from specdec.drafters.base import DraftContext, Step
from specdec.drafters.reasoning.bounds import StepMarks, StepSoFar, TextBytes
from specdec.drafters.reasoning.judge_prompts import Question
from specdec.drafters.reasoning.rows import RowSteps
from specdec.drafters.reasoning.writer import StepDraft, StepWriter, WritingRules
from specdec.drafters.small_model.passes import ChainPasses, DraftPasses, TreePasses
from specdec.drafters.tokenizers.draft_vocabulary import RowTexts, Vocabularies
from specdec.inspection.audit import StepAudit, StepRecord
from specdec.kernels import host_array
from specdec.passes.capability import Capability
from specdec.passes.compiled.passes import CompiledPasses
from specdec.reasoning import DraftedSteps, StepText
from specdec.tree import TokenTree

UNKNOWN_SCORE = 0.5
"""P(accepted | parent accepted) of a node whose drafter gives none, beside others that have one."""


@dataclass(frozen=True)
class StepSettings:
    """What a call goes by: the drafter's settings, and what it knows of the two models.

    Args:
        model: The draft model.
        capability: How it can be run.
        vocabularies: How the two models' tokens go together.
        draft_ends: Tokens with which the draft model ends a text, in its own vocabulary.
        draft_longest: Tokens that the draft model can read.
        target_text: Bytes of the target's tokens.
        target_size: Token ids that the target can take are below.
        target_longest: Tokens that the target can read.
        question: What follows a step that is judged; None if nothing was to be asked.
        marks: What ends steps.
        first_steps: See `SpecReasonDrafter`, as for all that follow.
        token_budget: Generated tokens of reasoning at most; None for no limit.
        forced_end: Tokens that end the reasoning then.
        max_entropy: None for no limit.
        min_confidence: Of exact drafts.
        has_inner: The target's own steps are drafted for too.
        compiled: Runs the draft model's passes, in its place.
    """

    model: Any
    capability: Capability
    vocabularies: Vocabularies
    draft_ends: frozenset[int]
    draft_longest: float
    target_text: TextBytes
    target_size: int
    target_longest: float
    question: Question | None
    marks: StepMarks
    first_steps: int = 0
    token_budget: int | None = None
    forced_end: tuple[int, ...] = ()
    max_entropy: float | None = None
    min_confidence: float = 0.0
    has_inner: bool = False
    compiled: CompiledPasses | None = None


@dataclass
class RowProposal:
    """What one row proposes.

    Args:
        tokens: Draft tokens, a chain.
        scores: P(accepted | parent accepted) of each; empty for a step that is judged.
        question: What follows them.
        is_judged: They are accepted as a whole or not.
        is_forced: They are accepted whatever is said of them.
    """

    tokens: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    question: list[int] = field(default_factory=list)
    is_judged: bool = False
    is_forced: bool = False


class StepCall:
    """The rows' reasoning, and the draft model's part in it.

    Args:
        settings: What to go by.
        context: As the call begins.
    """

    def __init__(self, settings: StepSettings, context: DraftContext) -> None:
        self.settings = settings
        self.audit = StepAudit()
        self.proposals: dict[int, RowProposal] = {}
        self._writer: StepWriter | None = None
        self._is_too_long = False
        now = time.perf_counter()
        self.rows: dict[int, RowSteps] = {}
        records: list[StepRecord] = self.audit.records
        for row, ids, prompt in zip(context.rows, context.sequences, context.prompt_lengths, strict=True):
            steps = RowSteps(row, settings.marks, settings.target_text, settings.first_steps, records, now)
            steps.read_prompt(ids[:prompt].tolist())
            steps.take(ids[prompt:].tolist(), now)
            self.rows[row] = steps

    # --- proposing ---

    def propose(self, context: DraftContext, max_nodes: int) -> list[RowProposal]:
        """What each row proposes by itself; nothing where the target writes."""
        proposals = [RowProposal() for _ in context.rows]
        drafts = [StepDraft(StepSoFar(self.settings.marks), 0) for _ in context.rows]
        for i, row in enumerate(context.rows):
            steps = self.rows[row]
            if self._reasoning_left(steps) < 1 and context.is_judged:
                end = list(self.settings.forced_end[: context.max_depth[i] + 1])
                proposals[i] = RowProposal(end, is_judged=True, is_forced=True)
            elif not steps.must_write:
                drafts[i] = StepDraft(steps.so_far, self._most_tokens(context, i, max_nodes))
        if any(draft.max_tokens > 0 for draft in drafts):
            self._write(context, drafts, proposals)
        self.proposals = dict(zip(context.rows, proposals, strict=True))
        return proposals

    def depths(self, context: DraftContext, proposals: Sequence[RowProposal]) -> list[int]:
        """Draft tokens per row that a drafter for the target's own steps may propose."""
        most = []
        for row, depth, proposal in zip(context.rows, context.max_depth, proposals, strict=True):
            left = self._reasoning_left(self.rows[row]) - 1 if context.is_judged else math.inf
            is_free = not proposal.tokens and (self.rows[row].must_write or context.is_judged)
            most.append(int(max(min(depth, left), 0)) if is_free else 0)
        return most

    def _reasoning_left(self, steps: RowSteps) -> float:
        """Tokens of reasoning that a row may still generate."""
        budget = self.settings.token_budget
        return math.inf if budget is None or steps.has_ended else budget - steps.num_taken

    def _most_tokens(self, context: DraftContext, i: int, max_nodes: int) -> int:
        """Tokens that a row's draft may have."""
        settings, length, depth = self.settings, len(context.sequences[i]), context.max_depth[i]
        if depth < 1:
            return 0
        if not context.is_judged:
            return min(depth, max_nodes - 1)
        steps = self.rows[context.rows[i]]
        room = min(settings.target_longest - length - len(self._question(context, steps)), depth + 1)
        return int(max(min(settings.marks.max_tokens, room, self._reasoning_left(steps)), 0))

    def _question(self, context: DraftContext, steps: RowSteps) -> list[int]:
        question = self.settings.question
        if not context.asks_target or question is None:
            return []
        return question.thinking if steps.is_open else question.bare

    def _write(self, context: DraftContext, drafts: list[StepDraft], proposals: list[RowProposal]) -> None:
        """Lets the draft model write steps, and takes them up as proposals."""
        writer = self._ready_writer(context)
        if writer is not None:
            for draft, read in zip(drafts, writer.texts.tokens, strict=True):
                left = self.settings.draft_longest - len(read)
                draft.max_tokens = int(max(min(draft.max_tokens, left), 0))
            if any(draft.max_tokens > 0 for draft in drafts):
                writer.write(context, drafts)
        for i, draft in enumerate(drafts):
            steps = self.rows[context.rows[i]]
            if steps.must_write or proposals[i].is_forced or context.max_depth[i] < 1:
                continue
            tokens, scores = writer.to_target(i, draft) if writer is not None else ([], [])
            most = self._most_tokens(context, i, 1 + len(tokens))
            count = next((at for at, token in enumerate(tokens) if token >= self.settings.target_size), len(tokens))
            tokens, scores = tokens[: min(count, most)], scores[: min(count, most)]
            if not tokens:
                self._leave(steps, draft, context.is_judged)
                continue
            steps.record.drafted += len(tokens)
            proposals[i] = RowProposal(tokens, scores)
            if context.is_judged:
                question = self._question(context, steps)
                steps.record.question_tokens += len(question)
                proposals[i] = RowProposal(tokens, [], question, is_judged=True)

    def _leave(self, steps: RowSteps, draft: StepDraft, is_judged: bool) -> None:
        """The target writes a step for which there is no draft."""
        if not is_judged and not self.settings.has_inner:
            return
        limit = self.settings.max_entropy
        is_unsure = draft.entropy is not None and limit is not None and draft.entropy > limit
        steps.leave_to_target("draft unsure" if is_unsure else "too long" if self._is_too_long else "no draft")

    def _ready_writer(self, context: DraftContext) -> StepWriter | None:
        """The draft model, brought up to what has been committed; None where that is too long for it."""
        if self._writer is None or not self._writer.fits(context):
            self._writer = self._new_writer(context)
        writer = self._writer
        if writer is not None:
            writer.follow(context)
            self._is_too_long = writer.texts.longest >= self.settings.draft_longest
        return None if self._is_too_long else writer

    def _new_writer(self, context: DraftContext) -> StepWriter | None:
        settings = self.settings
        vocabularies = settings.vocabularies
        if vocabularies.pairs is not None and vocabularies.use == "auto" and context.is_judged:
            vocabularies = replace(vocabularies, use="text")  # a step in the draft model's own words
        vocabulary = vocabularies.of_call(context)
        self._is_too_long = max(map(len, context.sequences)) >= settings.draft_longest
        if vocabulary is None or self._is_too_long:
            return None
        texts = RowTexts(vocabulary, context.sequences)
        self._is_too_long = texts.longest >= settings.draft_longest
        if self._is_too_long:
            return None
        kind: type[DraftPasses] = TreePasses if settings.capability.mode == "tree" else ChainPasses
        piece, ends, size = settings.target_text, context.end_tokens, settings.target_size
        if texts.is_text:
            assert vocabularies.pairs is not None
            piece, ends, size = TextBytes(vocabularies.pairs.draft), settings.draft_ends, vocabularies.draft_size
        elif ends and vocabularies.pairs is None:  # without any, the call goes on whatever is said
            ends = ends | settings.draft_ends
        noise = context.sampler.noise if context.sampler is not None else None
        if noise is not None and noise.vocab and not texts.is_text:
            size = min(size, noise.vocab)
        rules = WritingRules(
            piece=piece,
            ends=ends,
            keeps_ends=not context.is_judged,
            max_entropy=settings.max_entropy,
            least_product=0.0 if context.is_judged else settings.min_confidence,
            is_coupled=not context.is_judged and not texts.is_text,
            processes=context.is_judged,
        )
        return StepWriter(kind(settings.model, settings.capability, settings.compiled), texts, context, rules, size)

    # --- the tree ---

    def tree(
        self, context: DraftContext, proposals: Sequence[RowProposal], inner: TokenTree | None, max_nodes: int
    ) -> TokenTree:
        """The proposals of all rows in one tree.

        Args:
            context: The rows.
            proposals: One per row.
            inner: What the drafter for the target's own steps proposes, of which rows without a draft are taken.
            max_nodes: Nodes at most that it has.
        """
        chains = [[*proposal.tokens, *proposal.question] for proposal in proposals]
        inner = inner.first(max_nodes) if inner is not None else None
        width = 1 + max(map(len, chains))
        free = [i for i, chain in enumerate(chains) if not chain]
        if inner is not None and free:
            width = max(width, inner.num_nodes)
        tokens: NDArray[np.int64] = np.zeros((len(chains), width), np.int64)
        parents: NDArray[np.int64] = np.full((len(chains), width), -1, np.int64)
        scores = np.full((len(chains), width), UNKNOWN_SCORE, np.float32)
        tokens[:, 0] = [int(ids[-1]) for ids in context.sequences]
        for i, (chain, proposal) in enumerate(zip(chains, proposals, strict=True)):
            tokens[i, 1 : 1 + len(chain)] = chain
            parents[i, 1 : 1 + len(chain)] = np.arange(len(chain))
            scores[i, 1 : 1 + len(proposal.scores)] = proposal.scores
        if inner is not None and free:
            used = inner.num_nodes
            tokens[free, :used], parents[free, :used] = host_array(inner.tokens)[free], host_array(inner.parents)[free]
            if inner.scores is not None:
                scores[free, :used] = host_array(inner.scores)[free]
            for i in free:
                steps = self.rows[context.rows[i]]
                if context.is_judged:
                    parents[i, :used] = steps.within_step(tokens[i, :used].tolist(), parents[i, :used].tolist())
        parts = torch.from_numpy(tokens), torch.from_numpy(parents)
        if any(proposal.is_judged for proposal in proposals):
            return TokenTree(*parts, steps=self._drafted_steps(context, proposals))
        return TokenTree(*parts, torch.from_numpy(scores))

    def _drafted_steps(self, context: DraftContext, proposals: Sequence[RowProposal]) -> DraftedSteps:
        texts: list[StepText | None] = []
        for ids, proposal in zip(context.sequences, proposals, strict=True):
            decode = self.settings.target_text.decode
            texts.append(StepText(proposal.tokens, ids, decode) if proposal.is_judged else None)
        return DraftedSteps(
            lengths=tuple(len(proposal.tokens) if proposal.is_judged else 0 for proposal in proposals),
            questions=tuple(len(proposal.question) for proposal in proposals),
            is_forced=tuple(proposal.is_forced for proposal in proposals),
            digits=self.settings.question.digits if self.settings.question is not None else (),
            texts=tuple(texts),
        )

    # --- what became of it ---

    def observe(self, context: DraftContext, step: Step) -> None:
        """Takes in what was committed, and what was said of the steps."""
        now = time.perf_counter()
        for i, (row, ids) in enumerate(zip(context.rows, context.sequences, strict=True)):
            steps, proposal = self.rows[row], self.proposals.get(row, RowProposal())
            new = ids[context.prompt_lengths[i] + steps.num_taken :].tolist()
            verdict = step.verdicts[i] if step.verdicts is not None else None
            if verdict is not None and verdict.accepted:
                steps.take_step(new, now, verdict)
                continue
            if verdict is not None:
                steps.judge(verdict)
            if proposal.tokens:
                steps.record.salvaged += step.accepted[i]
                shown = int((step.tree.host_parents[i] >= 0).sum())
                if verdict is None and step.accepted[i] < shown and self.settings.has_inner:
                    steps.leave_to_target("rejected")
            steps.take(new, now)
        self.proposals = {}

    def finish(self, context: DraftContext) -> None:
        """Ends the steps at hand: the call is over."""
        now = time.perf_counter()
        for row, ids, prompt in zip(context.rows, context.sequences, context.prompt_lengths, strict=True):
            if (steps := self.rows.get(row)) is not None:
                steps.take(ids[prompt + steps.num_taken :].tolist(), now)  # of steps in which drafting rested
                steps.close(now)

    def figures(self) -> dict[str, Any]:
        """What to report."""
        known = self._writer.texts.vocabulary.figures() if self._writer is not None else {}
        return known | self.audit.to_dict()
