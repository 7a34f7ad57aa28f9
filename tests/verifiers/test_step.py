"""Steps are kept or rejected as a whole, by a score that one pass of the target tells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList

from specdec.inspection.audit import StepAudit, StepRecord
from specdec.report import SpeculationReport
from specdec.rows.sequences import Sequences
from specdec.sampling import Sampler
from specdec.tree import TokenTree
from specdec.verifiers import ExactVerifier, JudgedStep, StepVerifier, quantile_threshold
from specdec.verifiers.judges import ExpectedDigit, StepText, resolve_judge
from specdec.verifiers.step import Verdict

VOCAB = 20
DIGITS = (*((digit,) for digit in range(9)), (9, 19))
STEP = [12, 13]


def logits_of(digits: dict[int, float] | None = None, picks: tuple[int, ...] = ()) -> Tensor:
    """The target's logits: it picks these tokens, and answers with these digits by their probabilities."""
    logits = torch.zeros((len(STEP) + 1 + (digits is not None), VOCAB))
    for place, token in enumerate(picks):
        logits[place, token] = 5.0
    if digits is not None:
        probs = torch.full((VOCAB,), 1e-9)
        probs[15] = max(1 - sum(digits.values()), 1e-9)
        for token, prob in digits.items():
            probs[token] = prob
        logits[-1] = probs.log()
    return logits


def verdict(logits: Tensor, **settings: Any) -> Verdict:
    words = StepText(STEP, [11], lambda tokens: " ".join(map(str, tokens)))
    return StepVerifier(**settings).verdict(torch.tensor(STEP), logits, DIGITS, words)


@pytest.mark.parametrize(
    ("digits", "accepted", "score", "mass"),
    [
        ({8: 0.6, 9: 0.3}, True, 7.5 / 0.9, 0.9),
        ({1: 0.9}, False, 1.0, 0.9),
        ({9: 0.5, 19: 0.5}, True, 9.0, 1.0),
    ],
)
def test_the_score_is_the_expected_digit(digits: dict[int, float], accepted: bool, score: float, mass: float) -> None:
    logits = logits_of(digits, (12, 3))
    found = verdict(logits)
    assert found.accepted == accepted
    assert (found.score, found.digit_mass) == (pytest.approx(score, abs=1e-3), pytest.approx(mass, abs=1e-3))
    assert found.log_prob == pytest.approx(float(logits[:2].log_softmax(-1)[[0, 1], STEP].mean()))


def test_trees_of_tokens_are_verified_exactly() -> None:
    tree = TokenTree.from_rows([[11, 12, 13, 14]], [[-1, 0, 0, 2]])
    logits = torch.zeros((1, 4, VOCAB))
    logits[0, 0, 13] = logits[0, 2, 14] = logits[0, 3, 1] = 5.0
    for rule in (StepVerifier(), ExactVerifier()):
        sampler = Sampler(LogitsProcessorList(), False, Sequences(torch.full((1, 1), 11), None, 50))
        acceptance = rule.verify(tree, logits, sampler, [0])
        assert int(acceptance.num_accepted[0]) == 2
        assert acceptance.tokens[0, :3].tolist() == [13, 14, 1]


def test_too_little_digit_mass_rejects() -> None:
    rejected = verdict(logits_of({9: 0.4}))
    assert not rejected.accepted
    assert rejected.score == pytest.approx(9.0, abs=1e-3)
    assert verdict(logits_of({9: 0.4}), min_digit_mass=0.3).accepted


def test_argmax_and_expectation_differ() -> None:
    logits = logits_of({9: 0.4, 2: 0.3, 3: 0.3})
    assert verdict(logits, judge="argmax").score == 9.0
    assert verdict(logits).score == pytest.approx(5.1, abs=1e-3)


def test_log_prob_needs_no_question() -> None:
    assert not StepVerifier(threshold=-0.5, judge="log-prob").asks_target
    found = verdict(logits_of(picks=(12, 13)), threshold=-0.5, judge="log-prob")
    assert found.accepted
    assert found.score == found.log_prob < 0
    assert found.digit_mass is None
    assert not verdict(logits_of(picks=(12, 13)), threshold=-0.01, judge="log-prob").accepted


def test_any_function_is_a_judge() -> None:
    seen: list[JudgedStep] = []

    def reward(step: JudgedStep) -> Tensor:
        seen.append(step)
        return torch.tensor(0.8)

    assert verdict(logits_of(), threshold=0.7, judge=reward).accepted
    assert (seen[0].text, seen[0].prefix, seen[0].tokens.tolist()) == ("12 13", "11", STEP)
    assert seen[0].log_probs.shape == (2,)
    assert seen[0].digit_probs is None

    reward.asks_target = True  # type: ignore[attr-defined]
    assert StepVerifier(0.7, reward).asks_target
    verdict(logits_of({3: 1.0}), threshold=0.7, judge=reward)
    digit_probs = seen[1].digit_probs
    assert digit_probs is not None and digit_probs.argmax() == 3


def test_no_number_rejects() -> None:
    assert not verdict(logits_of(), threshold=0.7, judge=lambda step: float("nan")).accepted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 10}, "judge 'expectation' gives, which are 0 to 9"),
        ({"judge": "log-prob"}, "threshold=7.0 .* at most 0"),
        ({"judge": "vibes"}, "judge='vibes' is not known; use one of 'expectation', 'argmax', 'log-prob'"),
        ({"min_digit_mass": 2}, "min_digit_mass=2 must be from 0 to 1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepVerifier(**settings)


@pytest.mark.parametrize("judge", [3, ExpectedDigit])
def test_what_is_no_judge(judge: Any) -> None:
    with pytest.raises(TypeError, match="judge"):
        resolve_judge(judge)


def test_threshold_is_a_quantile_of_scores() -> None:
    scores = [float(score) for score in range(10)]
    for keep in (0.0, 0.1, 0.5, 0.8, 1.0):
        threshold = quantile_threshold(scores, keep)
        kept = sum(score >= threshold for score in scores) / len(scores)
        assert keep <= kept <= keep + 0.11
    report = SpeculationReport()
    records = [StepRecord(0, i, score=score, accepted=True) for i, score in enumerate(scores)]
    report.drafter_figures = StepAudit([*records, StepRecord(0, 10)]).to_dict()
    assert quantile_threshold([report], 0.5) == quantile_threshold(scores, 0.5)


@pytest.mark.parametrize(("scores", "keep"), [([], 0.5), ([SpeculationReport()], 0.5), ([1.0], 1.5)])
def test_no_threshold_out_of_nothing(scores: Any, keep: float) -> None:
    with pytest.raises(ValueError, match=r"scores|keep"):
        quantile_threshold(scores, keep)
