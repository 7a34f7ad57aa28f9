"""What merged drafters have learned outlives them, and several threads may learn at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import numpy as np
import torch

import specdec
from specdec.drafters import LookaheadDrafter, MergedDrafter, RecyclingDrafter
from specdec.drafters.merging import known as merge_known
from specdec.tree import TokenTree
from tests.drafters.merging import ScriptedDrafter, context_of, merging, paths_tree, step_of
from tests.tiny_models import new_model, prompts


def test_what_one_drafter_has_learned_the_next_one_of_its_settings_knows() -> None:
    model = new_model("llama")
    made = [MergedDrafter([LookaheadDrafter(), RecyclingDrafter(top_k=k)]) for k in (4, 4, 5)]
    fast = specdec.accelerate(model, made[0], strict=True)
    fast.generate(**prompts(9), max_new_tokens=30, eos_token_id=None)
    for drafter in made[1:]:
        drafter.bind(model)
    first, same, other = (drafter._known[False] for drafter in made)
    assert first.tried.any()
    assert same is first is not other
    assert not made[0]._known[True].tried.any(), "sampled calls are another matter"
    fast.generate(**prompts(9), max_new_tokens=30, eos_token_id=None, do_sample=True)
    assert made[1]._known[True].tried.any()
    made[0].bind(new_model("llama"))
    assert not made[0]._known[False].tried.any()


def test_knowledge_is_kept_by_kind_of_call() -> None:
    drafter, other = (merging(ScriptedDrafter(lambda _: paths_tree(9, {(1,): 0.5}))) for _ in range(2))
    drafter._known[True].tried[1, 0, 3] = 5.0
    merge_known._KNOWN.clear()
    other._known = merge_known.new_known(1)
    other.load_state_dict(drafter.state_dict())
    assert np.array_equal(other._known[True].tried, drafter._known[True].tried)
    assert not other._known[False].tried.any()
    drafter._known[False].record({0: (1, 2.0)}, 3, 4.0)
    other.load_state_dict(drafter.state_dict())
    assert other._known[False].state_dict() == drafter._known[False].state_dict()


def test_calls_of_several_threads_are_kept_apart() -> None:
    """Each call has a session of its own: proposals, figures and credits of one thread are not those of another."""
    lengths = [3, 5, 8, 9]
    sources = [ScriptedDrafter(lambda context: paths_tree(9, {(len(context.sequences[0]),): 0.5})) for _ in range(2)]
    drafter, barrier = merging(*sources), Barrier(len(lengths), timeout=60)

    def call(length: int) -> Any:
        context = context_of([9] * length)
        session = drafter.start(context)
        for _ in range(30):
            barrier.wait()
            tree = session.propose(context, 8)
            barrier.wait()
            assert tree.host_tokens[0].tolist() == [9, length]
            session.observe(context, step_of(tree, [length, 60] if length > 4 else [60]))
        return session.figures(context)["scripted"]["accepted"]

    with ThreadPoolExecutor(len(lengths)) as pool:
        assert list(pool.map(call, lengths)) == [0, 30, 30, 30]


def test_sessions_of_sources_are_those_that_start_returned() -> None:
    class Separate(ScriptedDrafter):
        def start(self, context: Any) -> ScriptedDrafter:
            return ScriptedDrafter(lambda _: paths_tree(9, {(7,): 0.5}))

    session = merging(Separate(lambda _: TokenTree.root_only(torch.tensor([9])))).start(context_of([9]))
    tree = session.propose(context_of([9]), 8)
    assert tree.host_tokens.tolist() == [[9, 7]]
    session.observe(context_of([9, 7, 3]), step_of(tree, [7, 3]))
    assert len(session.sessions[0].steps) == 1  # type: ignore[attr-defined]
