"""Drafters that ask for it see the hidden state each row goes on from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.budget import Budget
from specdec.drafters import DraftContext, Drafter, Step
from specdec.tree import TokenTree
from tests.conformance import Answers, OracleDrafter, assert_identical, reference
from tests.tiny_models import new_model, prompts, tiny_model


@dataclass
class Watcher(Drafter):
    """Proposes like an oracle and keeps what it is shown."""

    answers: Answers
    needs_hidden_states = True
    seen: list[tuple[list[int], Tensor]] = field(default_factory=list)
    bound: list[Any] = field(default_factory=list)
    ended_with: list[Tensor | None] = field(default_factory=list)

    def bind(self, model: Any) -> None:
        self.bound.append(model)

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        self._keep(context)
        return OracleDrafter(self.answers, max_nodes=7).propose(context, max_nodes)

    def observe(self, context: DraftContext, step: Step) -> None:
        self._keep(context)

    def finish(self, context: DraftContext) -> None:
        self.ended_with.append(context.hidden_states)

    def _keep(self, context: DraftContext) -> None:
        assert context.hidden_states is not None
        assert len(context.hidden_states) == len(context.rows)
        for sequence, state in zip(context.sequences, context.hidden_states, strict=True):
            self.seen.append((sequence.tolist(), state.clone()))


def hooks_of(model: Any) -> int:
    return len(model.get_output_embeddings()._forward_pre_hooks)


@pytest.mark.parametrize("capability", ["tree", "chain"])
def test_states_are_those_that_the_roots_were_picked_from(capability: str) -> None:
    model = tiny_model("llama")
    inputs = prompts(3, 9, 6)
    expected = reference(model, inputs, max_new_tokens=24, do_sample=False)
    watcher = Watcher(expected.answers)
    assert_identical(model, watcher, inputs, expected=expected, capability=capability, max_new_tokens=24)
    assert len(watcher.seen) > 12
    for sequence, state in watcher.seen:
        whole = model.model(input_ids=torch.tensor([sequence[:-1]])).last_hidden_state[0, -1]
        assert torch.allclose(state, whole, atol=1e-4)
    assert watcher.bound == [model, model]
    assert watcher.ended_with == [None]
    assert hooks_of(model) == 0


def test_hook_goes_when_a_call_fails() -> None:
    model = new_model("gpt2")

    def interrupted(*_: Any) -> TokenTree:
        raise KeyboardInterrupt

    watcher = Watcher([])
    watcher.propose = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        assert_identical(
            model,
            watcher,
            prompts(5),
            budget=Budget(8),
            expected=reference(model, prompts(5), max_new_tokens=4),
            max_new_tokens=4,
        )
    assert hooks_of(model) == 0


def test_nothing_is_hooked_for_other_drafters() -> None:
    model = new_model("gpt2")
    seen: list[int] = []

    class Counter(OracleDrafter):
        def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
            seen.append(hooks_of(model))
            assert context.hidden_states is None
            return super().propose(context, max_nodes)

    assert_identical(model, Counter, prompts(5), max_new_tokens=8)
    assert seen
    assert set(seen) == {0}
