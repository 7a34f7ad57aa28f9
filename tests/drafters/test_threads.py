"""One drafter in several calls at once: each call has a session of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import specdec
from specdec.budget import Budget
from specdec.drafters import DraftContext, Drafter, LookaheadDrafter, RecyclingDrafter, Step
from specdec.tree import TokenTree
from tests.conformance import RandomMedusaDrafter
from tests.tiny_models import prompts, tiny_model

DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "lookahead": LookaheadDrafter,
    "recycling": RecyclingDrafter,
    "medusa": RandomMedusaDrafter,
}


@pytest.mark.parametrize("name", DRAFTERS)
def test_one_wrapper_serves_three_threads(name: str) -> None:
    model, kwargs = tiny_model(), {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    batches = [prompts(4 + seed, 11 - seed, seed=seed) for seed in range(4)]
    expected = [model.generate(**batch, **kwargs) for batch in batches]
    fast = specdec.accelerate(model, DRAFTERS[name](), budget=Budget(16, fixed=True), strict=True)

    def work(thread: int) -> None:
        for call in range(16):
            at = (thread + call) % len(batches)
            assert torch.equal(fast.generate(**batches[at], **kwargs), expected[at])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert fast.report.num_draft_tokens > 0


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
