"""What one source has begun another one may continue, without remembering it, and while it pays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from specdec.drafters import DraftContext, Drafter, LookaheadDrafter, MergedDrafter, RecyclingDrafter, Step
from specdec.drafters.base import supposed
from specdec.drafters.lookahead import LookaheadSession
from specdec.drafters.merging.chain import leaves_of
from specdec.tree import TokenTree
from tests.conformance import TaughtMedusaDrafter, assert_identical, draft_of, lookahead
from tests.drafters.merging import FakeClock, ScriptedDrafter, context_of, merging, paths_of, paths_tree
from tests.tiny_models import prompts, tiny_model


def path(*tokens: int) -> Any:
    return np.array(tokens, np.int32)


@dataclass(eq=False)
class Counting(Drafter):
    """Goes on counting, from tens on only: a drafter without any state."""

    name = "counting"
    is_stateless = True

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        rows = []
        for ids, room in zip(context.sequences, context.max_depth, strict=True):
            last = int(ids[-1])
            rows.append([last, *(range(last + 1, last + 1 + min(4, room, max_nodes - 1)) if last >= 10 else ())])
        scores = [[0.9] * len(row) for row in rows]
        return TokenTree.from_rows(rows, [range(-1, len(row) - 1) for row in rows], scores)


def first_step() -> ScriptedDrafter:
    return ScriptedDrafter(lambda _: paths_tree(9, {(10,): 0.8, (5,): 0.1}), "first step")


def test_one_source_goes_on_behind_the_likeliest_leaf_of_another() -> None:
    drafter = merging(first_step(), Counting())
    context = context_of([3, 9])
    found = paths_of(drafter.propose(context, 16))
    assert set(found) == {(10,), (5,), (10, 11), (10, 11, 12), (10, 11, 12, 13), (10, 11, 12, 13, 14)}
    step = Step([0], paths_tree(9, dict(found)), [3])
    drafter.observe(context_of([3, 9, 10, 11, 12, 60]), step)
    figures = drafter.figures(context)
    assert figures["first step"]["accepted"] == 1, "it has named the leaf"
    assert figures["counting"]["accepted"] == 2, "and the other one what follows"


def test_length_limits_hold_behind_leaves() -> None:
    drafter = merging(first_step(), Counting())
    assert max(map(len, paths_of(drafter.propose(context_of([9], room=2), 16)))) == 2


def test_chaining_can_be_left_out() -> None:
    drafter = merging(first_step(), Counting(), chained=False)
    assert set(paths_of(drafter.propose(context_of([9]), 16))) == {(10,), (5,)}


def test_continuing_that_does_not_pay_is_hardly_done() -> None:
    drafter, clock = merging(first_step(), Counting()), FakeClock()
    asked = []

    class Slow(Counting):
        def extend(self, *args: Any) -> TokenTree | None:
            asked.append(1)
            clock.now += 1.0
            return super().extend(*args)

    drafter = merging(first_step(), Slow())
    drafter._clock = clock

    def run(right: list[int], steps: int) -> int:
        before = len(asked)
        for _ in range(steps):
            tree = drafter.propose(context_of([9]), 16)
            paths, accepted = paths_of(tree), 0
            while tuple(right[: accepted + 1]) in paths and accepted + 1 < len(right):
                accepted += 1
            clock.now += 10.0
            drafter.observe(context_of([9, *right[: accepted + 1]]), Step([0], tree, [accepted]))
        return len(asked) - before

    assert run([10, 11, 12, 13, 60], 100) == 100, "three more tokens for a tenth of a step"
    run([10, 60], 100)
    assert run([10, 60], 200) < 10


def test_likeliest_leaf_of_each_row() -> None:
    one = paths_tree(9, {(1,): 0.9, (1, 2): 0.5, (4,): 0.4})
    none = paths_tree(9, {(1,): 0.2, (2,): 0.2, (3,): 0.2})
    both = TokenTree(*(torch.cat([getattr(one, n), getattr(none, n)]) for n in ("tokens", "parents", "scores")))
    found = leaves_of(both)
    assert found is not None
    assert [leaf.tolist() for leaf in found] == [[1, 2], []]
    assert leaves_of(none) is None


def test_lookahead_goes_on_as_if_the_path_stood_there_and_forgets_it() -> None:
    text = [*range(3, 40), 50, 51, 3, 4, 5, 60, 61, 7]
    context = context_of(text, text[:-1])
    session = LookaheadSession(LookaheadDrafter(), context)
    before = session.propose(context, 32)
    state = [array.copy() for array in session.requests[0].links]
    ahead = [path(3, 4, 5), path()]
    extended = session.extend(context, ahead, 32)
    expected = LookaheadSession(LookaheadDrafter(), supposed(context, ahead)).propose(supposed(context, ahead), 32)
    assert extended is not None
    assert paths_of(extended) == pytest.approx(paths_of(expected))
    assert paths_of(extended, 1) == {}
    after = list(session.requests[0].links)
    end = session.requests[0].length
    assert np.array_equal(state[0][: end + 1], after[0][: end + 1])
    assert np.array_equal(state[2], after[2]), "hash tables are as they were"
    assert paths_of(session.propose(context, 32)) == paths_of(before)


def test_recycling_goes_on_with_the_leafs_own_list() -> None:
    drafter = RecyclingDrafter(top_k=2, last_list=False)
    drafter.bind(tiny_model())
    assert drafter._table is not None
    drafter._table[5], drafter._table[6] = [6, 7], [8, 9]
    session = drafter.start(context_of([3, 4]))
    found = session.extend(context_of([3, 4], room=4), [path(1, 5)], 8)
    assert found is not None
    assert set(paths_of(found)) == {(6,), (7,), (6, 8), (6, 9)}
    none = session.extend(context_of([3, 4]), [path()], 8)
    assert none is not None


@pytest.mark.parametrize("do_sample", [False, True])
def test_same_tokens_with_continued_paths(do_sample: bool) -> None:
    extended = []

    class WatchingSession(LookaheadSession):
        def extend(self, *args: Any) -> TokenTree | None:
            tree = super().extend(*args)
            extended.append(0 if tree is None else tree.num_nodes)
            return tree

    class Watching(LookaheadDrafter):
        def start(self, context: DraftContext) -> LookaheadSession:
            return WatchingSession(self, context)

    def sources(answers: Any) -> Drafter:
        memory = Watching(shared_bytes=2**20, corpus_bytes=2**20)
        for answer in answers:
            memory.add(answer, scope="shared")
        medusa = TaughtMedusaDrafter(max_nodes=8, answers=answers)
        return MergedDrafter([medusa, memory, RecyclingDrafter(), Counting()])

    for inputs in (prompts(10), prompts(3, 11, 5)):
        assert_identical(tiny_model(), sources, inputs, max_new_tokens=50, do_sample=do_sample)
    assert max(extended) > 1
    assert_identical(tiny_model(), lambda a: MergedDrafter([lookahead(a), Counting()]), prompts(8), max_new_tokens=30)


def test_drafters_that_cannot_go_on_say_so() -> None:
    from specdec.drafters import DraftModelDrafter

    assert DraftModelDrafter(draft_of("llama")).extend(context_of([3]), [path(4)], 8) is None
