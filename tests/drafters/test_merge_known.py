"""What merged drafters have learned outlives them; sources that do not earn it are not kept ready."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import specdec
from specdec.drafters import LookaheadDrafter, MergedDrafter, RecyclingDrafter
from specdec.drafters.base import NO_NEEDS, Needs, Step
from specdec.drafters.merging import known as merge_known
from specdec.drafters.merging.call import MergedCall
from specdec.drafters.merging.known import FEW_CALLS, MANY_CALLS, Known
from specdec.drafters.merging.worth import HEAVY_SHARE, STANDING_SHARE, Worth
from tests.conformance import TaughtMedusaDrafter, reference
from tests.drafters.merging import FakeClock, ScriptedDrafter, context_of, merging, paths_tree
from tests.tiny_models import new_model, prompts

CPU = torch.device("cpu")


def scripted() -> ScriptedDrafter:
    return ScriptedDrafter(lambda _: paths_tree(9, {(1,): 0.5}))


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


def test_a_source_that_brings_nothing_is_kept_ready_in_one_call_of_several() -> None:
    known = Known(2)
    ready = []
    for _ in range(160):
        idle = known.idle_sources(1, [0, 1])
        ready.append(1 not in idle)
        for source in {0, 1} - idle:
            known.worth(1).close_call(source, saved=0.2 if source == 0 else 0.0, taken=0.01)
        assert 0 not in idle
    assert ready[0]
    trials = [call for call, is_ready in enumerate(ready) if is_ready and call >= 4]
    gaps = [later - earlier for earlier, later in itertools.pairwise(trials)]
    assert gaps[:3] == [FEW_CALLS, 2 * FEW_CALLS, MANY_CALLS], "ever fewer calls"
    assert set(gaps[3:]) == {MANY_CALLS}
    for _ in range(2 * MANY_CALLS):  # from now on it does
        if 1 not in known.idle_sources(1, [0, 1]):
            known.worth(1).close_call(1, saved=0.2, taken=0.01)
    assert not known.idle_sources(1, [0, 1])
    assert not known.idle_sources(8, [0, 1]), "with more rows nothing is known"


def test_a_source_that_stops_earning_late_is_not_tried_at_once() -> None:
    known = Known(2)
    for _ in range(3 * FEW_CALLS):
        assert not known.idle_sources(1, [0, 1])
    known.worth(1).standings[0] = -0.1
    is_idle = [bool(known.idle_sources(1, [0, 1])) for _ in range(FEW_CALLS)]
    assert is_idle == [True] * (FEW_CALLS - 1) + [False]


def test_of_two_sources_that_name_the_same_one_goes_on() -> None:
    """Neither brings anything beside the other one; without it, it does."""
    known = Known(2)
    calls = []
    for _ in range(4 * MANY_CALLS):
        idle = known.idle_sources(1, [0, 1])
        calls.append(idle)
        call = MergedCall.begin([scripted(), scripted()], known, idle, started=0.0)
        for source in call.active:
            call.records[source].saved = 5.0 if len(call.active) == 1 else 0.0
            call.records[source].seconds = 1.0 + source
        call.close(context_of([9]), now=10.0)
    assert all(idle in (set(), {1}) for idle in calls), "the dearer one stays away"
    assert calls.count({1}) > 0.9 * len(calls)


def test_what_a_source_brings_alone_is_its_own() -> None:
    drafter, clock = merging(scripted(), scripted()), FakeClock()
    drafter._clock = clock
    for _ in range(5):
        drafter._thread.idle = {1}
        drafter.start(context_of([9]))
        tree = drafter.propose(context_of([9]), 8)
        clock.now += 0.01
        drafter.observe(context_of([9, 1, 4]), Step([0], tree, [1]))
        drafter.finish(context_of([9, 1, 4]))
    assert drafter._known[False].worth(1).standings[0] > 0.2, "half of the tokens"


@pytest.mark.parametrize("idle", [set(), {1}])
def test_a_step_without_a_token_saves_nothing(idle: set[int]) -> None:
    """Such as one that ends before a near-tie."""
    drafter = merging(scripted(), scripted())
    drafter._thread.idle = idle
    drafter.start(context_of([9]))
    tree = drafter.propose(context_of([9]), 8)
    drafter.observe(context_of([9]), Step([0], tree, [0]))
    assert not any(record.saved for record in drafter._thread.call.records)
    assert not drafter._thread.call.credits.any()


def test_calls_with_drawn_drafts_say_nothing_of_what_sources_are_worth() -> None:
    known = Known(2)
    call = MergedCall.begin([scripted(), scripted()], known, set(), started=0.0)
    call.drawing = 0
    before = list(known.worth(1).standings)
    call.close(context_of([9]), now=10.0)
    assert known.worth(1).standings == before, "the others were not asked"


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_heavy_source_that_loses_takes_no_part(share: float) -> None:
    drafter = merging(cheap := scripted(), scripted())
    worth = drafter._known[False].worth(1)
    worth.standings[:] = [-1.0, -1.0]
    worth.usual_step, worth.seconds[:2] = 0.01, [1e-5, share * 0.01]
    drafter.needs(CPU, 1, False)
    drafter.start(context_of([9]))
    drafter.propose(context_of([9]), 8)
    assert cheap.calls == 1
    assert drafter._thread.call.idle == ({1} if share > HEAVY_SHARE else set()), "others go on learning"


def test_what_it_takes_to_keep_a_source_ready_must_be_earned_too() -> None:
    worth = Worth(2)
    for _ in range(40):
        worth.close_call(0, saved=0.02 + 2 * STANDING_SHARE, taken=0.02)
        worth.close_call(1, saved=0.02 + 0.5 * STANDING_SHARE, taken=0.02)
    assert worth.standings[0] > 0 > worth.standings[1]


def test_an_idle_source_makes_no_demands_and_is_not_asked() -> None:
    hungry = ScriptedDrafter(lambda _: paths_tree(9, {(1,): 0.5}), "hungry")
    hungry.num_top_tokens = 4
    plain = ScriptedDrafter(lambda _: paths_tree(9, {(2,): 0.5}), "plain")
    drafter = merging(hungry, plain)
    assert drafter.needs(CPU, 1, False) == Needs(False, 4)
    drafter._known[False].worth(1).standings[:] = [-1.0, -1.0]
    assert drafter.needs(CPU, 1, True) == Needs(False, 4)
    assert drafter.needs(torch.device("meta"), 1, False) == Needs(False, 4), "elsewhere it costs nothing"
    assert drafter.needs(CPU, 1, False) == NO_NEEDS
    drafter.start(context_of([9]))
    drafter.propose(context_of([9]), 8)
    assert (hungry.calls, plain.calls) == (0, 1), "what makes no demands costs nothing while it is not asked"
    assert drafter.figures(context_of([9]))["hungry"]["skipped"] == 1
    drafter.start(context_of([9]))
    drafter.propose(context_of([9]), 8)
    assert hungry.calls == 1, "that was for one call"


@pytest.mark.parametrize("do_sample", [False, True])
def test_same_tokens_with_and_without_sources_that_are_not_kept_ready(do_sample: bool) -> None:
    model, inputs = new_model("llama"), prompts(7, 4)
    kwargs = {"max_new_tokens": 20, "do_sample": do_sample, "eos_token_id": None}
    expected = reference(model, inputs, **kwargs)
    medusa = TaughtMedusaDrafter(max_nodes=8, answers=expected.answers)
    drafter = MergedDrafter([LookaheadDrafter(), RecyclingDrafter(), medusa])
    fast = specdec.accelerate(model, drafter, strict=True)
    calls = []
    for _ in range(4):
        torch.manual_seed(0)
        assert fast.generate(**inputs, **kwargs).tolist() == expected.ids.tolist()
        calls.append({name: figures["calls"] for name, figures in fast.report.drafter_figures.items()})
        drafter._known[do_sample].worth(2).standings[:] = [0.1, -9.0, -9.0]
    assert all(calls[0].values())
    assert [*calls[1].values()].count(0) == 1, "one after the other"
    assert calls[2]["recycling"] == calls[2]["medusa"] == 0 < calls[2]["lookahead"]


def test_knowledge_is_kept_by_kind_of_call() -> None:
    drafter, other = (merging(ScriptedDrafter(lambda _: paths_tree(9, {(1,): 0.5}))) for _ in range(2))
    drafter._known[True].tried[1, 0, 3] = 5.0
    merge_known._KNOWN.clear()
    other._known = merge_known.new_known(1)
    other.load_state_dict(drafter.state_dict())
    assert np.array_equal(other._known[True].tried, drafter._known[True].tried)
    assert not other._known[False].tried.any()
