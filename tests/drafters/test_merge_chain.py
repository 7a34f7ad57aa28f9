"""What one source has begun another one may continue, without remembering it, and while it pays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from specdec.drafters import DraftContext, Drafter, LookaheadDrafter, MergedDrafter, RecyclingDrafter
from specdec.drafters.base import supposed
from specdec.drafters.lookahead import LookaheadSession
from specdec.tree import TokenTree
from tests.conformance import TaughtMedusaDrafter, assert_identical, draft_of, lookahead
from tests.drafters.merging import ScriptedDrafter, context_of, paths_of, paths_tree, session_of, step_of
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
    session = session_of(first_step(), Counting())
    context = context_of([3, 9])
    found = paths_of(session.propose(context, 16))
    assert set(found) == {(10,), (5,), (10, 11), (10, 11, 12), (10, 11, 12, 13), (10, 11, 12, 13, 14)}
    step = step_of(paths_tree(9, dict(found)), [10, 11, 12, 60])
    session.observe(context_of([3, 9, 10, 11, 12, 60]), step)
    figures = session.figures(context)
    assert figures["first step"]["accepted"] == 1, "it has named the leaf"
    assert figures["counting"]["accepted"] == 2, "and the other one what follows"


def test_length_limits_hold_behind_leaves() -> None:
    session = session_of(first_step(), Counting())
    assert max(map(len, paths_of(session.propose(context_of([9], room=2), 16)))) == 2


def test_chaining_can_be_left_out() -> None:
    session = session_of(first_step(), Counting(), chained=False)
    assert set(paths_of(session.propose(context_of([9]), 16))) == {(10,), (5,)}


def test_each_row_is_continued_from_its_likeliest_leaf_if_that_is_likely() -> None:
    tree = TokenTree.from_rows(
        [[9, 10, 11, 20], [8, 12, 13, 14]],
        [[-1, 0, 1, 0], [-1, 0, 0, 0]],
        [[0.0, 0.9, 0.5, 0.4], [0.0, 0.2, 0.2, 0.2]],
    )
    asked: list[list[list[int]]] = []

    class Watching(Counting):
        def extend(self, context: DraftContext, paths: Any, max_nodes: int) -> TokenTree | None:
            asked.append([path.tolist() for path in paths])
            return super().extend(context, paths, max_nodes)

    session = session_of(ScriptedDrafter(lambda _: tree), Watching())
    found = session.propose(context_of([9], [8]), 16)
    assert asked == [[[10, 11], []]]
    assert (10, 11, 12, 13, 14, 15) in paths_of(found)
    assert set(paths_of(found, 1)) == {(12,), (13,), (14,)}


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
