"""Merged drafters: one tree of all paths, best first; credit where it is due; sources that do not pay are left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from specdec.budget import Budget
from specdec.drafters import (
    DraftContext,
    Drafter,
    DraftModelDrafter,
    LookaheadDrafter,
    MergedDrafter,
    RecyclingDrafter,
)
from specdec.drafters.base import DrafterSwitchedOffWarning, Needs
from specdec.drafters.merging.session import MergedSession
from specdec.tree import TokenTree
from tests.conformance import (
    Answers,
    RandomTreeDrafter,
    TaughtMedusaDrafter,
    assert_identical,
    draft_of,
    lookahead,
    reference,
)
from tests.drafters.merging import (
    ScriptedDrafter,
    combined,
    context_of,
    few_token_tree,
    merging,
    paths_of,
    paths_tree,
    reference_merge,
    session_of,
    step_of,
)
from tests.tiny_models import prompts, tiny_model

BATCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "single": (prompts(12), {}),
    "padded": (prompts(3, 11, 5, 12), {}),
    "return-sequences": (prompts(9), {"num_return_sequences": 3, "do_sample": True}),
}
SOURCES: dict[str, Any] = {
    "lookahead+recycling": lambda answers: MergedDrafter([lookahead(answers), RecyclingDrafter()]),
    "medusa+draft+lookahead": lambda answers: MergedDrafter(
        [
            TaughtMedusaDrafter(max_nodes=16, answers=answers),
            DraftModelDrafter(draft_of("llama"), max_nodes=16),
            lookahead(answers),
        ],
        max_nodes=32,
    ),
    "random+random": lambda answers: MergedDrafter(
        [RandomTreeDrafter(answers, seed) for seed in range(3)], max_nodes=16
    ),
}


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sources", SOURCES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("do_sample", [False, True])
def test_same_tokens_as_plain_decoding(sources: str, batch: str, do_sample: bool) -> None:
    inputs, extra = BATCHES[batch]
    kwargs = {"max_new_tokens": 24, "do_sample": do_sample} | extra
    report = assert_identical(tiny_model(), SOURCES[sources], inputs, seed=3, **kwargs)
    assert report.fallback is None
    assert report.num_accepted_tokens > 0
    credit = sum(figures["credit"] for figures in report.drafter_figures.values())
    assert credit == pytest.approx(report.num_accepted_tokens, abs=0.01)


@pytest.mark.parametrize(
    "processor", [{"temperature": 0.7}, {"repetition_penalty": 1.4}, {"eos_token_id": [2, 20, 40]}]
)
def test_same_tokens_with_processors_under_the_adaptive_budget(processor: dict[str, Any]) -> None:
    assert_identical(
        tiny_model(),
        SOURCES["medusa+draft+lookahead"],
        prompts(5, 9, 12),
        seed=5,
        budget=Budget(16),
        max_new_tokens=24,
        do_sample=True,
        **processor,
    )


def test_same_tokens_in_chains() -> None:
    report = assert_identical(
        tiny_model(), SOURCES["random+random"], prompts(4, 9), capability="chain", max_new_tokens=24
    )
    assert report.num_accepted_tokens > 0
    credit = sum(figures["credit"] for figures in report.drafter_figures.values())
    assert credit == pytest.approx(report.num_accepted_tokens, abs=0.01)


def test_list_is_merged() -> None:
    report = assert_identical(
        tiny_model(), ["lookahead", "recycling", draft_of("llama")], prompts(8), max_new_tokens=16
    )
    assert report.drafter == "merged"
    assert set(report.drafter_figures) == {"lookahead", "recycling", "draft-model"}


# --- the tree ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_merged_tree_is_that_of_the_definition(seed: int) -> None:
    random = np.random.default_rng(seed)
    trees = [few_token_tree(3 * seed + i, nodes=int(random.integers(2, 16))) for i in range(3)]
    drafter = merging(*(ScriptedDrafter(lambda context, tree=tree: tree) for tree in trees), chained=False)
    learned = drafter._known[False]
    learned.tried = random.random(learned.tried.shape) * 20
    learned.hit = learned.tried * random.random(learned.tried.shape)
    max_nodes, rooms = int(random.integers(2, 40)), random.integers(1, 8, 2).tolist()
    context = context_of([5, 11], [5, 12])
    context.max_depth = rooms
    merged = drafter.start(context).propose(context, max_nodes)
    for row in range(2):
        counts = learned.tried, learned.hit, drafter.prior_weight
        expected = reference_merge([tree.first(max_nodes) for tree in trees], row, max_nodes, rooms[row], *counts)
        found = paths_of(merged, row)
        assert list(found) == list(expected)
        assert list(found.values()) == pytest.approx(list(expected.values()), abs=1e-6)


def test_a_path_of_several_sources_stands_there_once_and_is_worth_more() -> None:
    one = paths_tree(9, {(1,): 0.5, (1, 2): 0.5, (3,): 0.3})
    two = paths_tree(9, {(1,): 0.5, (1, 4): 0.4, (1, 2): 0.2})
    session = session_of(ScriptedDrafter(lambda _: one), ScriptedDrafter(lambda _: two))
    found = paths_of(session.propose(context_of([9]), 16))
    assert set(found) == {(1,), (1, 2), (1, 4), (3,)}
    assert found[1,] == pytest.approx(0.75, abs=0.05)
    assert found[1, 2] == pytest.approx(0.6, abs=0.05)
    assert found[3,] < 0.3, "another source is surer of another token"


def test_best_nodes_of_all_sources_come_first() -> None:
    good = paths_tree(9, {(1,): 0.9, (1, 1): 0.9, (1, 1, 1): 0.9})
    bad = paths_tree(9, {(token,): 0.05 for token in range(20, 60)})
    session = session_of(ScriptedDrafter(lambda _: bad), ScriptedDrafter(lambda _: good))
    found = list(paths_of(session.propose(context_of([9]), 8)))
    assert found[:3] == [(1,), (1, 1), (1, 1, 1)]
    assert len(found) == 7


def test_a_source_without_scores_is_counted_as_undecided() -> None:
    tree = TokenTree(*(getattr(paths_tree(9, {(1,): 0.9, (1, 2): 0.9}), name) for name in ("tokens", "parents")))
    session = session_of(ScriptedDrafter(lambda _: tree))
    assert list(paths_of(session.propose(context_of([9]), 8)).values()) == pytest.approx([0.5, 0.5], abs=0.02)
    assert combined([tree], 0, 9)[1, 2] == (1, 0.5)


# --- learning ---------------------------------------------------------------------------------------------------------


def steps(session: MergedSession, right: list[int], count: int) -> TokenTree:
    """Runs steps in which the target picks the same tokens each time; returns the last proposal."""
    tree = None
    for _ in range(count):
        context = context_of([9])
        tree = session.propose(context, 16)
        paths = paths_of(tree)
        accepted = 0
        while accepted < len(right) - 1 and tuple(right[: accepted + 1]) in paths:
            accepted += 1
        session.observe(context_of([9, *right[: accepted + 1]]), step_of(tree, right[: accepted + 1]))
    assert tree is not None
    return tree


def test_nodes_are_worth_what_those_of_their_sources_were_of_late() -> None:
    boastful = ScriptedDrafter(lambda _: paths_tree(9, {(1,): 0.9, (1, 1): 0.9}))
    modest = ScriptedDrafter(lambda _: paths_tree(9, {(2,): 0.2, (2, 3): 0.2}))
    session = session_of(boastful, modest)
    assert next(iter(paths_of(session.propose(context_of([9]), 8)))) == (1,)
    found = paths_of(steps(session, [2, 3, 5], 60))
    assert list(found)[:2] == [(2,), (2, 3)]
    assert found[2,] > 0.8
    assert found[1,] < 0.1


def test_what_has_changed_is_learned_anew() -> None:
    """After a change of topic the other source leads within some twenty steps."""
    one = ScriptedDrafter(lambda _: paths_tree(9, {(1,): 0.6}))
    two = ScriptedDrafter(lambda _: paths_tree(9, {(2,): 0.6}))
    session = session_of(one, two)
    assert next(iter(paths_of(steps(session, [1, 4], 300)))) == (1,)
    needed = 0
    while next(iter(paths_of(steps(session, [2, 4], 1)))) != (2,):
        needed += 1
    assert needed <= 25


@pytest.mark.parametrize("memory", [30.0, 60.0, 120.0])
def test_steps_that_a_change_of_topic_takes(memory: float) -> None:
    """However long the topic before was: the counts hold no more than `memory` steps."""
    needed = []
    for before in (60, 300, 3000):
        sources = [ScriptedDrafter(lambda _, token=token: paths_tree(9, {(token,): 0.6})) for token in (1, 2)]
        session = session_of(*sources, memory=memory)
        steps(session, [1, 4], before)
        needed.append(0)
        while next(iter(paths_of(steps(session, [2, 4], 1)))) != (2,):
            needed[-1] += 1
    assert max(needed) <= 0.45 * memory
    assert needed[2] - needed[1] <= 1, "a long past weighs no more than a short one"


def test_nodes_left_out_of_the_tree_are_learned_from_too() -> None:
    """What was cut off for being unlikely, but was right, is found out."""
    wrong = {(token,): 0.5 for token in range(20, 40)}
    session = session_of(
        ScriptedDrafter(lambda _: paths_tree(9, wrong)), ScriptedDrafter(lambda _: paths_tree(9, {(1,): 0.01}))
    )
    context = context_of([9])
    assert (1,) not in paths_of(session.propose(context, 4))
    for _ in range(60):
        tree = session.propose(context, 4)
        session.observe(context_of([9, 1]), step_of(tree, [1]))
    assert next(iter(paths_of(session.propose(context, 4)))) == (1,)


def test_counts_are_of_another_target_no_more() -> None:
    drafter = merging(*(ScriptedDrafter(lambda _: paths_tree(9, {(1,): 0.5}), name) for name in ("one", "two")))
    steps(drafter.start(context_of([9])), [1, 2], 5)
    assert drafter._known[False].tried.any()
    drafter.bind(tiny_model())
    assert drafter._known[False].tried.any()
    drafter.bind(tiny_model("gpt2"))
    assert not drafter._known[False].tried.any()


def test_steps_in_which_nothing_was_proposed_are_credited_to_nobody() -> None:
    """Such as those in which drafting pauses; rows may end in the meantime."""
    tree = TokenTree.from_rows([[9, 1], [8, 1]], [[-1, 0], [-1, 0]], [[0.0, 0.5], [0.0, 0.5]])
    session = merging(ScriptedDrafter(lambda _: tree, "only")).start(context_of([9], [8]))
    session.propose(context_of([9], [8]), 8)
    session.observe(context_of([9, 1, 7], [8, 2]), step_of(tree, [1, 7], [2]))
    for _ in range(2):
        session.observe(context_of([9, 1, 7, 5]), step_of(TokenTree.root_only(torch.tensor([7])), [5]))
    assert session.figures(context_of([9, 1, 7, 5], [8, 2]))["only"]["accepted"] == 1


def test_a_step_without_a_token_credits_nobody() -> None:
    """Such as one that ends before a near-tie."""
    tree = paths_tree(9, {(1,): 0.5})
    session = session_of(*(ScriptedDrafter(lambda _: tree, name) for name in ("one", "two")))
    session.observe(context_of([9]), step_of(session.propose(context_of([9]), 8), []))
    assert not session.credits.any()
    assert not session.known.tried.any()


def test_where_no_source_is_left_nothing_is_proposed() -> None:
    session = session_of(ScriptedDrafter(lambda _: paths_tree(8, {(1,): 0.5})))
    with pytest.warns(DrafterSwitchedOffWarning, match="the roots must be"):
        assert session.propose(context_of([9]), 8).num_nodes == 1
    assert "the roots must be" in session.figures(context_of([9]))["scripted"]["error"]
    assert session.propose(context_of([9]), 8).num_nodes == 1


# --- credit -----------------------------------------------------------------------------------------------------------


def test_credit_goes_to_all_sources_that_named_an_accepted_token() -> None:
    one = ScriptedDrafter(lambda _: paths_tree(9, {(1,): 0.8, (1, 2): 0.8, (5,): 0.1}), "one")
    two = ScriptedDrafter(lambda _: paths_tree(9, {(1,): 0.8, (1, 3): 0.2}), "two")
    session = session_of(one, two)
    steps(session, [1, 2, 7], 4)
    figures = session.figures(context_of([9, 1, 2, 7]))
    assert {name: figures["one"][name] for name in ("calls", "skipped", "proposed", "accepted", "alone", "credit")} == {
        "calls": 4,
        "skipped": 0,
        "proposed": 12,
        "accepted": 8,
        "alone": 4,
        "credit": 6.0,
    }
    assert {name: figures["two"][name] for name in ("accepted", "alone", "credit")} == {
        "accepted": 4,
        "alone": 0,
        "credit": 2.0,
    }


def test_sources_are_shown_their_own_part_of_the_step() -> None:
    one = ScriptedDrafter(lambda _: paths_tree(9, {(1,): 0.8, (1, 2): 0.8, (1, 2, 3): 0.8}), "one")
    two = ScriptedDrafter(lambda _: paths_tree(9, {(4,): 0.01, (1,): 0.8, (6,): 0.001}), "two")
    silent = ScriptedDrafter(lambda context: TokenTree.root_only(torch.tensor([9])), "silent")
    session = session_of(one, two, silent)
    tree = session.propose(context_of([9]), 16)
    verified = tree.first(4)
    assert set(paths_of(verified)) == {(1,), (1, 2), (1, 2, 3)}
    step = step_of(verified.padded_to(8), [1, 2, 8])
    session.observe(context_of([9, 1, 2, 8]), step)
    assert [paths_of(source.steps[0].tree) for source in (one, two)] == [
        pytest.approx({(1,): 0.8, (1, 2): 0.8, (1, 2, 3): 0.8}),
        pytest.approx({(4,): 0.01, (1,): 0.8, (6,): 0.001}),
    ]
    assert all(source.steps[0].new_tokens is step.new_tokens for source in (one, two, silent))
    assert [list(source.steps[0].accepted) for source in (one, two, silent)] == [[2], [1], [0]]
    assert silent.steps[0].tree.num_nodes == 1


def test_sources_that_learn_from_the_target_see_the_whole_step() -> None:
    watching, other = RecyclingDrafter(top_k=2), ScriptedDrafter(lambda _: paths_tree(9, {(1,): 0.8}))
    drafter = merging(watching, other)
    assert drafter.num_top_tokens == 2
    session = drafter.start(context_of([9]))
    tree = session.propose(context_of([9]), 8)
    top_tokens = np.array([[[1, 50], [60, 61]]])
    session.observe(context_of([9, 1, 60]), step_of(tree, [1, 60], top_tokens=top_tokens))
    assert watching._table is not None
    assert watching._table[[9, 1]].tolist() == [[1, 50], [60, 61]]


def test_needs_are_those_of_all_sources() -> None:
    drafter = MergedDrafter([LookaheadDrafter(), TaughtMedusaDrafter(), DraftModelDrafter(draft_of("llama"))])
    assert drafter.needs_hidden_states
    assert drafter.needs_step_seconds
    assert drafter.num_top_tokens == 0
    assert not MergedDrafter([LookaheadDrafter()]).needs_hidden_states
    drafter = MergedDrafter([LookaheadDrafter(), RecyclingDrafter(top_k=5), RecyclingDrafter(top_k=3)])
    assert drafter.needs(torch.device("cpu"), 1, False) == Needs(False, 5)


# --- all together -----------------------------------------------------------------------------------------------------


def answers_of_call(new_tokens: int) -> Answers:
    return reference(tiny_model(), prompts(10), max_new_tokens=new_tokens, eos_token_id=None).answers


def test_merged_sources_accept_more_than_either_alone() -> None:
    """One source knows every other stretch of the answer, another one the rest."""
    answers = answers_of_call(120)

    def stretches(parity: int) -> Drafter:
        def script(context: DraftContext) -> TokenTree:
            at = len(context.sequences[0]) - context.prompt_lengths[0]
            right = answers[0][at : at + 4] if at // 8 % 2 == parity else []
            root = int(context.sequences[0][-1])
            return paths_tree(root, {tuple(right[: i + 1]): 0.6 for i in range(len(right))})

        return ScriptedDrafter(script)

    passes = {}
    for name, sources in {"even": [0], "odd": [1], "both": [0, 1]}.items():
        report = assert_identical(
            tiny_model(),
            MergedDrafter([stretches(parity) for parity in sources]),
            prompts(10),
            max_new_tokens=120,
            eos_token_id=None,
        )
        passes[name] = report.num_target_passes
    assert passes["both"] < min(passes["even"], passes["odd"]) * 0.7
