"""A drafter that fails costs no token; wrong arguments are named before any work is done."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

import specdec
from specdec.budget import Budget
from specdec.drafters import DraftContext, Drafter, LookaheadDrafter
from specdec.drafting import DrafterSwitchedOffWarning
from specdec.generation import check_ids
from specdec.tree import TokenTree
from specdec.verifiers import ExactVerifier
from tests.conformance import FailingDrafter, OracleDrafter, assert_identical, reference
from tests.tiny_models import VOCAB, new_model, prompts, tiny_model

NEW_TOKENS = 24
INPUTS = prompts(4, 9, 6)
KWARGS: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "eos_token_id": [2, 5, 9]}

POINTS = [("start", 0), ("propose", 0), ("propose", 2), ("observe", 0), ("observe", 2), ("finish", 0)]


def accelerated(drafter: Drafter, strict: bool = False, model: Any = None) -> specdec.SpeculativeModel:
    return specdec.accelerate(model or tiny_model(), drafter, strict=strict, budget=Budget(64, fixed=True))


def failing(method: str, at_step: int, error: BaseException | None = None) -> FailingDrafter:
    answers = reference(tiny_model(), INPUTS, **KWARGS).answers
    more = {} if error is None else {"error": error}
    return FailingDrafter(OracleDrafter(answers, max_nodes=4), method, at_step, **more)


@pytest.mark.parametrize(("method", "at_step"), POINTS)
def test_drafter_that_raises_is_switched_off(method: str, at_step: int) -> None:
    expected = reference(tiny_model(), INPUTS, **KWARGS)
    drafter = failing(method, at_step)
    fast = accelerated(drafter)
    torch.manual_seed(0)
    with pytest.warns(DrafterSwitchedOffWarning, match=rf"'failing' failed in {method}\(\)") as caught:
        got = fast.generate(**INPUTS, **KWARGS)
    assert len(caught) == 1
    assert got.tolist() == expected.ids.tolist()
    assert torch.equal(torch.get_rng_state(), expected.rng_state)
    assert fast.report.drafter_error == "RuntimeError: the drafter is broken"
    calls = dict(drafter.calls)
    assert_identical_again(fast, drafter, expected)
    assert drafter.calls["start"] > calls["start"], "the next call begins with the drafter again"


def assert_identical_again(fast: specdec.SpeculativeModel, drafter: FailingDrafter, expected: Any) -> None:
    drafter.at_step = -1
    torch.manual_seed(0)
    assert fast.generate(**INPUTS, **KWARGS).tolist() == expected.ids.tolist()
    assert fast.report.drafter_error is None
    assert fast.report.num_accepted_tokens > 0


@pytest.mark.parametrize(("method", "at_step"), POINTS)
def test_strict_raises_what_the_drafter_raised(method: str, at_step: int) -> None:
    with pytest.raises(RuntimeError, match="the drafter is broken"):
        accelerated(failing(method, at_step), strict=True).generate(**INPUTS, **KWARGS)


@pytest.mark.parametrize(("method", "at_step"), POINTS)
@pytest.mark.parametrize("strict", [False, True])
def test_interruption_leaves_everything_usable(method: str, at_step: int, strict: bool) -> None:
    model = new_model("llama")
    expected = reference(model, INPUTS, **KWARGS)
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    drafter = failing(method, at_step, KeyboardInterrupt())
    fast = accelerated(drafter, strict, model)
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        fast.generate(**INPUTS, **KWARGS)
    assert hooks == [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    assert drafter.calls.get("finish") == 1 or method == "start"
    again = reference(model, INPUTS, **KWARGS)
    assert again.ids.tolist() == expected.ids.tolist()
    assert_identical_again(fast, drafter, expected)


def test_interrupted_sampling_leaves_the_generator_as_plain_decoding_would() -> None:
    """After n tokens of the longest row plain decoding has made n draws."""
    drafter = failing("propose", 2, KeyboardInterrupt())
    fast = accelerated(drafter)
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        fast.generate(**INPUTS, **KWARGS, top_k=0)
    state = torch.get_rng_state()
    longest = [k for k in range(1, NEW_TOKENS + 1) if torch.equal(state, state_after(k))]
    assert len(longest) == 1


def state_after(draws: int) -> torch.Tensor:
    torch.manual_seed(0)
    for _ in range(draws):
        torch.multinomial(torch.ones(3, VOCAB), 1)
    return torch.get_rng_state()


@pytest.mark.parametrize("method", ["propose", "observe"])
def test_finish_is_called_however_a_call_ends(method: str) -> None:
    drafter = failing(method, 0, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        accelerated(drafter).generate(**INPUTS, **KWARGS)
    assert drafter.calls.get("finish") == 1


# --- wrong proposals --------------------------------------------------------------------------------------------------


class Proposes(Drafter):
    """Proposes what a function makes of the roots."""

    name = "proposes"

    def __init__(self, make: Callable[[list[int]], Any]) -> None:
        self.make = make

    def propose(self, context: DraftContext, max_nodes: int) -> Any:
        return self.make([int(sequence[-1]) for sequence in context.sequences])


def tree_of(tokens: list[int], parents: list[int]) -> Callable[[list[int]], TokenTree]:
    return lambda roots: TokenTree.from_rows([[root, *tokens] for root in roots], [[-1, *parents]] * len(roots))


WRONG: dict[str, tuple[Callable[[list[int]], Any], str]] = {
    "token too large": (tree_of([VOCAB], [0]), r"draft tokens must be in \[0, 97\)"),
    "token below zero": (tree_of([-1], [0]), r"draft tokens must be in \[0, 97\)"),
    "parent behind its child": (tree_of([5, 6], [2, 0]), "must stand before its child"),
    "parent of itself": (tree_of([5, 6], [0, 2]), "must stand before its child"),
    "parent below zero": (tree_of([5, 6], [0, -3]), "must stand before its child"),
    "a root with a parent": (
        lambda roots: TokenTree(torch.tensor([[r, 5] for r in roots]), torch.tensor([[0, 0]] * len(roots))),
        r"parents\[:, 0\] must be -1",
    ),
    "a row too many": (lambda roots: tree_of([5], [0])([*roots, 3]), r"at most \[3, 64\] was asked for"),
    "a row too few": (lambda roots: tree_of([5], [0])(roots[1:]), r"at most \[3, 64\] was asked for"),
    "too many nodes": (tree_of([5] * 64, list(range(64))), r"at most \[3, 64\] was asked for"),
    "nothing": (lambda roots: None, "returned a NoneType, a TokenTree is needed"),
    "a list": (lambda roots: [[root, 5] for root in roots], "returned a list, a TokenTree is needed"),
    "no node at all": (
        lambda roots: TokenTree(torch.zeros(len(roots), 0).long(), torch.zeros(len(roots), 0).long()),
        "",
    ),
    "fractions": (
        lambda roots: TokenTree(torch.tensor([[r, 5.5] for r in roots]), torch.tensor([[-1, 0]] * len(roots))),
        "",
    ),
    "another root": (lambda roots: tree_of([5], [0])([(root + 1) % VOCAB for root in roots]), ""),
    "deeper than can be used": (tree_of(list(range(40)), list(range(40))), ""),
    "scores of another shape": (
        lambda roots: TokenTree(
            torch.tensor([[r, 5] for r in roots]), torch.tensor([[-1, 0]] * len(roots)), torch.ones(len(roots), 9)
        ),
        "",
    ),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("is_fixed", [True, False], ids=["fixed-budget", "adaptive-budget"])
@pytest.mark.filterwarnings("ignore::specdec.drafting.DrafterSwitchedOffWarning")
def test_wrong_tree_never_changes_the_output(case: str, is_fixed: bool) -> None:
    make, message = WRONG[case]
    model = new_model("gpt2", n_positions=9 + NEW_TOKENS)  # learned positions: one too many is an error
    expected = reference(model, INPUTS, **KWARGS)
    fast = specdec.accelerate(model, Proposes(make), budget=Budget(64, fixed=is_fixed))
    torch.manual_seed(0)
    got = fast.generate(**INPUTS, **KWARGS)
    assert got.tolist() == expected.ids.tolist()
    assert torch.equal(torch.get_rng_state(), expected.rng_state)
    if message:
        assert re.search(message, str(fast.report.drafter_error))
        assert fast.report.num_draft_tokens == 0


@pytest.mark.parametrize("case", [case for case, (_, message) in WRONG.items() if message])
def test_strict_raises_on_a_wrong_tree(case: str) -> None:
    make, message = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=message):
        accelerated(Proposes(make), strict=True).generate(**INPUTS, **KWARGS)


# --- wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [lambda **kw: specdec.accelerate(tiny_model(), **kw), specdec.speculate])
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"drafter": "lookahaed"}, ValueError, r"drafter='lookahaed' is not known; use one of .*'lookahead'"),
        ({"drafter": 3}, TypeError, "drafter must be a name .*not 3"),
        ({"drafter": LookaheadDrafter}, TypeError, r"pass an instance: LookaheadDrafter\(\)"),
        ({"drafter": tiny_model}, TypeError, "drafter must be a name"),
        ({"verifier": "exakt"}, ValueError, r"verifier='exakt' is not known; use one of 'exact'"),
        ({"verifier": 3}, TypeError, "verifier must be a name .*not 3"),
        ({"verifier": ExactVerifier}, TypeError, r"pass an instance: ExactVerifier\(\)"),
        ({"max_nodes": 3}, ValueError, "max_nodes=3 is not allowed; use one of 1, 2, 4, 8"),
        ({"max_nodes": 256}, ValueError, "max_nodes=256 is not allowed"),
        ({"capability": "nonsense"}, ValueError, "capability='nonsense' is not known; use 'auto' or one of 'tree'"),
        ({"dafter": "lookahead"}, TypeError, "dafter"),
    ],
)
def test_wrong_setting_is_named_at_once(
    call: Callable[..., Any], kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(**kwargs)


def test_target_as_its_own_draft_model() -> None:
    with pytest.raises(ValueError, match="draft_model is the target itself"):
        specdec.accelerate(tiny_model(), tiny_model())


def test_name_in_place_of_a_model() -> None:
    with pytest.raises(TypeError, match=r"model='gpt2' is a name; load it first: .*from_pretrained\('gpt2'\)"):
        specdec.accelerate("gpt2")


def test_something_else_in_place_of_a_model() -> None:
    with pytest.raises(TypeError, match="must be a transformers causal LM, not Linear"):
        specdec.accelerate(torch.nn.Linear(2, 2))


def test_model_that_cannot_generate() -> None:
    config = tf.BertConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises((ValueError, TypeError), match=r"BertModel.*causal LM|causal LM.*BertModel"):
        specdec.accelerate(tf.BertModel(config))
    with pytest.raises((ValueError, TypeError), match=r"LlamaModel.*causal LM|causal LM.*LlamaModel"):
        specdec.accelerate(tiny_model().model)


def test_accelerated_model_is_not_accelerated_again() -> None:
    with pytest.raises(TypeError, match=r"accelerated already; pass its \.model"):
        specdec.accelerate(specdec.accelerate(tiny_model()))


def test_list_of_one_drafter_is_that_drafter() -> None:
    drafter = LookaheadDrafter(shared_bytes=2**16, corpus_bytes=2**16)
    assert specdec.accelerate(tiny_model(), [drafter]).drafter is drafter
    assert_identical(tiny_model(), ["lookahead"], INPUTS, **KWARGS)


@pytest.mark.parametrize("wrong", [-1, VOCAB])
def test_token_ids_of_another_tokenizer_are_refused_as_plain_decoding_does(wrong: int) -> None:
    ids = torch.tensor([[5, wrong, 6]])
    for target in (tiny_model(), specdec.accelerate(tiny_model(), "lookahead")):
        with pytest.raises(IndexError):
            target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
    with pytest.raises(IndexError, match=f"the model knows 0 to {VOCAB - 1}; were they made by another"):
        check_ids(tiny_model(), ids)  # asked where the model's own error would end the process


def test_draft_model_of_another_vocabulary_is_refused() -> None:
    other = new_model("llama", vocab_size=VOCAB + 1000)
    with pytest.raises(ValueError, match=f"a vocabulary of {VOCAB + 1000} tokens and the target .* {VOCAB}"):
        specdec.accelerate(tiny_model(), other)


class Counting(Proposes):
    """Tells of itself in the report."""

    def figures(self, context: DraftContext) -> dict[str, Any]:
        return {"rows": len(context.rows), "tokens": sum(map(len, context.sequences))}


def test_report_tells_what_the_drafter_tells_of_itself() -> None:
    fast = accelerated(Counting(tree_of([5], [0])))
    output = fast.generate(**INPUTS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    tokens = int(INPUTS["attention_mask"].sum()) + 4 * len(output)
    assert fast.report.drafter_figures == fast.report.to_dict()["drafter_figures"] == {"rows": 3, "tokens": tokens}
    assert f"rows 3, tokens {tokens}" in str(fast.report)


class Unsettled(LookaheadDrafter):
    """Cannot tell its settings."""

    def settings(self) -> dict[str, Any]:
        raise RuntimeError("no settings")


def test_drafter_that_cannot_tell_its_settings_is_switched_off() -> None:
    expected = reference(tiny_model(), INPUTS, **KWARGS)
    fast = accelerated(Unsettled())
    torch.manual_seed(0)
    with pytest.warns(DrafterSwitchedOffWarning, match=r"failed in kind\(\)"):
        got = fast.generate(**INPUTS, **KWARGS)
    assert got.tolist() == expected.ids.tolist()
    assert fast.report.drafter_error == "RuntimeError: no settings"
