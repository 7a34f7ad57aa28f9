"""SpecReason's loop: the draft model writes a step, the target judges it, and writes it itself where it is rejected."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import EosTokenCriteria, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specdec.call import Call
from specdec.compat import CACHE, eos_tokens, pad_token
from specdec.drafters.base import Drafter, DrafterSwitchedOffWarning
from specdec.drafters.reasoning.bounds import Bound, StepEnd, StepSoFar
from specdec.drafters.reasoning.judge_prompts import has_ended_thinking, is_thinking
from specdec.drafters.reasoning.settings import StepSettings
from specdec.drafters.reasoning.writer import StepWriter
from specdec.inspection.audit import StepAudit, StepRecord
from specdec.inspection.trace import Trace
from specdec.report import SpeculationReport
from specdec.rows.sequences import Sequences
from specdec.rows.stopping import StopRule
from specdec.rows.streaming import StreamFeeder
from specdec.sampling import for_rows
from specdec.session import Session
from specdec.verifiers.exact import ExactVerifier
from specdec.verifiers.judges import StepText
from specdec.verifiers.step import StepVerifier


class StepCall:
    """One call of `generate` with a step verifier.

    Args:
        speculation: What decodes; with another drafter and the exact verifier it writes the target's own tokens.
        settings: How steps are written.
        drafter: Of the target's own tokens.
        call: As transformers prepared it.
    """

    def __init__(self, speculation: Any, settings: StepSettings, drafter: Drafter | None, call: Call) -> None:
        self.speculation, self.settings, self.drafter, self.call = speculation, settings, drafter, call
        self.report: SpeculationReport = speculation.report
        self.audit = StepAudit()
        self.streamer = call.streamer if call.batch == 1 else None
        self.scores: list[list[tuple[Tensor, Tensor]]] = []

    def run(self) -> Any:
        """Generates row after row; returns what `generate` would."""
        call, config, report = self.call, self.call.config, self.report
        capability, pad = report.capability, pad_token(config)
        sequences = Sequences(call.input_ids, call.model_kwargs.get("attention_mask"), config.max_length)
        feeder = StreamFeeder(call.streamer, sequences, pad)
        if call.is_traced:
            prompts = [sequences.real(row).tolist() for row in range(call.batch)]
            report.trace = Trace(prompts, f"{report.drafter}, verifier {report.verifier}", report.guarantee)
        try:
            for row in range(call.batch):
                loop = RowLoop(self, row, sequences)
                loop.run()
        finally:
            vocabulary = "shared" if self.settings.vocabularies.pairs is None else "text"
            report.drafter_figures = {"vocabulary": vocabulary} | self.audit.to_dict()
            report.num_generated_tokens = sum(map(sequences.num_generated, range(call.batch)))
            report.capability, report.fallback = capability, None
        if self.streamer is None:
            feeder.feed([])
        feeder.end()
        output = sequences.output(pad)
        if not config.return_dict_in_generate:
            return output
        fields: dict[str, Any] = {"sequences": output, CACHE: loop.target.cache() if call.batch == 1 else None}
        if call.keeps_scores:
            for index, name in enumerate(("scores", "logits")):
                fields[name] = self._by_position(index) if getattr(config, f"output_{name}") else None
        return GenerateDecoderOnlyOutput(**fields)

    def _by_position(self, index: int) -> tuple[Tensor, ...]:
        """Scores or logits per generated position, `[batch, vocab]` each; zeros where a row had ended."""
        empty = torch.zeros_like(self.scores[0][0][index])
        longest = max(map(len, self.scores))
        return tuple(
            torch.stack([row[t][index] if t < len(row) else empty for row in self.scores]) for t in range(longest)
        )

    def decoding(self, drafter: Drafter | None, **changes: Any) -> Any:
        """The exact decoding method with another drafter."""
        settings = replace(self.speculation.settings, drafter=drafter, verifier=ExactVerifier(), **changes)
        decoding = type(self.speculation)(settings)
        decoding.warns = False
        return decoding

    def generate_with(
        self, decoding: Any, model: Any, config: GenerationConfig, processors: LogitsProcessorList, streamer: Any = None
    ) -> Callable[..., Any]:
        """What a session calls as `generate`: decodes with processors that stay those of the whole call.

        Args:
            decoding: From `decoding`.
            model: The target or the draft model.
            config: The settings.
            processors: Of the call's first prompt.
            streamer: Takes tokens as they come.
        """
        config = copy.deepcopy(config)
        config.max_length = config.stop_strings = config.max_time = None

        def decode(model: Any, input_ids: Tensor, **kwargs: Any) -> Any:
            if config.eos_token_id is None:  # where transformers puts the model's own
                others = [c for c in kwargs["stopping_criteria"] if type(c) is not EosTokenCriteria]
                kwargs["stopping_criteria"] = StoppingCriteriaList(others)
            kwargs |= {"logits_processor": processors, "streamer": streamer, "trace": self.call.is_traced}
            return decoding(model, input_ids, **kwargs)

        def generate(**kwargs: Any) -> Any:
            kwargs |= {"stopping_criteria": kwargs.get("stopping_criteria") or StoppingCriteriaList()}
            return model.generate(generation_config=config, custom_generate=decode, **kwargs)

        return generate


class RowLoop:
    """The reasoning of one row.

    Args:
        steps: The call.
        row: Index in the batch.
        sequences: Of the batch.
    """

    def __init__(self, steps: StepCall, row: int, sequences: Sequences) -> None:
        call = steps.call
        self.steps, self.row, self.sequences, self.settings = steps, row, sequences, steps.settings
        self.report, self.keeps_scores = steps.report, call.keeps_scores
        self.stop = StopRule(call.criteria, sequences)
        self.verifier: StepVerifier = steps.speculation.verifier
        self.processors = for_rows(call.processors, [row], call.batch)
        self.decoding = steps.decoding(steps.drafter)
        streamer = _Tokens(steps.streamer) if steps.streamer is not None else None
        generate = steps.generate_with(self.decoding, call.model, call.config, self.processors, streamer)
        cache = None if call.batch > 1 or sequences.padding[row] else call.model_kwargs.get(CACHE)
        prompt = sequences.real(row).tolist()
        criteria: dict[str, Any] = {"stopping_criteria": self.stop.others} if self.stop.others else {}
        arguments = [prompt], None, cache, self.report
        self.target = Session(call.model, generate, lambda: self.decoding.report, *arguments, **criteria)
        ends = frozenset(eos_tokens(call.config))
        self.writer = StepWriter(steps, self.processors, ends)
        self.is_done = sequences.room(row) < 1
        self.has_ended = has_ended_thinking(self._text(prompt), self.settings.thinking_end)
        steps.scores.append([])

    def run(self) -> None:
        """Generates until the row ends."""
        started, index = time.perf_counter(), 0
        while not self.is_done:
            start = self.sequences.num_generated(self.row)
            record = StepRecord(self.row, index, start=start)
            self.so_far = StepSoFar(self.settings.marks)
            bound = self._step(record, self._reasoning_left())
            new = self.sequences.generated(self.row)[start:].tolist()
            record.end, record.text, index = start + len(new), self._text(new), index + 1
            record.seconds, started = time.perf_counter() - started, time.perf_counter()
            self.steps.audit.records.append(record)
            self.has_ended |= bound == "thinking"

    # --- a step ---

    def _step(self, record: StepRecord, left: int) -> Bound:
        """Writes one step, or the answer; returns what its end ends."""
        if self.has_ended:
            record.kind = "answer"
            return self._by_target(record, "answer", self.sequences.room(self.row))
        if left < 1:
            record.kind, record.author, record.reason = "forced end", "forced", "budget"
            end = list(self.settings.forced_end)
            self._keep(end, self.target.logits([end])[0] if self.keeps_scores else None)
            return "thinking"
        reason, step = "first steps", list[int]()
        if record.index >= self.settings.first_steps:
            step, reason = self._draft(min(left, self._room_for_step()))
        if not step:
            return self._by_target(record, reason, left)
        record.drafted = len(step)
        logits = self._judge(record, step)
        if not record.accepted:
            return self._salvage(record, step, logits, left)
        record.author = "draft"
        kept = self._keep(step, logits)
        self.report.count_accepted(kept)
        self._trace(step[:kept], kept, len(step))
        return "thinking" if self._add(step[:kept], stops=False) == "thinking" else "step"

    def _reasoning_left(self) -> int:
        """Tokens of reasoning that may still be generated."""
        room, budget = self.sequences.room(self.row), self.settings.token_budget
        return room if budget is None else min(room, budget - self.sequences.num_generated(self.row))

    def _room_for_step(self) -> int:
        """Tokens that the target can read behind the text, the question left out."""
        most = self.settings.target_longest - self.sequences.real(self.row).size - len(self._question())
        return int(min(most, self.settings.marks.max_tokens))

    def _question(self) -> list[int]:
        question = self.settings.question
        if question is None or not self.verifier.asks_target:
            return []
        text = self._text(self.sequences.real(self.row).tolist())
        return question.thinking if is_thinking(text, self.settings.thinking_end) else question.bare

    def _draft(self, most: int) -> tuple[list[int], str]:
        """The draft model's step, and why there is none; after an error there is none any more."""
        try:
            with self.report.timed("draft"):
                return self.writer.write(self.target.tokens[0], most)
        except Exception as error:
            if self.steps.speculation.settings.strict:
                raise
            self.writer.is_off = True
            self.report.drafter_error = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"the draft model of {self.report.drafter!r} failed and is switched off for the rest of this row, "
                f"which the target writes. {self.report.drafter_error}. Pass strict=True to raise instead.",
                DrafterSwitchedOffWarning,
                stacklevel=2,
            )
            return [], "draft failed"

    def _judge(self, record: StepRecord, step: list[int]) -> Tensor:
        """Lets the target judge a step in one pass; returns its logits behind the text and each token of the step."""
        report, question = self.report, self._question()
        (logits,) = self.target.logits([[*step, *question]])
        report.num_drafts += 1
        report.num_draft_tokens += len(step)
        record.question_tokens = len(question)
        before = self.sequences.real(self.row).copy()
        words = StepText(step, before, self.settings.target_text.decode)
        digits = self.settings.question.digits if self.settings.question is not None else ()
        with report.timed("verify"):
            verdict = self.verifier.verdict(torch.tensor(step), logits, digits, words)
        record.accepted, record.score = verdict.accepted, verdict.score
        record.digit_mass, record.log_prob = verdict.digit_mass, verdict.log_prob
        return logits[: len(step) + 1]

    def _salvage(self, record: StepRecord, step: list[int], logits: Tensor, left: int) -> Bound:
        """Keeps what the target picks itself behind each token of a rejected step while they agree, and goes on."""
        bound: Bound = ""
        picks: list[int] = []
        for at, token in enumerate(step):
            picks.append(self._pick(logits[at : at + 1]))
            self._keep(picks[-1:])
            bound = self._add(picks[-1:])
            if picks[-1] != token or bound or self.is_done:
                break
        record.salvaged = len(picks) - 1
        self.report.count_accepted(len(picks) - 1)
        self._trace(picks, len(picks) - 1, len(step))
        return bound if bound or self.is_done else self._by_target(record, "rejected", left - len(picks))

    def _by_target(self, record: StepRecord, reason: str, most: int) -> Bound:
        """Lets the target write on, to the end of the step or of the row."""
        record.reason = reason
        if most < 1:
            return ""
        stop = None if record.kind == "answer" else StepEnd(self.so_far, self.settings.target_text)
        length = len(self.target.tokens[0])
        self.target.generate(max_new_tokens=most, stop=stop)
        new = self.target.tokens[0][length:]
        self.target.rollback(len(new))
        if self.keeps_scores:
            # Whichever of the two is not asked for is not looked at either.
            scores = self.target.output.scores or self.target.output.logits
            logits = self.target.output.logits or scores
            self.steps.scores[self.row] += [(s[0], x[0]) for s, x in zip(scores, logits, strict=True)]
        trace, inner = self.report.trace, self.decoding.report.trace
        if trace is not None and inner is not None:
            number = len(trace.passes)
            trace.passes += [replace(made, row=self.row, number=number + made.number) for made in inner.passes]
        self._keep(new, is_new=False)
        return self._add(new)

    # --- tokens ---

    def _keep(self, tokens: list[int], logits: Tensor | None = None, is_new: bool = True) -> int:
        """Commits tokens up to where the row ends; returns how many.

        Args:
            tokens: What follows the text.
            logits: Behind the text and behind each of the tokens, where scores of the tokens are still to be kept.
            is_new: The streamer has not seen them.
        """
        tokens = tokens[: self.sequences.room(self.row)]
        count, self.is_done = self.stop.count(self.row, tokens)
        if logits is not None and self.keeps_scores:
            for at in range(count):
                self._scores(logits[at : at + 1], tokens[:at])
        self.sequences.append(self.row, tokens[:count])
        self.target.feed(tokens[:count])
        if is_new and self.steps.streamer is not None:
            for token in tokens[:count]:
                self.steps.streamer.put(torch.tensor([token]))
        return count

    def _scores(self, logits: Tensor, behind: Sequence[int] = ()) -> Tensor:
        """The target's scores as the processors leave them, `[1, vocab]`, from its logits behind some more tokens."""
        ids = self.sequences.prefixes([self.row], [behind])[:, self.sequences.padding[self.row] :]
        scores: Tensor = self.processors(ids.to(logits.device), logits.float().clone())
        if self.keeps_scores:
            self.steps.scores[self.row].append((scores[0], logits[0].float()))
        return scores

    def _pick(self, logits: Tensor) -> int:
        """The target's own next token, as plain decoding picks it."""
        scores = self._scores(logits)
        if self.steps.call.config.do_sample:
            return int(torch.multinomial(scores.softmax(-1), 1))
        return int(scores.argmax(-1))

    def _add(self, tokens: list[int], stops: bool = True) -> Bound:
        """Takes tokens into the step at hand; returns what they end."""
        found: Bound = ""
        for token in tokens:
            self.so_far, bound = self.so_far.add(self.settings.target_text(token))
            found = "thinking" if "thinking" in (found, bound) else bound
            if found and stops:
                break
        return found

    def _trace(self, tokens: list[int], drafted: int, checked: int) -> None:
        if self.report.trace is not None:
            sources = [(self.report.drafter,)] * drafted
            self.report.trace.add_pass([self.row], [tokens], [sources], [checked])

    def _text(self, tokens: list[int]) -> str:
        return self.settings.target_text.decode(tokens)


class _Tokens:
    """Hands tokens on to a streamer that goes on after the call."""

    def __init__(self, streamer: Any) -> None:
        self.put = streamer.put

    def end(self) -> None:
        """The text goes on."""
