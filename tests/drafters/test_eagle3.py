"""EAGLE-3: what the head reads, what it keeps, and what it drafts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import specdec
from specdec.budget import Budget
from specdec.compat import CACHE
from specdec.drafters import DraftContext, Eagle3Drafter
from specdec.drafters import eagle3 as module
from specdec.drafters.eagle3 import Eagle3Session
from specdec.heads import Eagle3Head
from specdec.passes.hidden_states import HiddenStates
from specdec.tree import TokenTree
from tests.conformance import TaughtEagle3Drafter, assert_identical, random_eagle3, reference
from tests.tiny_models import prompts, tiny_model


class StatesOf:
    """States of whole sequences, by a plain forward of the target."""

    def __init__(self, model: Any, sequences: list[Any]) -> None:
        self.model, self.sequences = model, sequences

    def of_rows(self, layers: Any) -> list[Tensor]:
        found = []
        for ids in self.sequences:
            states = self.model(torch.tensor(ids[None, :-1].astype("int64")), output_hidden_states=True).hidden_states
            found.append(torch.cat([states[layer][0] for layer in layers], -1))
        return found


class Checked(Eagle3Session):
    """Compares each tree with that of a session that has just begun, whose states come from a plain forward."""

    steps = 0
    model: Any = None

    @torch.no_grad()
    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        states: Any = StatesOf(Checked.model, context.sequences)
        fresh = DraftContext(
            context.rows, context.sequences, context.prompt_lengths, context.max_depth, target_states=states
        )
        expected = Eagle3Session(self.drafter, self.head, fresh).propose(fresh, max_nodes)
        tree = super().propose(context, max_nodes)
        assert tree.scores is not None and expected.scores is not None
        assert torch.allclose(tree.scores, expected.scores, atol=1e-4)
        assert tree.tokens.tolist() == expected.tokens.tolist()
        assert tree.parents.tolist() == expected.parents.tolist()
        Checked.steps += 1
        return tree


@pytest.mark.parametrize("shape", [(9,), (9, 4, 7)])
@pytest.mark.parametrize("taught", [False, True])
def test_states_and_cache_are_those_of_a_fresh_encoding(
    shape: tuple[int, ...], taught: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    inputs = prompts(*shape)
    Checked.model, Checked.steps = model, 0
    monkeypatch.setattr(module, "Eagle3Session", Checked)
    monkeypatch.setattr(module, "CHUNK", 4)
    expected = reference(model, inputs, max_new_tokens=24, do_sample=False)
    kind = TaughtEagle3Drafter if taught else Eagle3Drafter
    drafter = kind(random_eagle3(model), max_nodes=16, top_k=3, max_depth=4, least_probability=0.0)
    if taught:
        drafter.answers = expected.answers  # type: ignore[attr-defined]
    fast = specdec.accelerate(model, drafter, strict=True, budget=Budget(16, fixed=True))
    assert fast.generate(**inputs, max_new_tokens=24, do_sample=False).tolist() == expected.ids.tolist()
    assert Checked.steps >= 5
    if taught:
        assert fast.report.num_accepted_tokens > 5


def plain_probabilities(head: Eagle3Head, tokens: list[int], states: Tensor, path: list[int]) -> list[float]:
    """P(token | before) along a path, by the definition: one position at a time over all keys so far."""
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys.append(key)
        values.append(value)
        groups = head.heads // head.kv_heads
        all_keys, all_values = (torch.cat(parts, 2).repeat_interleave(groups, 1) for parts in (keys, values))
        weights = (query @ all_keys.transpose(-1, -2) / head.head_dim**0.5).softmax(-1)
        return weights @ all_values

    found = []
    fused = head.fuse(states)
    state = fused[:0]
    for i, token in enumerate([*tokens[1:], *path]):
        at = fused[i][None, None] if i < len(fused) else state
        state, normed = head(head.embed(torch.tensor([[token]])), at, torch.tensor([[i]]), attend)
        if i >= len(fused) - 1 and len(found) < len(path):
            probs = torch.zeros(head.config.layer.vocab_size)
            probs[head.draft_tokens] = head.lm_head(normed)[0, 0].float().softmax(-1)
            found.append(float(probs[path[len(found)]]))
    return found


@torch.no_grad()
def test_every_node_has_the_probability_that_the_definition_gives() -> None:
    model = tiny_model("llama")
    head = random_eagle3(model, range(3, 60))
    sequence = np.array([5, 9, 33, 21, 7, 50], np.int32)
    states: Any = StatesOf(model, [sequence])
    context = DraftContext([0], [sequence], [5], [8], target_states=states)
    drafter = Eagle3Drafter(head, top_k=3, max_depth=4, least_probability=0.0)
    drafter.bind(model)
    tree = Eagle3Session(drafter, head, context).propose(context, 24)
    assert tree.num_nodes == 24 and int(tree.depths.max()) == 4
    tree.validate(97)
    given = states.of_rows(drafter.needs_layers)[0]
    for node in range(1, 24):
        path, at = [], node
        while at:
            path.insert(0, int(tree.tokens[0, at]))
            at = int(tree.parents[0, at])
        assert plain_probabilities(head, sequence.tolist(), given, path)[-1] == pytest.approx(
            float(tree.scores[0, node]), abs=1e-5
        )
        assert 3 <= path[-1] < 60, "ids of the draft vocabulary are mapped to the target's"


def test_states_are_those_of_hidden_states_whatever_is_committed() -> None:
    model = tiny_model("llama")
    taken = HiddenStates(model, (0, 1))
    ids = torch.tensor([[4, 5, 6, 7]])
    expected = model(ids, output_hidden_states=True).hidden_states
    with torch.no_grad(), taken.taken():
        model(ids)
        taken.keep_prompt()
        assert torch.allclose(taken.of_rows((1,))[0], expected[1][0])
        model(ids)
        taken.keep([[0, 2]])
        assert torch.allclose(taken.of_rows((1, 0))[0], torch.cat([expected[1][0], expected[0][0]], -1)[[0, 2]])
    with pytest.raises(ValueError, match=r"decoder layer 7 of LlamaForCausalLM .* it has 2 layers"):
        HiddenStates(model, (7,))


def test_a_cache_handed_in_is_continued_without_its_states() -> None:
    model = tiny_model("llama")
    inputs = prompts(9)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(**inputs, **kwargs)
    drafter = Eagle3Drafter(random_eagle3(model), max_nodes=16)
    fast = specdec.accelerate(model, drafter, strict=True, budget=Budget(16, fixed=True))
    ids = torch.cat([first.sequences, torch.tensor([[11, 12]])], 1)
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    turn = fast.generate(**inputs, **kwargs)
    out = fast.generate(ids, **{CACHE: turn[CACHE]}, max_new_tokens=12, do_sample=False)
    assert out.tolist() == expected.tolist()
    assert fast.report.num_draft_tokens > 0


def test_a_rejected_branch_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """States of the wrong nodes change drafts, never the output."""
    model = tiny_model("llama")
    right = HiddenStates.keep
    monkeypatch.setattr(HiddenStates, "keep", lambda self, paths: right(self, [list(path)[::-1] for path in paths]))
    assert_identical(
        model, lambda answers: TaughtEagle3Drafter(random_eagle3(model), 16, answers=answers), prompts(9, 5)
    )


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="top_k=0 must be at least 1"):
        Eagle3Drafter(top_k=0)
    with pytest.raises(ValueError, match="least_probability=2 must be between 0 and 1"):
        Eagle3Drafter(least_probability=2)
    with pytest.raises(ValueError, match="no head is given"):
        specdec.accelerate(tiny_model("llama"), "eagle3")
