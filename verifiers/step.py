"""SpecReason's acceptance of whole reasoning steps: approximate, to be asked for by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.report import SpeculationReport
from specdec.sampling import Sampler
from specdec.tree import TokenTree
from specdec.verifiers.base import Acceptance, Verifier
from specdec.verifiers.exact import ExactVerifier
from specdec.verifiers.judges import Judge, JudgedStep, StepText, resolve_judge


@dataclass(frozen=True)
class Verdict:
    """What was said of a step.

    Args:
        accepted: The step is kept.
        score: What the judge gave.
        digit_mass: Probability of all digits together where a digit was asked for.
        log_prob: Mean log-probability of the step's tokens under the target.
    """

    accepted: bool
    score: float
    digit_mass: float | None = None
    log_prob: float | None = None


@dataclass
class StepVerifier(Verifier):
    """Keeps a drafted reasoning step if the target judges it good enough, word for word as the draft model wrote it.

    "SpecReason: Fast and Accurate Inference-Time Compute via Speculative Reasoning" (arXiv 2504.07891, section 4.1).
    The step, a question about it, and the target's answer to that question take one pass behind the tokens that the kv
    cache holds; only the question is rolled back. Of a step that is not kept, the tokens that the target would have
    picked itself stay, at no cost, and the target goes on from there. What the target writes is verified as by
    `ExactVerifier`.

    The output is **not** the target's: what is kept are the draft model's words. Behind a kept step the target goes on
    exactly as it would behind these words.

    Args:
        threshold: Score from which on a step is kept; 7 of 9 in the paper. Where accuracy matters most, 9 with
            `"argmax"`; an expectation is 9 only where nothing else is likely at all.
        judge: `"expectation"` or `"argmax"` of the digit that answers the question, `"log-prob"`, the mean
            log-probability of the step's tokens, or a function of a `JudgedStep`.
        min_digit_mass: Probability of all digits together below which a judge by digits rejects: the target has not
            answered the question.
    """

    name = "step"
    guarantee = "approximate"
    judges_steps = True

    threshold: float = 7.0
    judge: str | Judge | Callable[[JudgedStep], Any] = "expectation"
    min_digit_mass: float = 0.5

    def __post_init__(self) -> None:
        judge = resolve_judge(self.judge)
        if not judge.lowest <= self.threshold <= judge.highest:
            allowed = (
                f"{judge.lowest:g} to {judge.highest:g}" if judge.lowest > -np.inf else f"at most {judge.highest:g}"
            )
            raise ValueError(
                f"threshold={self.threshold} is no score that judge {judge.name!r} gives, which are {allowed}; set one "
                "of these, or take one from scores that were seen with specdec.verifiers.quantile_threshold"
            )
        if not 0 <= self.min_digit_mass <= 1:
            raise ValueError(f"min_digit_mass={self.min_digit_mass} must be from 0 to 1")

    @property
    def asks_target(self) -> bool:
        """Whether a question about the step, to be answered by a digit, is to follow each."""
        return resolve_judge(self.judge).asks_target

    def verify(self, tree: TokenTree, logits: Tensor, sampler: Sampler, rows: Sequence[int]) -> Acceptance:
        """As `ExactVerifier`: drafted tokens are the target's own business."""
        return ExactVerifier().verify(tree, logits, sampler, rows)

    def verdict(
        self,
        tokens: Tensor,
        logits: Tensor,
        digits: Sequence[Sequence[int]] = (),
        words: StepText | None = None,
    ) -> Verdict:
        """Judges a step.

        Args:
            tokens: The step's, `[tokens]`.
            logits: The target's behind the text before the step, behind each token of the step, and behind each of the
                question, if it was asked, `[1 + tokens + question, vocab]`.
            digits: For each of the digits 0 to 9 the tokens that mean it behind the question.
            words: The step in words.
        """
        log_probs = logits[: len(tokens)].float().log_softmax(-1).gather(1, tokens[:, None].to(logits.device))[:, 0]
        judge, digit_probs = resolve_judge(self.judge), None
        if judge.asks_target:
            answer = logits[-1].float().softmax(-1)
            digit_probs = torch.stack([answer[list(of_digit)].sum() for of_digit in digits])
        score = judge.score(JudgedStep(tokens, log_probs, digit_probs, words))
        mass = None if digit_probs is None else float(digit_probs.sum())
        is_answered = mass is None or not judge.needs_digit or mass >= self.min_digit_mass
        return Verdict(is_answered and score >= self.threshold, score, mass, float(log_probs.mean()))


def quantile_threshold(scores: Iterable[float | SpeculationReport], keep: float = 0.8) -> float:
    """The threshold at which a share of the steps of a calibration set would have been kept.

    Generate on the calibration set with a threshold that every step reaches, the judge's lowest score, and hand the
    reports over.

    Args:
        scores: Scores of steps, or reports whose judged steps count.
        keep: Share of the steps to keep.

    Raises:
        ValueError: There are no scores, or `keep` is no share.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep={keep} must be a share from 0 to 1, such as 0.8")
    known: list[float] = []
    for item in scores:
        if not isinstance(item, SpeculationReport):
            known.append(float(item))
        elif item.audit is not None:
            known += [record.score for record in item.audit.records if record.score is not None]
    if not known:
        raise ValueError("scores: no step was judged; generate with drafter=SpecReasonDrafter(...) and a StepVerifier")
    return float(np.quantile(known, 1 - keep, method="lower"))
