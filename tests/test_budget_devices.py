"""The budget's controller on simulated devices, whose step times are given as a table."""

from __future__ import annotations

import numpy as np
import pytest

from specdec.budget import Budget
from tests.test_budget import CPU, LINEAR, chain, fan, with_times

H200 = {1: 8.0, 2: 8.0, 4: 8.0, 8: 8.0, 16: 8.1, 32: 8.3, 64: 8.8}
STEPPED = {1: 10.0, 2: 10.0, 4: 10.0, 8: 10.0, 16: 30.0, 32: 30.0, 64: 30.0}
STEEP = {1: 10.0, 2: 19.0, 4: 36.0, 8: 70.0, 16: 138.0, 32: 270.0, 64: 540.0}


def simulate(seconds: dict[int, float], rate: float, draft_seconds: float = 0.0, steps: int = 600) -> Budget:
    """Runs the controller over chains of which each token is accepted at a rate; times and acceptances are simulated.

    The drafter's scores promise too much. Only the second half counts: `sizes` and `num_rests` are those of it.
    """
    budget, random, tree = with_times(seconds), np.random.default_rng(0), chain(0.6 + 0.4 * rate)
    for step in range(steps):
        if step == steps // 2:
            budget.sizes.clear()
            budget.num_rests = 0
        if budget.nodes_to_draft() == 1:
            budget.record(1, seconds[1])
            continue
        chosen = budget.choose(tree, draft_seconds)
        accepted = 0
        while accepted < chosen.num_nodes - 1 and random.random() < rate:
            accepted += 1
        budget.observe(chosen, [list(range(1, accepted + 1))])
        budget.record(chosen.num_nodes, seconds[chosen.num_nodes])
    return budget


@pytest.mark.parametrize(
    ("seconds", "rate", "sizes"),
    [
        pytest.param(H200, 0.9, {32, 64}, id="flat-good"),
        pytest.param(H200, 0.5, {8, 16}, id="flat-fair"),
        pytest.param(CPU, 0.9, {8, 16, 32}, id="cpu-good"),
        pytest.param(CPU, 0.3, {1}, id="cpu-poor"),
        pytest.param(STEPPED, 0.6, {8}, id="stepped-fair"),
        pytest.param(STEPPED, 0.98, {32, 64}, id="stepped-sure"),
        pytest.param(STEEP, 0.6, {1}, id="steep-fair"),
        pytest.param(STEEP, 0.95, {2, 4}, id="steep-sure"),
        pytest.param(LINEAR, 0.8, {1}, id="linear"),
    ],
)
def test_controller_finds_the_size_for_the_device(seconds: dict[int, float], rate: float, sizes: set[int]) -> None:
    budget = simulate(seconds, rate)
    expected = {n: (1 - rate**n) / (1 - rate) / taken for n, taken in seconds.items()}
    best = max(expected, key=lambda n: expected[n])
    assert best in sizes, "the definition"
    as_good = sizes | {n for n, speed in expected.items() if speed > 0.97 * expected[best]}
    assert sum(count for size, count in budget.sizes.items() if size in as_good) > 0.8 * sum(budget.sizes.values())


def test_drafting_that_never_pays_is_never_done() -> None:
    """On a steep device, with a drafter that takes a third of a pass, nearly all steps are plain ones."""
    budget = simulate(STEEP, rate=0.3, draft_seconds=3.0, steps=1000)
    assert budget.num_rests > 450
    assert budget.sizes.total() - budget.sizes[1] <= 5, "a size that seemed dear is tried again now and then"


@pytest.mark.parametrize(
    ("seconds", "draft_seconds", "depths"),
    [
        pytest.param(H200, 0.0, range(15, 32), id="flat-free-drafts"),
        pytest.param(H200, 4.0, range(8, 64), id="flat-dear-drafts"),
        pytest.param(STEPPED, 0.0, range(7, 8), id="stepped"),
        pytest.param(STEEP, 0.0, range(2), id="steep"),
        pytest.param(LINEAR, 0.0, range(1), id="linear"),
    ],
)
def test_controller_finds_the_depth_for_the_device(
    seconds: dict[int, float], draft_seconds: float, depths: range
) -> None:
    """Chains of which each token is right four times out of five: how deep they are cut is what the device decides."""
    budget = simulate(seconds, rate=0.8, draft_seconds=draft_seconds)
    depth = {size: size - 1 for size in budget.sizes}
    assert sum(count for size, count in budget.sizes.items() if depth[size] in depths) > 0.8 * budget.sizes.total()


@pytest.mark.parametrize(("rate", "expected"), [(0.85, 8), (0.2, 1)])
def test_broad_trees_and_deep_chains_are_cut_by_what_they_promise(rate: float, expected: int) -> None:
    """Of a chain and a fan of the same scores a flat device takes all that counts, a steep one nothing."""
    chains, fans = chain(rate, nodes=8), fan(rate / 8, nodes=8)
    assert with_times(H200).choose(chains).num_nodes >= with_times(CPU).choose(chains).num_nodes
    assert with_times(CPU).choose(chains).num_nodes == expected
    assert with_times(LINEAR).choose(chains).num_nodes == with_times(LINEAR).choose(fans).num_nodes == 1


@pytest.mark.parametrize("seconds", [CPU, STEEP, LINEAR, STEPPED, H200], ids=["cpu", "steep", "linear", "step", "flat"])
def test_a_dear_drafter_that_is_never_right_is_left_alone_on_any_device(seconds: dict[int, float]) -> None:
    budget = simulate(seconds, rate=0.0, draft_seconds=0.3 * seconds[1], steps=1000)
    drafts = budget.sizes.total()
    assert drafts <= 25, "trials alone"
    lost = drafts * 0.3 * seconds[1] + sum(n * (seconds[size] - seconds[1]) for size, n in budget.sizes.items())
    assert lost < 0.02 * 500 * seconds[1], "two hundredths of the time at most"
