"""What the tests of SpecReason share: a judge of a known mind, and counts of what goes through a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import specdec
from specdec.budget import Budget
from specdec.drafters import SpecReasonDrafter
from specdec.passes.capability import probe
from specdec.verifiers import JudgedStep, StepVerifier
from tests.conformance import spec_reason
from tests.tiny_models import tiny_model

NO_END: dict[str, Any] = {"thinking_end": None}


def always(step: JudgedStep) -> float:
    """Keeps every step."""
    return 1.0


def never(step: JudgedStep) -> float:
    """Keeps no step."""
    return 0.0


def by_length(step: JudgedStep) -> float:
    """Keeps steps of an even number of tokens."""
    return float(len(step.tokens) % 2 == 0)


def asking(function: Any) -> Any:
    """The same judge, but the target is asked for a digit too."""

    def judge(step: JudgedStep) -> float:
        return function(step)

    judge.asks_target = True  # type: ignore[attr-defined]
    return judge


@dataclass
class Run:
    """A call and what it gave."""

    ids: Tensor
    fast: Any
    new: list[list[int]] = field(default_factory=list)

    @property
    def report(self) -> Any:
        return self.fast.report

    @property
    def records(self) -> list[Any]:
        return self.fast.report.audit.records


def run(
    inputs: dict[str, Tensor],
    judge: Any = always,
    model: Any = None,
    drafter: SpecReasonDrafter | None = None,
    seed: int = 0,
    verifier: Any = None,
    max_new_tokens: int = 40,
    capability: str = "auto",
    settings: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Run:
    """Generates with steps judged by a function, and checks that the audit adds up."""
    model = model if model is not None else tiny_model()
    drafter = drafter or spec_reason(**settings or {})
    verifier = verifier or StepVerifier(0.5, judge)
    budget = Budget(64, fixed=True)
    fast = specdec.accelerate(model, drafter, verifier, strict=True, budget=budget, capability=capability)
    torch.manual_seed(seed)
    out = fast.generate(**inputs, max_new_tokens=max_new_tokens, **kwargs)
    ids = out if isinstance(out, Tensor) else out.sequences
    assert fast.report.guarantee == "approximate"
    assert fast.report.fallback is None
    check_audit(fast.report)
    return Run(ids, fast)


def check_audit(report: Any) -> None:
    """The steps are all of the generated tokens, row by row and without a gap."""
    audit = report.audit
    assert sum(record.tokens for record in audit.records) == report.num_generated_tokens
    for row in {record.row for record in audit.records}:
        end = 0
        for index, record in enumerate(audit.of_row(row)):
            assert (record.index, record.start) == (index, end)
            assert record.end > record.start
            end = record.end
            assert record.seconds >= 0


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Tokens of each pass of a model, as they go through it."""
    passes: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        probe(model)  # which is done anew where hooks have changed
        passes.clear()
        yield passes
    finally:
        hook.remove()


def continued(model: Any, ids: list[int], new_tokens: int) -> list[int]:
    """A model's own greedy text behind a prompt, which it never ends."""
    prompt = torch.tensor([ids])
    kwargs: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
    # With a mask: padding in the midst of a text is a token like any other.
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **kwargs)
    return out[0, len(ids) :].tolist()
