"""A session's text is what `generate` makes of it, whatever was fed, scored and rolled back before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import StoppingCriteria

import specdec
from specdec.generation import FallbackWarning
from specdec.report import SpeculationReport
from tests import architectures
from tests.conformance import RandomTreeDrafter, lookahead
from tests.drafters.reasoning import counted
from tests.tiny_models import EOS, PAD, prompts, tiny_model, tiny_tokenizer

SETTINGS: dict[str, Any] = {"max_new_tokens": 8}
MODELS = ("llama", "gpt2", "mistral-window", "gemma3-mixed-windows")
LENGTHS = [(7,), (3, 11, 5)]


def accelerated(name: str = "llama", **settings: Any) -> Any:
    return specdec.accelerate(tiny_model(name), RandomTreeDrafter([], max_nodes=8), strict=True, **settings)


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    """Rows as `generate` takes them."""
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def expected(name: str, rows: list[list[int]], **kwargs: Any) -> Tensor:
    """New tokens of the model's own `generate` on the whole text."""
    inputs = padded(rows)
    return tiny_model(name).generate(**inputs, **kwargs)[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("do_sample", [False, True])
def test_every_turn_is_that_of_generate(name: str, lengths: tuple[int, ...], do_sample: bool) -> None:
    kwargs: dict[str, Any] = {"do_sample": do_sample, "eos_token_id": EOS, "pad_token_id": PAD}
    feeds = [[5, 6, 7], [8], [9, 10]][: len(lengths)]
    with accelerated(name).session(**prompts(*lengths), **kwargs) as session:
        actions = (
            lambda: None,
            lambda: session.feed(feeds),
            lambda: session.rollback([4, 1, 3][: len(lengths)]),
            lambda: session.score(feeds),
            lambda: (session.rollback(2), session.feed(feeds)),
            lambda: session.score(feeds, keep=True),
            lambda: session.replace([row[:3] for row in session.tokens]),
        )
        for seed, act in enumerate(actions):
            act()
            before = session.tokens
            torch.manual_seed(seed)
            want = expected(name, before, max_new_tokens=6, **kwargs)
            state = torch.get_rng_state()
            torch.manual_seed(seed)
            got = session.generate(max_new_tokens=6)
            assert got.tolist() == want.tolist()
            assert torch.equal(torch.get_rng_state(), state)
            for row, old, new in zip(session.tokens, before, want.tolist(), strict=True):
                end = new.index(EOS) + 1 if EOS in new else len(new)
                assert row == old + (new[:end] if len(lengths) > 1 else new)
    assert session.report.num_generated_tokens > 0


def test_rows_of_a_batch_end_as_the_models_own_config_says() -> None:
    model = tiny_model()
    assert model.generation_config.eos_token_id == EOS
    with accelerated().session(**prompts(3, 11, 5, 8), do_sample=False) as session:
        before = session.tokens
        new = session.generate(max_new_tokens=60).tolist()
        assert any(EOS in row for row in new)
        for text, old, row in zip(session.tokens, before, new, strict=True):
            assert text == old + row[: row.index(EOS) + 1 if EOS in row else None]


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_the_log_softmax_of_a_forward_over_all(name: str) -> None:
    with accelerated(name).session(**prompts(3, 11, 5)) as session:
        session.generate(max_new_tokens=5)
        given = [[4, 5], [6, 7, 8, 9], []]
        for keep in (False, True, False):
            before = session.tokens
            for row, new, found in zip(before, given, session.score(given, keep), strict=True):
                logits = tiny_model(name)(torch.tensor([row + new])).logits[0, len(row) - 1 : -1]
                want = logits.log_softmax(-1).gather(1, torch.tensor(new, dtype=torch.long)[:, None])[:, 0]
                torch.testing.assert_close(found, want if new else want[:0], atol=1e-4, rtol=1e-4)
            assert session.tokens == ([r + n for r, n in zip(before, given, strict=True)] if keep else before)
    with accelerated(name).session([5, 6, 7]) as session:
        assert session.score([8, 9]).shape == (2,)


def test_nothing_is_read_twice() -> None:
    model = tiny_model()
    fast = specdec.accelerate(model, None, capability="tree")
    with fast.session([*range(3, 12)]) as session, counted(model) as passes:
        session.score([20, 21, 22, 23])
        session.feed([20, 21])
        session.score([24])
        session.rollback(1)
        session.generate(max_new_tokens=2, eos_token_id=None)
        session.feed([30])
        session.generate(max_new_tokens=1, eos_token_id=None)
    # What comes next is known behind the text's last token alone, which is read once more.
    assert passes == [9 + 4, 1 + 1, 1, 1, 2]
    assert session.report.num_target_passes == len(passes)


def test_a_full_window_is_read_again_from_before_the_last_pass_only() -> None:
    model = tiny_model("mistral-window")
    fast = specdec.accelerate(model, None, capability="tree")
    with fast.session([*range(3, 40)]) as session, counted(model) as passes:
        session.generate(max_new_tokens=1)
        session.score([*range(40, 50)])
        session.rollback(1)
        session.feed([77])
        session.score([5])
        session.rollback(2)
        session.score([5])
    assert passes == [37, 1 + 10, 1 + 1, 36 + 1]


@pytest.mark.parametrize("capability", ["chain", "plain"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.filterwarnings("ignore::specdec.fallback.FallbackWarning")
def test_models_that_take_no_trees(capability: str, lengths: tuple[int, ...]) -> None:
    with accelerated(capability=capability).session(**prompts(*lengths), do_sample=False) as session:
        for count in (0, 2, 4):
            session.rollback(count)
            want = expected("llama", session.tokens, max_new_tokens=6, do_sample=False)
            assert session.generate(max_new_tokens=6).tolist() == want.tolist()


@pytest.mark.filterwarnings("ignore::specdec.fallback.FallbackWarning")
@pytest.mark.parametrize("name", ["lfm2", "mamba", "qwen3_next", "xlnet"])
def test_models_whose_cache_cannot_be_cut(name: str) -> None:
    model = architectures.tiny_model(name)
    kwargs: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    with specdec.accelerate(model, lookahead([])).session([5, 6, 7, 8], **kwargs) as session:
        for act in (lambda: None, lambda: session.feed([9]), lambda: session.rollback(3), lambda: session.score([3])):
            act()
            (text,) = session.tokens
            want = model.generate(torch.tensor([text]), **kwargs)[:, len(text) :]
            assert session.generate().tolist() == want.tolist()


@pytest.mark.parametrize("stop", ["z", ["9", "Q", "a", "e"]])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_stop_strings(stop: Any, lengths: tuple[int, ...]) -> None:
    tokenizer = tiny_tokenizer()
    with accelerated().session(**prompts(*lengths), tokenizer=tokenizer, do_sample=False) as session:
        for _ in range(3):
            strings = {"stop_strings": stop, "tokenizer": tokenizer}
            want = expected("llama", session.tokens, max_new_tokens=12, do_sample=False, **strings)
            assert session.generate(max_new_tokens=12, stop=stop).tolist() == want.tolist()


def test_functions_and_criteria_stop() -> None:
    class AtFifth(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] % 5 == 0)

    fast = accelerated()
    for stop in (AtFifth(), lambda ids, scores: ids.shape[1] % 5 == 0):
        with fast.session(**prompts(7), eos_token_id=None) as session:
            for length in (10, 15):
                session.generate(max_new_tokens=20, stop=stop)
                assert len(session.tokens[0]) == length
    with fast.session(**prompts(3, 5)) as session, pytest.warns(FallbackWarning, match="may look at the whole batch"):
        session.generate(max_new_tokens=20, stop=AtFifth())


def test_the_report_is_that_of_all_calls() -> None:
    fast = specdec.accelerate(tiny_model(), "lookahead")
    counts, seconds = SpeculationReport(), 0.0
    with fast.session(**prompts(7, 3), eos_token_id=None) as session:
        for _ in range(3):
            session.generate(max_new_tokens=20)
            counts.num_accepted_tokens += fast.report.num_accepted_tokens
            seconds += sum(fast.report.seconds.values())
    assert session.report.num_generated_tokens == 120
    assert session.report.num_accepted_tokens == counts.num_accepted_tokens
    assert sum(session.report.num_accepted_tokens_per_pos) == counts.num_accepted_tokens
    assert sum(session.report.seconds.values()) == pytest.approx(seconds)
    assert (session.report.drafter, session.report.guarantee) == ("lookahead", "token-identical")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda s: s.rollback(7), r"rollback\(7\): a row of 7 tokens can lose 0 to 6"),
        (lambda s: s.rollback(-1), "can lose 0 to 6"),
        (lambda s: s.feed([[1], [2]]), "tokens of 2 rows were given to a session of 1"),
        (lambda s: s.generate(stop="a"), "stop='a' is text, which needs tokenizer="),
        (lambda s: s.replace([]), "at least one token per row"),
        (lambda s: (s.close(), s.generate()), "the session is closed"),
    ],
)
def test_errors(act: Any, message: str) -> None:
    with accelerated().session(**prompts(7), **SETTINGS) as session, pytest.raises(ValueError, match=message):
        act(session)


def test_what_no_session_can_be_made_of() -> None:
    with pytest.raises(ValueError, match="num_beams=4: a session keeps one text per row"):
        accelerated().session([3, 4], num_beams=4)
    with pytest.raises(ValueError, match="row without tokens"):
        accelerated().session([[3], []])
    with accelerated().session([3, 4]) as session, pytest.raises(TypeError, match="stop=7 must be a string"):
        session.generate(stop=7)
