"""The draft model writing reasoning steps, for one call of `generate`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation import logits_process as lp
from transformers.generation.logits_process import LogitsProcessorList

from specdec.drafters.base import DraftContext
from specdec.drafters.reasoning.bounds import StepSoFar
from specdec.drafters.small_model.lists import own_generator
from specdec.drafters.small_model.passes import DraftPasses
from specdec.drafters.tokenizers.draft_vocabulary import RowTexts, TextReader
from specdec.drafters.tokenizers.text_bridge import common_prefix
from specdec.sampling import BATCH_INDEXED, PREFIX, SCORE_ONLY, for_rows

OF_TARGET_TOKENS = (lp.SuppressTokensLogitsProcessor,)
"""Processors of the score-only kind that name tokens: of no meaning to another vocabulary."""


@dataclass
class StepDraft:
    """A row's step as it is written.

    Args:
        so_far: The step, what was committed of it included.
        max_tokens: Tokens that may be drafted, in the draft model's vocabulary; 0 for a row that drafts nothing.
        tokens: Draft tokens, as nodes name them.
        probs: The draft model's probability of each.
        entropy: Of the first token's distribution, in nats; None where nothing was looked at.
        is_done: Nothing is to follow.
    """

    so_far: StepSoFar
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    probs: list[float] = field(default_factory=list)
    entropy: float | None = None
    is_done: bool = False


@dataclass(frozen=True)
class WritingRules:
    """How steps are written in a call.

    Args:
        piece: Bytes of a draft token, as nodes name them.
        ends: Tokens that end a text, as nodes name them.
        keeps_ends: Draft such a token like any other; otherwise a step ends before it.
        max_entropy: Nats of the first token's distribution above which nothing is drafted; None for no limit.
        least_product: A draft ends behind the token that makes the product of the probabilities fall below.
        is_coupled: Under sampling, take the target's own noise; otherwise draw with a generator of the draft's own.
        processes: Apply the call's processors, all that are known to depend on one row's tokens alone.
    """

    piece: Callable[[int], bytes]
    ends: frozenset[int]
    keeps_ends: bool
    max_entropy: float | None
    least_product: float
    is_coupled: bool
    processes: bool


class StepWriter:
    """Keeps the draft model's cache in step with what is committed, and writes a step per row, a token a pass.

    Args:
        passes: The draft model's forwards.
        texts: The rows in its tokens.
        context: As the call begins.
        rules: How to write.
        target_size: Token ids that nodes can hold are below.
    """

    def __init__(
        self, passes: DraftPasses, texts: RowTexts, context: DraftContext, rules: WritingRules, target_size: int
    ) -> None:
        self.passes = passes
        self.texts = texts
        self.rules = rules
        self.target_size = target_size
        self.rows = list(context.rows)
        self._written: list[list[int]] | None = None  # what was fed behind each root, in the order of the passes
        self._processors = self._usable(context)
        self._generator: torch.Generator | None = None
        self.passes.prefill([tokens[:-1].astype(np.int64) for tokens in texts.tokens], max(context.max_depth) + 1)

    def fits(self, context: DraftContext) -> bool:
        """Whether the context goes on where this call is."""
        return set(context.rows) <= set(self.rows)

    def follow(self, context: DraftContext) -> None:
        """Brings the cache up to what has been committed since: what it has read of that stays."""
        if len(context.rows) < len(self.rows):
            kept = [self.rows.index(row) for row in context.rows]
            self.passes.keep_rows(kept)
            self.texts.keep_rows(kept)
            self.rows = list(context.rows)
            self._written = self._written and [self._written[i] for i in kept]
        readings = self.texts.read(context.sequences)
        if self._written is not None:
            pairs = zip(self._written, readings, strict=True)
            # The last token that was committed is the root: it is fed anew, whether or not it was drafted.
            kept = [min(common_prefix(fed, reading.known), max(len(reading.known) - 1, 0)) for fed, reading in pairs]
            self.passes.commit([range(1 + count) for count in kept])
            self._written = None
        holding = [reading.num_kept for reading in readings]
        if any(length > kept for length, kept in zip(self.passes.lengths, holding, strict=True)):
            self.passes.rollback(holding)

    def write(self, context: DraftContext, drafts: Sequence[StepDraft]) -> None:
        """Writes each row's step to its end, or as far as it may be.

        Args:
            context: The rows; `follow` has brought the cache up to them.
            drafts: One per row; filled.
        """
        pending = zip(self.texts.tokens, self.passes.lengths, strict=True)
        logits = self.passes.feed_pending([tokens[length:].astype(np.int64) for tokens, length in pending])
        self.texts.vocabulary.observe(logits)
        self._written = [[] for _ in drafts]
        for draft in drafts:
            draft.is_done = draft.max_tokens < 1
        self._look_at_entropy(logits, drafts)
        while True:
            self._add_tokens(logits, context, drafts)
            open_rows = np.array([not draft.is_done for draft in drafts])
            if not open_rows.any():
                return
            last = [draft.tokens[-1] if draft.tokens else 0 for draft in drafts]
            for fed, token, is_open in zip(self._written, last, open_rows, strict=True):
                if is_open:
                    fed.append(token)
            fed_tokens = self.texts.vocabulary.draft_tokens(torch.tensor(last)).clamp(min=0).numpy()
            parents = np.where(open_rows, self.passes.num_fed - 1, -1)[:, None]
            logits = self.passes.feed_level(fed_tokens[:, None], parents)[:, 0]

    def to_target(self, i: int, draft: StepDraft) -> tuple[list[int], list[float]]:
        """A row's draft in the target's tokens, with the probability of each."""
        if not self.texts.is_text:
            return draft.tokens, draft.probs
        reader = self.texts.readers[i]
        assert isinstance(reader, TextReader)
        chain = reader.to_target(draft.tokens)
        starts = [0, *chain.ends]
        probs = [float(np.prod(draft.probs[starts[at] : end])) for at, end in enumerate(chain.ends)]
        return chain.tokens, probs

    # --- a token ---

    def _add_tokens(self, logits: Tensor, context: DraftContext, drafts: Sequence[StepDraft]) -> None:
        """Picks the next token of each row that goes on. `logits`: `[rows, draft_vocab]`."""
        rows = [i for i, draft in enumerate(drafts) if not draft.is_done]
        if not rows:
            return
        tokens, probs = self._pick(logits[rows], context, rows, drafts)
        for i, token, prob in zip(rows, tokens, probs, strict=True):
            draft = drafts[i]
            if prob <= 0 or (token in self.rules.ends and not self.rules.keeps_ends):
                draft.is_done = True
                continue
            draft.tokens.append(token)
            draft.probs.append(prob)
            draft.so_far, bound = draft.so_far.add(self.rules.piece(token))
            is_doubtful = math.prod(draft.probs) < self.rules.least_product
            is_last = bool(bound) or token in self.rules.ends or is_doubtful
            draft.is_done = is_last or len(draft.tokens) >= draft.max_tokens

    def _pick(
        self, logits: Tensor, context: DraftContext, rows: Sequence[int], drafts: Sequence[StepDraft]
    ) -> tuple[list[int], list[float]]:
        """A token per row, and its probability."""
        scores = self.texts.vocabulary.to_nodes(logits, self.target_size).float()
        scores = self._processed(scores, context, rows, drafts)
        probs = keys = torch.softmax(scores, dim=-1)
        noise = context.sampler.noise if context.sampler is not None else None
        if noise is not None and context.sampler is not None:
            if self.rules.is_coupled:
                sequences = context.sampler.sequences
                places = [(sequences.num_generated(context.rows[i]) + len(drafts[i].tokens), i) for i in rows]
                draws = torch.stack([noise.at(place, context.rows[i])[: probs.shape[-1]] for place, i in places])
                keys = probs[:, : draws.shape[-1]] / draws.to(probs.device)
            else:
                self._generator = self._generator or own_generator(probs.device)
                keys = probs / torch.empty_like(probs).exponential_(generator=self._generator)
        tokens = keys.argmax(-1)
        return tokens.tolist(), probs.gather(1, tokens[:, None])[:, 0].tolist()

    def _processed(
        self, scores: Tensor, context: DraftContext, rows: Sequence[int], drafts: Sequence[StepDraft]
    ) -> Tensor:
        """Scores as the call's processors leave them, each row's by its own tokens. `scores`: `[rows, vocab]`."""
        if not self._processors:
            return scores
        if {type(p) for p in self._processors} <= SCORE_ONLY:
            processed: Tensor = self._processors(None, scores)
            return processed
        assert context.sampler is not None
        sequences, out = context.sampler.sequences, []
        for at, i in enumerate(rows):
            ids = sequences.prefixes([context.rows[i]], [drafts[i].tokens]).to(scores.device)
            processors = for_rows(self._processors, [context.rows[i]], len(sequences))
            out.append(processors(ids, scores[at : at + 1].clone()))
        return torch.cat(out)

    def _usable(self, context: DraftContext) -> Any:
        """The processors of the call that can be applied to a draft."""
        usable = LogitsProcessorList()
        if context.sampler is None:
            return usable
        kinds = SCORE_ONLY | PREFIX | BATCH_INDEXED.keys() if self.rules.processes else SCORE_ONLY
        for processor in context.sampler.processors:
            is_foreign = self.texts.is_text and (
                type(processor) not in SCORE_ONLY or isinstance(processor, OF_TARGET_TOKENS)
            )
            if type(processor) in kinds and not is_foreign:
                usable.append(processor)
        return usable

    def _look_at_entropy(self, logits: Tensor, drafts: Sequence[StepDraft]) -> None:
        """Ends drafts of which the draft model does not know how to begin."""
        if self.rules.max_entropy is None:
            return
        entropies = torch.special.entr(logits.float().softmax(-1)).sum(-1).tolist()
        for draft, entropy in zip(drafts, entropies, strict=True):
            if not draft.is_done:
                draft.entropy = entropy
                draft.is_done = entropy > self.rules.max_entropy
