"""The draft model's own session, in which it writes reasoning steps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.generation import logits_process as lp
from transformers.generation.logits_process import LogitsProcessorList

from specdec.budget import Budget
from specdec.drafters.reasoning.bounds import StepEnd, StepSoFar, TextBytes
from specdec.drafters.small_model.lists import own_generator
from specdec.drafters.tokenizers.draft_vocabulary import TextReader
from specdec.report import SpeculationReport
from specdec.sampling import BATCH_INDEXED, PREFIX, SCORE_ONLY
from specdec.session import Session

if TYPE_CHECKING:
    from specdec.drafters.reasoning.loop import StepCall

OF_TARGET_TOKENS = (lp.SuppressTokensLogitsProcessor,)
"""Processors of the score-only kind that name tokens: of no meaning to another vocabulary."""


class StepWriter:
    """Writes the steps of one row, in the draft model's own tokens where the vocabularies differ.

    Args:
        call: The call.
        processors: Of the target's row.
        ends: Tokens that end the row.
    """

    def __init__(self, call: StepCall, processors: LogitsProcessorList, ends: frozenset[int]) -> None:
        self.settings, self.config = call.settings, copy.deepcopy(call.call.config)
        self.is_off = False
        settings, pairs = call.settings, call.settings.vocabularies.pairs
        self.reader = None if pairs is None else TextReader(pairs)
        self.text = settings.target_text if pairs is None else TextBytes(pairs.draft)
        self.ends = settings.draft_ends
        if pairs is None:  # without an end of the call's own, the text goes on whatever is written
            self.ends = ends | settings.draft_ends if ends else ends
        own = settings.model.generation_config
        self.config.eos_token_id = list(self.ends) or None
        self.config.pad_token_id = self.config.pad_token_id if pairs is None else own.pad_token_id
        self.config.output_scores = self.config.output_logits = False
        decoding = call.decoding(
            None, budget=Budget(1), compiled=settings.compiled, capability="auto", attention="auto"
        )
        usable = LogitsProcessorList([p for p in processors if self._is_usable(p)])
        self._generate = call.generate_with(decoding, settings.model, self.config, usable)
        self._session: Session | None = None
        self._random_state: torch.Tensor | None = None

    def _is_usable(self, processor: Any) -> bool:
        """Whether a processor of the call means something for a draft."""
        if self.reader is not None:
            return type(processor) in SCORE_ONLY and not isinstance(processor, OF_TARGET_TOKENS)
        return type(processor) in SCORE_ONLY | PREFIX | BATCH_INDEXED.keys()

    def write(self, tokens: list[int], most: int) -> tuple[list[int], str]:
        """Writes the next step.

        Args:
            tokens: The row so far, in the target's tokens.
            most: Tokens that the step may have.

        Returns:
            The step in the target's tokens, and why there is none if there is none.
        """
        settings = self.settings
        own = self._own(tokens)
        left = int(min(most, settings.draft_longest - len(own)))
        if left < 1 or self.is_off:
            return [], "draft failed" if self.is_off else "too long" if most > 0 else "no draft"
        session = self._at(own)
        if settings.max_entropy is not None:
            (logits,) = session.logits([[]])
            if float(torch.special.entr(logits[0].float().softmax(-1)).sum()) > settings.max_entropy:
                return [], "draft unsure"
        with self._own_draws():
            stop = StepEnd(StepSoFar(settings.marks), self.text)
            session.generate(max_new_tokens=left, stop=stop)
        step = session.tokens[0][len(own) :]
        step = step[: next((at for at, token in enumerate(step) if token in self.ends), len(step))]
        if self.reader is not None:
            step = self.reader.to_target(step).tokens
        step = step[: next((at for at, token in enumerate(step) if token >= settings.target_size), len(step))]
        return step[:most], "" if step else "no draft"

    def _own(self, tokens: list[int]) -> list[int]:
        """The row in the draft model's tokens; those that it does not know are its first."""
        if self.reader is not None:
            return [int(token) for token in self.reader.read(np.array(tokens, np.int32)).tokens]
        size = self.settings.vocabularies.draft_size
        return [token if token < size else 0 for token in tokens]

    def _at(self, tokens: list[int]) -> Session:
        """The session with this text."""
        if self._session is None:
            self._session = Session(self.settings.model, self._generate, SpeculationReport, [tokens])
        self._session.replace([tokens])
        return self._session

    @contextmanager
    def _own_draws(self) -> Iterator[None]:
        """Draws from a random state of the draft model's own: the global generator is left as it was."""
        if not self.config.do_sample:
            yield
            return
        device = self.settings.model.device
        module, of = (torch, ()) if device.type == "cpu" else (torch.get_device_module(device), (device,))
        if self._random_state is None:
            self._random_state = own_generator(device).get_state()
        before = module.get_rng_state(*of)
        module.set_rng_state(self._random_state, *of)
        try:
            yield
        finally:
            self._random_state = module.get_rng_state(*of)
            module.set_rng_state(before, *of)
