"""Steps are kept or rejected as a whole; what is rejected is salvaged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList

from specdec.inspection.audit import StepAudit, StepRecord
from specdec.reasoning import DraftedSteps, StepText
from specdec.report import SpeculationReport
from specdec.rows.sequences import Sequences
from specdec.sampling import Sampler
from specdec.tree import TokenTree
from specdec.verifiers import ExactVerifier, JudgedStep, StepVerifier, quantile_threshold
from specdec.verifiers.judges import ExpectedDigit, resolve_judge

VOCAB = 20
DIGITS = (*((digit,) for digit in range(9)), (9, 19))


def chains(*rows: tuple[list[int], list[int]], **changes: Any) -> TokenTree:
    """One row per step and question, behind the root 11."""
    tokens = [[11, *step, *question] for step, question in rows]
    tree = TokenTree.from_rows(tokens, [range(-1, len(row) - 1) for row in tokens])
    facts: dict[str, Any] = {
        "lengths": tuple(len(step) for step, _ in rows),
        "questions": tuple(len(question) for _, question in rows),
        "is_forced": (False,) * len(rows),
        "digits": DIGITS,
        "texts": tuple(StepText(step, [11], lambda tokens: " ".join(map(str, tokens))) for step, _ in rows),
    }
    return TokenTree(tree.tokens, tree.parents, steps=DraftedSteps(**facts | changes))


def logits_of(tree: TokenTree, picks: list[list[int]], digits: list[dict[int, float]]) -> Tensor:
    """Logits by which the target picks these tokens, and answers with these digits by their probabilities."""
    logits = torch.zeros((*tree.tokens.shape, VOCAB))
    assert tree.steps is not None
    for i, row in enumerate(picks):
        for node, token in enumerate(row):
            logits[i, node, token] = 5.0
        last = tree.steps.lengths[i] + tree.steps.questions[i]
        if digits[i]:
            rest = 1 - sum(digits[i].values())
            probs = torch.full((VOCAB,), 1e-9)
            probs[15] = max(rest, 1e-9)
            for token, prob in digits[i].items():
                probs[token] = prob
            logits[i, last] = probs.log()
    return logits


def sampler(rows: int) -> Sampler:
    return Sampler(LogitsProcessorList(), False, Sequences(torch.full((rows, 1), 11), None, 50))


def verify(tree: TokenTree, logits: Tensor, **settings: Any) -> Any:
    return StepVerifier(**settings).verify(tree, logits, sampler(len(tree.tokens)), range(len(tree.tokens)))


def path(acceptance: Any, row: int) -> tuple[list[int], list[int]]:
    count = int(acceptance.num_accepted[row])
    return acceptance.nodes[row, :count].tolist(), acceptance.tokens[row, : count + 1].tolist()


def test_rows_are_judged_independently_and_rejected_steps_are_salvaged() -> None:
    tree = chains(([12, 13, 14], [16, 17]), ([12, 13, 14, 12], [16, 17]), ([12], [16, 17]))
    picks = [[0, 0, 0, 0], [12, 13, 18, 0], [15, 0]]
    logits = logits_of(tree, picks, [{8: 0.6, 9: 0.3}, {1: 0.9}, {9: 0.5, 19: 0.5}])
    acceptance = verify(tree, logits)
    assert path(acceptance, 0) == ([1, 2], [12, 13, 14])
    assert path(acceptance, 1) == ([1, 2], [12, 13, 18])
    assert path(acceptance, 2) == ([], [12])
    assert [verdict.accepted for verdict in acceptance.verdicts] == [True, False, True]
    assert [verdict.score for verdict in acceptance.verdicts] == pytest.approx([7.5 / 0.9, 1.0, 9.0], abs=1e-3)
    assert [verdict.digit_mass for verdict in acceptance.verdicts] == pytest.approx([0.9, 0.9, 1.0], abs=1e-3)
    expected = logits[0, :3].log_softmax(-1)[[0, 1, 2], [12, 13, 14]].mean()
    assert acceptance.verdicts[0].log_prob == pytest.approx(float(expected))


def test_question_is_never_accepted() -> None:
    tree = chains(([12, 13], [16, 17]))
    acceptance = verify(tree, logits_of(tree, [[12, 13, 16, 17]], [{0: 0.9}]))
    assert path(acceptance, 0) == ([1, 2], [12, 13, 16]), "the whole step is salvaged, and what follows is a pick"


def test_rows_without_a_step_are_verified_exactly() -> None:
    tree = chains(([12, 13, 14], [16]), ([12, 13], []))
    assert tree.steps is not None
    tree = TokenTree(
        tree.tokens,
        tree.parents,
        steps=DraftedSteps((3, 0), (1, 0), (False, False), DIGITS, (tree.steps.texts[0], None)),
    )
    logits = logits_of(tree, [[0, 0, 0], [12, 18]], [{9: 1.0}, {}])
    acceptance = verify(tree, logits)
    assert path(acceptance, 0) == ([1, 2], [12, 13, 14])
    assert path(acceptance, 1) == ([1], [12, 18])
    assert acceptance.verdicts[1] is None


def test_trees_without_steps_are_verified_exactly() -> None:
    tree = TokenTree.from_rows([[11, 12, 13, 14]], [[-1, 0, 0, 2]])
    logits = torch.zeros((1, 4, VOCAB))
    logits[0, 0, 13] = logits[0, 2, 14] = logits[0, 3, 1] = 5.0
    mine, exact = (rule.verify(tree, logits, sampler(1), [0]) for rule in (StepVerifier(), ExactVerifier()))
    assert path(mine, 0) == path(exact, 0) == ([2, 3], [13, 14, 1])
    assert mine.verdicts is None


def test_too_little_digit_mass_rejects() -> None:
    tree = chains(([12, 13], [16]))
    logits = logits_of(tree, [[0, 0]], [{9: 0.4}])
    rejected = verify(tree, logits).verdicts[0]
    assert not rejected.accepted
    assert rejected.score == pytest.approx(9.0, abs=1e-3)
    assert verify(tree, logits, min_digit_mass=0.3).verdicts[0].accepted


def test_argmax_and_expectation_differ() -> None:
    tree = chains(([12, 13], [16]))
    logits = logits_of(tree, [[0, 0]], [{9: 0.4, 2: 0.3, 3: 0.3}])
    assert verify(tree, logits, judge="argmax").verdicts[0].score == 9.0
    assert verify(tree, logits).verdicts[0].score == pytest.approx(5.1, abs=1e-3)


def test_log_prob_needs_no_question() -> None:
    tree = chains(([12, 13], []), digits=())
    logits = logits_of(tree, [[12, 13]], [{}])
    verifier = StepVerifier(threshold=-0.5, judge="log-prob")
    assert not verifier.asks_target
    verdict = verify(tree, logits, threshold=-0.5, judge="log-prob").verdicts[0]
    assert verdict.accepted
    assert verdict.score == verdict.log_prob < 0
    assert verdict.digit_mass is None
    assert not verify(tree, logits, threshold=-0.01, judge="log-prob").verdicts[0].accepted


def test_any_function_is_a_judge() -> None:
    seen: list[JudgedStep] = []

    def reward(step: JudgedStep) -> Tensor:
        seen.append(step)
        return torch.tensor(0.8)

    tree = chains(([12, 13], []))
    verdict = verify(tree, logits_of(tree, [[0]], [{}]), threshold=0.7, judge=reward).verdicts[0]
    assert verdict.accepted
    assert (seen[0].text, seen[0].prefix, seen[0].tokens.tolist()) == ("12 13", "11", [12, 13])
    assert seen[0].log_probs.shape == (2,)
    assert seen[0].digit_probs is None

    reward.asks_target = True  # type: ignore[attr-defined]
    assert StepVerifier(0.7, reward).asks_target
    verify(tree, logits_of(tree, [[0]], [{3: 1.0}]), threshold=0.7, judge=reward)
    digit_probs = seen[1].digit_probs
    assert digit_probs is not None and digit_probs.argmax() == 3


def test_no_number_rejects() -> None:
    tree = chains(([12, 13], []))
    assert (
        not verify(tree, logits_of(tree, [[0]], [{}]), threshold=0.7, judge=lambda step: float("nan"))
        .verdicts[0]
        .accepted
    )


def test_forced_steps_are_kept_unjudged() -> None:
    tree = chains(([12, 13], []), is_forced=(True,))
    acceptance = verify(tree, logits_of(tree, [[0]], [{}]))
    assert path(acceptance, 0) == ([1], [12, 13])
    assert acceptance.verdicts[0].score is None


def test_padding_behind_changes_nothing() -> None:
    tree = chains(([12, 13, 14], [16, 17]))
    logits = logits_of(tree, [[12, 18]], [{2: 1.0}])
    padded = tree.padded_to(16)
    more = torch.nn.functional.pad(logits, (0, 0, 0, 10))
    assert path(verify(padded, more), 0) == path(verify(tree, logits), 0) == ([1], [12, 18])


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
