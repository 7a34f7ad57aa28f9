"""Token Recycling proposes what the target held likely before, and learns how good that is."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import specdec
from specdec.budget import Budget
from specdec.drafters import DraftContext, RecyclingDrafter, Step
from specdec.drafters.base import DraftSession
from specdec.drafters.recycling import RecyclingSession
from specdec.drafters.trees.recycled_lists import LAST, grow_recycled, keep_lists
from specdec.drafting import RANKED_NODES, CallFacts, GuardedDrafter
from specdec.kernels import largest
from specdec.report import SpeculationReport
from specdec.tree import TokenTree
from tests.conformance import assert_identical, reference
from tests.tiny_models import VOCAB, new_model, prompts, tiny_model

BATCHES = {"single": prompts(12), "padded": prompts(3, 11, 5, 12)}
PROCESSORS: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "temperature": {"temperature": 0.7, "top_k": 0},
    "top-p": {"top_p": 0.8},
    "repetition-penalty": {"repetition_penalty": 1.3},
}


def context_of(*sequences: list[int], rows: list[int] | None = None, room: int = 50) -> DraftContext:
    rows = list(range(len(sequences))) if rows is None else rows
    arrays = [np.array(ids, np.int32) for ids in sequences]
    return DraftContext(rows, arrays, [1] * len(rows), [room] * len(rows))


def bound(**settings: Any) -> RecyclingDrafter:
    drafter = RecyclingDrafter(**settings)
    drafter.bind(tiny_model())
    return drafter


def tops_of(tree: TokenTree, lists: dict[int, list[int]], count: int) -> np.ndarray:
    """What the target ranks first behind each node: a list that is given, or tokens 90, 91, ..."""
    tops = np.empty((*tree.tokens.shape, count), np.int64)
    for row, tokens in enumerate(tree.tokens.tolist()):
        for node, token in enumerate(tokens):
            tops[row, node] = lists.get(token, list(range(90, 90 + count)))
    return tops


def chain(*tokens: int) -> TokenTree:
    return TokenTree.from_rows([tokens], [range(-1, len(tokens) - 1)])


def observe(session: DraftSession, after: DraftContext, tree: TokenTree, accepted: list[int], tops: Any) -> None:
    """Tells a session of a step whose new tokens are the last ones of the context."""
    new_tokens = [ids[len(ids) - 1 - count :] for ids, count in zip(after.sequences, accepted, strict=True)]
    session.observe(after, Step(after.rows, tree, accepted, tops, new_tokens=new_tokens))


def opening(kind: type[RecyclingSession]) -> RecyclingDrafter:
    """A drafter whose sessions are of some kind."""

    class Opening(RecyclingDrafter):
        def start(self, context: DraftContext) -> DraftSession:
            assert self._table is not None
            return kind(self, self._table)

    return Opening()


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("do_sample", [False, True])
def test_same_tokens_as_plain_decoding(batch: str, processor: str, do_sample: bool) -> None:
    kwargs = {"max_new_tokens": 40, "do_sample": do_sample, **PROCESSORS[processor]}
    for seed in range(2):
        drafter = RecyclingDrafter(max_nodes=16)
        report = assert_identical(tiny_model(), drafter, BATCHES[batch], seed=seed, **kwargs)
        assert report.fallback is None
        assert report.num_drafts > 0
        assert report.num_accepted_tokens < report.num_draft_tokens


def test_same_tokens_in_several_samples_of_one_prompt_under_the_adaptive_budget() -> None:
    kwargs = {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 60, "eos_token_id": None}
    assert_identical(tiny_model(), RecyclingDrafter(), prompts(9), budget=Budget(16), **kwargs)


def test_same_tokens_in_chains() -> None:
    report = assert_identical(
        tiny_model(), RecyclingDrafter(), prompts(4, 9), capability="chain", max_new_tokens=80, eos_token_id=None
    )
    assert report.num_accepted_tokens > 0


def test_text_that_repeats_itself_is_proposed() -> None:
    """A greedy tiny model runs into a loop: all of it has been seen by then."""
    kwargs = {"max_new_tokens": 200, "eos_token_id": None}
    report = assert_identical(tiny_model(), RecyclingDrafter(), prompts(10), **kwargs)
    assert report.num_target_passes < 150


# --- the table --------------------------------------------------------------------------------------------------------


def test_table_holds_the_targets_own_ranking_of_every_token_it_read() -> None:
    drafter = bound(top_k=3)
    session = drafter.start(context_of([5, 6]))
    tree = TokenTree.from_rows([[6, 7, 8, 9]], [[-1, 0, 0, -1]])  # 9 is padding
    tops = tops_of(tree, {6: [7, 10, 11], 7: [12, 13, 14], 8: [15, 16, 17], 9: [18, 19, 20]}, 3)
    observe(session, context_of([5, 6, 7, 12]), tree, [1], tops)
    assert drafter._table is not None
    assert drafter._table[[6, 7, 8, 9]].tolist() == [[7, 10, 11], [12, 13, 14], [15, 16, 17], [-1, -1, -1]]
    assert drafter._table.shape == (VOCAB, 3)
    assert drafter._table.nbytes == 4 * VOCAB * 3


def test_of_two_nodes_of_one_token_the_accepted_one_is_kept() -> None:
    drafter = bound(top_k=2)
    session = drafter.start(context_of([6]))
    tree = TokenTree.from_rows([[6, 7, 8, 7]], [[-1, 0, 0, 2]])
    tops = np.array([[[7, 1], [20, 21], [7, 2], [30, 31]]])
    observe(session, context_of([6, 7, 20]), tree, [1], tops)
    assert drafter._table is not None
    assert drafter._table[7].tolist() == [20, 21]


def test_lists_are_proposed_along_paths_and_last_choices_behind_the_root() -> None:
    drafter = bound(top_k=2)
    session = drafter.start(context_of([6]))
    tree = chain(6, 7, 8)
    observe(session, context_of([6, 7, 8, 6]), tree, [2], tops_of(tree, {6: [7, 9], 7: [8, 3], 8: [6, 50]}, 2))
    proposal = session.propose(context_of([6, 7, 8, 6]), 16)
    tokens, parents = proposal.tokens[0].tolist(), proposal.parents[0].tolist()
    paths = {(): 0}
    for node in range(1, len(tokens)):
        path = next(p for p, at in paths.items() if at == parents[node])
        paths[(*path, tokens[node])] = node
    assert {(7,), (9,), (7, 8), (7, 3), (7, 8, 6)} <= set(paths)
    assert (50,) in paths, "what stood second where the root was picked"
    assert (6,) not in paths, "the root itself stood first there"
    drafter.last_list = False
    proposal = session.propose(context_of([6, 7, 8, 6]), 16)
    assert set(proposal.tokens[proposal.parents == 0].tolist()) == {7, 9}


def test_best_nodes_come_first() -> None:
    random = np.random.default_rng(0)
    table = np.argsort(random.random((30, 30)), 1)[:, :4].astype(np.int32)
    table[random.random(30) < 0.2] = -1  # tokens that were never met
    rates = random.random((4, 4))
    tokens, parents = np.zeros((2, 32), np.int64), np.full((2, 32), -1)
    scores = np.zeros((2, 32), np.float32)
    tokens[:, 0] = 3, 4
    last = table[[5, 6]]
    used = grow_recycled(table, last, rates, np.array([6, 2]), 0.0, tokens, parents, scores)
    assert used == 32
    tree = TokenTree(torch.from_numpy(tokens), torch.from_numpy(parents), torch.from_numpy(scores))
    assert tree.depths[1].max() == 2
    for row in range(2):
        paths = [1.0]
        seen = set()
        for node in range(1, 32):
            parent = parents[row, node]
            if parent < 0:
                continue
            assert (parent, tokens[row, node]) not in seen, "siblings differ"
            seen.add((parent, tokens[row, node]))
            paths.append(paths[parent] * float(scores[row, node]))
        assert all(a >= b - 1e-6 for a, b in itertools.pairwise(paths))
    listed = set(table[3].tolist()) | set(last[0].tolist())
    assert {t for t, p in zip(tokens[0].tolist(), parents[0].tolist(), strict=True) if p == 0} <= listed


def test_rates_follow_what_is_right_of_late() -> None:
    drafter = bound(top_k=4, memory=20.0)
    lists = {6: [40, 41, 7, 42], 7: [43, 6, 44, 45]}  # the third and the second are right, over and over
    sequence = [6]
    session = drafter.start(context_of(sequence))
    for _ in range(60):
        following = 7 if sequence[-1] == 6 else 6
        tree = chain(sequence[-1])
        sequence.append(following)
        observe(session, context_of(sequence), tree, [0], tops_of(tree, lists, 4))
    rates = drafter._counts.rates()
    assert rates[1, 1] > rates[1, 0]
    assert rates[1, 2] > rates[1, 3]
    assert session.propose(context_of([6]), 2).tokens[0, 1] in (41, 7)


def test_last_choices_are_counted_where_the_table_does_not_have_them() -> None:
    drafter = bound(top_k=2)
    session = drafter.start(context_of([6]))
    for sequence in ([6, 7], [6, 7, 8]):
        tree = chain(sequence[-2])
        observe(session, context_of(sequence), tree, [0], tops_of(tree, {6: [7, 8], 7: [8, 30]}, 2))
    assert drafter._counts.hit[LAST].tolist() == [0.0, 1.0], "8 stood second behind 6, and came behind 7"


def test_rows_have_their_own_last_choices_and_ends() -> None:
    drafter = bound(top_k=2)
    session = drafter.start(context_of([6], [7], [8]))
    tree = TokenTree.from_rows([[6], [7], [8]], [[-1]] * 3)
    lists = {6: [1, 60], 7: [2, 70], 8: [3, 80]}
    observe(session, context_of([6, 1], [7, 2], [8, 3]), tree, [0] * 3, tops_of(tree, lists, 2))
    proposal = session.propose(context_of([6, 1], [8, 3], rows=[0, 2]), 8)
    assert [set(row) - {0} for row in proposal.tokens[:, 1:].tolist()] == [{60}, {80}]


# --- housekeeping -----------------------------------------------------------------------------------------------------


def test_table_stays_with_the_target_it_was_learnt_from() -> None:
    drafter = RecyclingDrafter()
    model = new_model("llama")
    fast = specdec.accelerate(model, drafter, budget=Budget(16, fixed=True))
    fast.generate(**prompts(8), max_new_tokens=12, eos_token_id=None)
    assert drafter._table is not None
    learnt = drafter._table.copy()
    assert (learnt >= 0).any()
    drafter.bind(model)
    assert (drafter._table == learnt).all()
    drafter.bind(new_model("llama", vocab_size=120))
    assert drafter._table.shape == (120, 8)
    assert (drafter._table == -1).all()


def test_clear_forgets_everything() -> None:
    drafter = RecyclingDrafter()
    fast = specdec.accelerate(tiny_model(), drafter, budget=Budget(16, fixed=True))
    fast.generate(**prompts(8), max_new_tokens=24, eos_token_id=None)
    drafter.clear()
    assert drafter._table is not None
    assert (drafter._table == -1).all()
    assert not drafter._counts.tried.any()
    session = drafter.start(context_of([5, 6]))
    assert session.propose(context_of([5, 6]), 16).num_nodes == 1


def test_a_later_call_begins_with_what_an_earlier_one_learnt() -> None:
    drafter = RecyclingDrafter()
    kwargs = {"max_new_tokens": 24, "eos_token_id": None}
    budget = Budget(16, fixed=True)
    reports = [assert_identical(tiny_model(), drafter, prompts(8), budget=budget, **kwargs) for _ in range(2)]
    assert reports[1].num_accepted_tokens > reports[0].num_accepted_tokens


@pytest.mark.parametrize("setting", ["max_nodes", "max_depth", "top_k", "prior_weight", "memory"])
def test_settings_out_of_range_are_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting}=0 must be at least"):
        RecyclingDrafter(**{setting: 0})


def test_it_must_be_bound() -> None:
    with pytest.raises(ValueError, match=r"bind\(model\) comes before"):
        RecyclingDrafter().start(context_of([5]))


def test_top_tokens_are_those_of_the_logits() -> None:
    logits = torch.randn((2, 3, 50), generator=torch.Generator().manual_seed(0))
    logits[0, 0, 7:9] = 9.0
    for count in (1, 8, 50):
        found, values = largest(logits.numpy(), count)
        assert (found[..., 0] == logits.argmax(-1).numpy()).all()
        assert torch.equal(logits.gather(-1, torch.from_numpy(found)), logits.topk(count).values)
        assert torch.equal(torch.from_numpy(values), logits.topk(count).values)
    guard = GuardedDrafter(RecyclingDrafter(top_k=4), SpeculationReport(), CallFacts(50, True, num_top_tokens=4))
    for values, count in ((logits, 4), (logits.bfloat16(), 4), (logits[..., :3], 3)):
        tokens = guard.top_tokens(values, torch.tensor([[1], [-1]]))
        assert tokens is not None and tokens.shape == (2, 3, count)
        assert torch.equal(values.gather(-1, tokens), values.topk(count).values)
    nothing = torch.zeros((2, 0), dtype=torch.int64)
    assert GuardedDrafter(None, SpeculationReport(), CallFacts(50, True)).top_tokens(logits, nothing) is None


def test_behind_unlikely_nodes_top_tokens_are_known_only_where_they_were_right() -> None:
    logits = torch.randn((2, 40, 200), generator=torch.Generator().manual_seed(0))
    guard = GuardedDrafter(RecyclingDrafter(top_k=4), SpeculationReport(), CallFacts(200, True, num_top_tokens=4))
    accepted = torch.tensor([[3, 30, 35], [20, -1, -1]])
    tokens = guard.top_tokens(logits, accepted)
    assert tokens is not None
    expected = logits.topk(4).indices
    for row, known in enumerate(({30, 35}, {20})):
        for node in range(40):
            if node < RANKED_NODES or node in known:
                assert torch.equal(tokens[row, node], expected[row, node])
            else:
                assert (tokens[row, node] == -1).all()


def test_lists_that_are_not_known_leave_the_table_as_it_is() -> None:
    table, last = np.full((6, 2), 5, np.int32), np.zeros((1, 2), np.int32)
    tokens, parents = np.array([[1, 2, 3]]), np.array([[-1, 0, 0]])
    top_tokens = np.array([[[2, 3], [4, 0], [-1, -1]]])
    keep_lists(tokens, parents, top_tokens, np.array([[1, 2, 4]]), np.array([3]), table, last)
    assert table[1].tolist() == [2, 3] and table[2].tolist() == [4, 0] and table[3].tolist() == [5, 5]
    assert last.tolist() == [[4, 0]]


def test_loop_hands_over_top_tokens_of_every_node() -> None:
    """What the drafter is told of the nodes on the accepted path is what plain decoding ranks first there."""
    seen: dict[int, int] = {}

    class Watching(RecyclingSession):
        def observe(self, context: DraftContext, step: Step) -> None:
            assert step.top_tokens is not None
            assert step.top_tokens.shape == (*step.tree.tokens.shape, 8)
            length = len(context.sequences[0])
            seen[length - step.accepted[0] - 1] = int(step.top_tokens[0, 0, 0])
            super().observe(context, step)

    expected = reference(tiny_model(), prompts(10), max_new_tokens=60, eos_token_id=None)
    assert_identical(
        tiny_model(), opening(Watching), prompts(10), expected=expected, max_new_tokens=60, eos_token_id=None
    )
    ids = expected.ids[0].tolist()
    assert len(seen) > 10
    assert all(ids[position] == top for position, top in seen.items())


def test_steps_without_a_draft_are_observed_too() -> None:
    """While drafting pauses the drafter learns what it would have learned."""
    told: list[int] = []

    class Watching(RecyclingSession):
        def observe(self, context: DraftContext, step: Step) -> None:
            told.append(step.tree.num_nodes)
            super().observe(context, step)

    class Resting(Budget):
        rests = True

        def nodes_to_draft(self) -> int:
            return 1 if self.rests else 2

        def choose(self, tree: TokenTree, spent: float = 0.0) -> TokenTree:
            return tree.first(1)

    tables = []
    for rests in (True, False):
        drafter, budget = opening(Watching), Resting(8, fixed=True)
        budget.rests = rests
        told.clear()
        assert_identical(tiny_model(), drafter, prompts(9), budget=budget, max_new_tokens=90, eos_token_id=None)
        tables.append(drafter._table)
        assert told == [1] * 89
    assert tables[0] is not None
    assert np.array_equal(tables[0], tables[1])
    told.clear()
    budget = Resting(8, fixed=True)
    assert_identical(tiny_model(), opening(Watching), prompts(9, 4), budget=budget, max_new_tokens=90, eos_token_id=20)
    assert told, "rows that end in the middle of a rest do no harm"
