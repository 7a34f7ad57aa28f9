"""The noise queue makes the draws that `torch.multinomial` would make."""

from __future__ import annotations

import pytest
import torch

from specdec.rows.draws import NoiseQueue

CPU = torch.device("cpu")


def random_probs(trial: int, batch: int, vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(trial)
    probs = torch.softmax(3 * torch.randn(batch, vocab, generator=generator), dim=-1)
    hidden = torch.rand(batch, vocab, generator=generator) < 0.5  # as after top-k
    hidden[:, trial % vocab] = False
    return torch.softmax(probs.log().masked_fill(hidden, -torch.inf), dim=-1)


@pytest.mark.parametrize(("batch", "vocab"), [(1, 2), (1, 97), (3, 97), (5, 1000), (2, 32003)])
def test_tokens_and_state_are_those_of_multinomial(batch: int, vocab: int) -> None:
    for trial in range(200 if vocab < 5000 else 20):
        steps = [random_probs(1000 * trial + step, batch, vocab) for step in range(3)]
        torch.manual_seed(trial)
        expected = [torch.multinomial(probs, 1)[:, 0].tolist() for probs in steps]
        state = torch.get_rng_state()

        torch.manual_seed(trial)
        queue = NoiseQueue(batch, CPU)
        queue.begin(vocab)
        got = [
            [int((probs[row] / queue.at(step, row)).argmax()) for row in range(batch)]
            for step, probs in enumerate(steps)
        ]
        queue.restore(3)
        assert got == expected
        assert torch.equal(torch.get_rng_state(), state)


def queue_of(batch: int = 2, vocab: int = 5) -> NoiseQueue:
    torch.manual_seed(0)
    queue = NoiseQueue(batch, CPU)
    queue.begin(vocab)
    return queue


def test_a_draw_is_the_same_whenever_it_is_asked_for() -> None:
    in_order = queue_of()
    expected = {(t, row): in_order.at(t, row).clone() for t in range(6) for row in range(2)}
    queue = queue_of()
    for t, row in [(3, 1), (0, 0), (5, 0), (5, 1), (2, 1), (0, 1)]:
        assert torch.equal(queue.at(t, row), expected[t, row])
        assert queue.at(t, row).shape == (5,)


def test_unused_draws_are_undone() -> None:
    queue = queue_of()
    queue.at(9, 0)
    queue.restore(4)
    after = torch.rand(3)
    torch.manual_seed(0)
    for _ in range(4):
        torch.multinomial(torch.ones(2, 5), 1)
    assert torch.equal(torch.rand(3), after)


def test_draws_that_were_never_needed_are_made_up_for() -> None:
    queue = queue_of()
    queue.restore(4)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    for _ in range(4):
        torch.multinomial(torch.ones(2, 5), 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_drawn_leaves_the_state_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    queue = NoiseQueue(2, CPU)
    queue.restore(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_forgotten_draws_are_freed_and_the_rest_stays() -> None:
    full = queue_of()
    expected = [full.at(t, 1).clone() for t in range(8)]
    queue = queue_of()
    queue.at(5, 0)
    queue.forget(4)
    assert len(queue._draws) == 2
    assert len(queue._states) == 3
    for t in range(4, 8):
        assert torch.equal(queue.at(t, 1), expected[t])
    queue.restore(8)
    state = torch.get_rng_state()
    full.restore(8)
    assert torch.equal(torch.get_rng_state(), state)


def test_forgetting_more_than_was_drawn() -> None:
    queue = queue_of()
    queue.at(2, 0)
    queue.forget(3)
    queue.restore(3)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    for _ in range(3):
        torch.multinomial(torch.ones(2, 5), 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_forgotten_draws_that_were_never_made_are_left_out() -> None:
    queue = queue_of()
    queue.at(1, 0)
    queue.forget(500)
    torch.manual_seed(3)
    got = queue.at(500, 1).clone()
    assert len(queue._draws) == 1
    torch.manual_seed(3)
    assert torch.equal(got, torch.empty(2, 5).exponential_()[1])
    queue.restore(501)
    assert len(queue._draws) == 1


def test_state_is_set_back_to_the_start_of_what_is_kept() -> None:
    queue = queue_of()
    queue.at(6, 0)
    queue.forget(4)
    queue.restore(4)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    for _ in range(4):
        torch.multinomial(torch.ones(2, 5), 1)
    assert torch.equal(torch.get_rng_state(), state)
