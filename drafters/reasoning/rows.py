"""The reasoning of a batch's rows, step by step: who writes the next one, and the record of the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from specdec.drafters.reasoning.bounds import StepMarks, StepSoFar, TextBytes
from specdec.drafters.reasoning.judge_prompts import has_ended_thinking, is_thinking, thinking_start
from specdec.inspection.audit import Author, StepRecord
from specdec.reasoning import Verdict


@dataclass
class RowSteps:
    """One row during one call.

    Args:
        row: Index in the batch.
        marks: What ends steps.
        text: Bytes of the target's tokens.
        first_steps: Steps that the target writes at first.
        records: Of the batch; steps are added as they end.
        now: Seconds, as the call begins.
    """

    row: int
    marks: StepMarks
    text: TextBytes
    first_steps: int
    records: list[StepRecord]
    now: float
    num_taken: int = 0
    """Generated tokens so far."""
    num_steps: int = 0
    is_open: bool = False
    """A block of reasoning has been opened and not closed."""
    has_ended: bool = False
    """The reasoning is over: what follows is the answer."""
    must_write: bool = False
    """The target writes the step at hand."""
    _tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.so_far = StepSoFar(self.marks)
        self._begin()

    @property
    def thinking_end(self) -> str | None:
        """Ends the reasoning."""
        return None if self.marks.thinking_end is None else self.marks.thinking_end.decode()

    def read_prompt(self, tokens: Iterable[int]) -> None:
        """Sees whether the prompt has opened the reasoning, or ended it."""
        prompt = self.text.decode(tokens)
        self.is_open = is_thinking(prompt, self.thinking_end)
        self.has_ended = has_ended_thinking(prompt, self.thinking_end)
        self._begin()

    def leave_to_target(self, reason: str) -> None:
        """The target is to write the step at hand."""
        self.must_write = True
        self.record.reason = self.record.reason or reason

    def take(self, tokens: Iterable[int], now: float, author: Author = "target") -> None:
        """Takes in tokens that were committed, and ends steps where they end.

        Args:
            tokens: The new ones.
            now: Seconds.
            author: Whose words they are: of a step, the one who has ended it.
        """
        for token in tokens:
            self.num_taken += 1
            self._tokens.append(token)
            if self.has_ended:
                continue
            self.so_far, bound = self.so_far.add(self.text(token))
            if bound:
                self.record.author = author
                self.has_ended = bound == "thinking"
                self.close(now)

    def take_step(self, tokens: list[int], now: float, verdict: Verdict) -> None:
        """Takes in a step that was kept as it was drafted, and ends it."""
        self.judge(verdict)
        if verdict.score is None:
            self.close(now)
            self.record.kind, self.record.author, self.record.reason = "forced end", "forced", "budget"
            self.num_taken += len(tokens)
            self._tokens = tokens
            self.has_ended = True
            self.close(now)
            return
        self.record.reason = ""
        self.take(tokens, now, "draft")
        if self._tokens:
            self.record.author = "draft"
            self.close(now)

    def within_step(self, tokens: Sequence[int], parents: Sequence[int]) -> list[int]:
        """Parents of a tree for the step at hand, without the tokens that end it and what is behind them.

        The target's own token behind the others then ends the step, and the next step is drafted as a whole: the text
        is the same as without such a tree.

        Args:
            tokens: Of the nodes, the root's first.
            parents: Of the nodes; -1 for the root and for padding.
        """
        kept, so_far = list(parents), {0: self.so_far}
        if self.has_ended:
            return kept
        for node in range(1, len(tokens)):
            if parents[node] not in so_far:
                kept[node] = -1
                continue
            so_far[node], bound = so_far[parents[node]].add(self.text(tokens[node]))
            if bound:
                kept[node] = -1
                del so_far[node]
        return kept

    def judge(self, verdict: Verdict) -> None:
        """Notes what was said of a draft of the step at hand."""
        if verdict.score is None:
            return
        record = self.record
        record.accepted, record.score = verdict.accepted, verdict.score
        record.digit_mass, record.log_prob = verdict.digit_mass, verdict.log_prob
        if not verdict.accepted:
            record.reason = ""
            self.leave_to_target("rejected")

    def close(self, now: float) -> None:
        """Ends the step at hand, if it holds anything, and begins the next."""
        if not self._tokens:
            return
        record = self.record
        record.end, record.text, record.seconds = self.num_taken, self.text.decode(self._tokens), now - self.now
        self.records.append(record)
        self.num_steps += 1
        before = thinking_start(self.thinking_end) if self.is_open else None
        self.is_open = is_thinking((before or "") + record.text, self.thinking_end)
        self.now, self._tokens, self.so_far = now, [], StepSoFar(self.marks)
        self._begin()

    def _begin(self) -> None:
        self.record = StepRecord(self.row, self.num_steps, start=self.num_taken)
        self.must_write = False
        if self.has_ended:
            self.record.kind = "answer"
            self.leave_to_target("answer")
        elif self.num_steps < self.first_steps:
            self.leave_to_target("first steps")
