"""One drafter in several calls at once: each call has a session of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import specdec
from specdec.budget import Budget
from specdec.drafters import AutoDrafter, DraftContext, Drafter, LookaheadDrafter, RecyclingDrafter, Step
from specdec.tree import TokenTree
from tests.conformance import Answers, OracleDrafter, RandomEagle3Drafter, RandomMedusaDrafter, answers_of
from tests.tiny_models import prompts, tiny_model

DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "lookahead": LookaheadDrafter,
    "recycling": RecyclingDrafter,
    "medusa": RandomMedusaDrafter,
}


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("name", [*DRAFTERS, "eagle3", "auto"])
def test_one_wrapper_serves_three_threads(name: str, fixed: bool) -> None:
    model, kwargs = tiny_model(), {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    batches = [prompts(*range(4 + seed, 12 - 2 * seed), seed=seed) for seed in range(3)]  # of 8, 5 and 2 rows
    drafter = RandomEagle3Drafter(max_nodes=8) if name == "eagle3" else DRAFTERS.get(name, AutoDrafter)()
    expected = [model.generate(**batch, **kwargs) for batch in batches]
    fast = specdec.accelerate(model, drafter, budget=Budget(16, fixed=fixed), strict=True)

    def work(thread: int) -> None:
        for call in range(16):
            at = (thread + call) % len(batches)
            assert torch.equal(fast.generate(**batches[at], **kwargs), expected[at])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert fast.report.num_draft_tokens > 0 or not fixed


@pytest.mark.parametrize("name", DRAFTERS)
def test_sessions_side_by_side_do_not_see_each_other(name: str) -> None:
    drafter = DRAFTERS[name]()
    drafter.bind(tiny_model())
    texts = [[*range(3, 20), 60 + call, *range(3, 9 + call)] for call in range(2)]
    hidden = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(0))
    contexts = [
        DraftContext([0], [np.array(text, np.int32)], [len(text)], [50], hidden_states=states)
        for text, states in zip(texts, hidden, strict=True)
    ]
    after = [
        DraftContext([0], [np.array([*text, 7], np.int32)], [len(text)], [49], hidden_states=states)
        for text, states in zip(texts, hidden, strict=True)
    ]
    tops = [np.array([[[7, 30 + call, 40 + call]]]) for call in range(2)]

    def drafted(order: list[int]) -> list[TokenTree]:
        """Both calls step by step, one after the other or side by side."""
        each = drafter.fresh()
        each.bind(tiny_model())
        sessions = {call: each.start(contexts[call]) for call in order}
        for call in order:
            sessions[call].propose(contexts[call], 8)
        for call in order:
            tree = TokenTree.root_only(torch.tensor([texts[call][-1]]))
            step = Step([0], tree, [0], tops[call], new_tokens=[np.array([7], np.int32)])
            sessions[call].observe(after[call], step)
        return [sessions[call].propose(after[call], 8) for call in order]

    alone = [drafted([call])[0] for call in range(2)]
    together = drafted([0, 1])
    for one, other in zip(alone, together, strict=True):
        own = {int(token) for token in one.tokens[0, 1:][one.parents[0, 1:] == 0]}
        assert int(one.tokens[0, 0]) == int(other.tokens[0, 0]) == 7
        if name != "recycling":  # whose table is shared on purpose
            assert own == {int(token) for token in other.tokens[0, 1:][other.parents[0, 1:] == 0]}
        else:
            assert own & {30, 31} == {int(t) for t in other.tokens[0, 1:][other.parents[0, 1:] == 0]} & {30, 31}


class Interrupting(Drafter):
    """Runs another call of the same wrapper while it proposes, as a thread might."""

    name = "interrupting"

    def __init__(self, answers: Answers) -> None:
        self.inner, self.num_calls = OracleDrafter(answers), 0
        self.fast: Any = None

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        self.num_calls += 1
        tree = self.inner.propose(context, max_nodes)
        if self.num_calls == 2:
            self.fast.generate(**prompts(5), max_new_tokens=12, do_sample=False, eos_token_id=None)
        return tree


def test_a_call_in_the_midst_of_another_leaves_its_report_and_budget_alone() -> None:
    model, kwargs = tiny_model(), {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**prompts(4, 9, 7), **kwargs)
    drafter = Interrupting(answers_of(expected, 9, set()))
    fast = drafter.fast = specdec.accelerate(model, drafter, budget=Budget(16, fixed=True), strict=True)
    assert torch.equal(fast.generate(**prompts(4, 9, 7), **kwargs), expected)
    assert drafter.num_calls > 4
    assert fast.report.num_generated_tokens == 3 * 24
    assert fast.report.num_row_passes == 3 * 24 - fast.report.num_accepted_tokens


def test_each_call_counts_what_became_of_its_own_proposal() -> None:
    shared = Budget(8)
    first, second = shared.of_call(), shared.of_call()
    trees = [TokenTree.from_rows([[5, 6]] * rows, [[-1, 0]] * rows, [[0.0, 0.9]] * rows) for rows in (3, 1)]
    for budget, tree in zip((first, second), trees, strict=True):
        budget.begin(tiny_model(), ("test",))
        budget.set_size(len(tree.tokens), 10)
        for nodes in (1, 2, 4, 8):
            budget.record(nodes, 1.0)
        budget.choose(tree)
    first.observe(trees[0], [[1], [], []], [[6, 7], [8], [8]])
    second.observe(trees[1], [[]], [[8]])
    assert first.learned is second.learned
    assert float(first.learned.tried.sum()) == pytest.approx(4, rel=0.1)
    assert float(first.learned.hit.sum()) == pytest.approx(1, rel=0.1)
