"""How well the judges of the test bed tell right steps from wrong ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from chains import Writer, problem_of
from judging import CertaintyJudge
from rich.table import Table
from transformers import PreTrainedModel

from specdec.verifiers import JudgedStep
from specdec.verifiers.judges import Judge, StepText, resolve_judge

RIGHT = 9
"""Points of a right step."""
THRESHOLDS = (3, 5, 7, 9)


@torch.inference_mode()
def judged_steps(
    model: PreTrainedModel, writer: Writer, chains: Iterable[dict[str, Any]]
) -> Iterator[tuple[int, JudgedStep]]:
    """The steps of chains, each with its points by the rubric and what the target tells of it."""
    for chain in chains:
        example = writer.of_chain(chain)
        batch = writer.batch([example], writer.size(example))
        logits = model(
            input_ids=batch["ids"], attention_mask=batch["mask"], position_ids=batch["position_ids"], use_cache=False
        ).logits[0]
        start = len(writer.prompt(problem_of(chain)))
        answers = logits[(batch["scores"] >= 0)[0]].softmax(-1)[:, writer.digit_ids]
        for (anchor, points), digit_probs in zip(example.judged, answers, strict=True):
            ids = torch.tensor(example.ids[start:anchor])
            log_probs = logits[start - 1 : anchor - 1].log_softmax(-1).gather(-1, ids[:, None])[:, 0]
            words = StepText(ids.tolist(), example.ids[:start], lambda some: str(writer.tokenizer.decode(list(some))))
            yield points, JudgedStep(ids, log_probs, digit_probs, words)
            start = anchor


def judges_of(tokenizer: Any) -> list[Judge]:
    return [resolve_judge("expectation"), resolve_judge("argmax"), resolve_judge(CertaintyJudge(tokenizer))]


def figures_of(steps: Iterable[tuple[int, JudgedStep]], judges: Iterable[Judge]) -> dict[str, dict[str, float]]:
    """Per judge: how often a right step has a higher score than a wrong one (AUC), and what each threshold keeps."""
    listed = list(steps)
    is_right = torch.tensor([points == RIGHT for points, _ in listed])
    found = {}
    for judge in judges:
        scores = torch.tensor([judge.score(step) for _, step in listed])
        right, wrong = scores[is_right][:, None], scores[~is_right][None]
        figures = {"auc": ((right > wrong).float() + 0.5 * (right == wrong)).mean().item()}
        for threshold in THRESHOLDS:
            kept = scores >= threshold
            figures |= {
                f"sorted as they ought to be at {threshold}": (kept == is_right).float().mean().item(),
                f"right kept at {threshold}": kept[is_right].float().mean().item(),
                f"wrong kept at {threshold}": kept[~is_right].float().mean().item(),
            }
        found[judge.name] = figures
    return found


def table(figures: Mapping[str, Mapping[str, float]], title: str) -> Table:
    out = Table("", title=title, title_justify="left")
    for name in figures:
        out.add_column(name, justify="right")
    for key in next(iter(figures.values())):
        out.add_row(key, *(f"{of[key]:.3f}" if key == "auc" else f"{of[key]:.1%}" for of in figures.values()))
    return out
