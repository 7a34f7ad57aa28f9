"""SpecReason's settings: the end of the reasoning, budgets, other vocabularies, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import specdec
from specdec.compat import CACHE
from specdec.drafters import DraftContext, Drafter, LookaheadDrafter, SpecReasonDrafter
from specdec.drafters.base import DrafterSwitchedOffWarning
from specdec.generation import FallbackWarning
from specdec.tree import TokenTree
from specdec.verifiers import StepVerifier
from tests.compiled.builders import built_by, uncompiled
from tests.conformance import draft_of, lookahead, spec_reason
from tests.drafters.reasoning import NO_END, always, asking, by_length, check_audit, continued, never, run
from tests.drafters.small_tokenizers import byte_level, sentencepiece, words
from tests.drafters.test_judge_prompts import DEEPSEEK_R1
from tests.tiny_models import FIRST_TOKEN, new_model, prompts, tiny_model, tiny_tokenizer


def target_text(ids: list[int], new_tokens: int) -> list[int]:
    """The target's own greedy text behind some tokens."""
    return continued(tiny_model(), ids, new_tokens)


# --- the end of the reasoning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("judge", [always, never])
@pytest.mark.parametrize("inner", [None, "lookahead"])
def test_the_answer_behind_the_reasoning_is_the_targets(judge: Any, inner: Any) -> None:
    inputs = prompts(7)
    # A character that comes up early in this text ends its reasoning.
    free = run(inputs, judge, settings=NO_END, eos_token_id=None).ids[0, 7:].tolist()
    end = next(token for token in free[10:] if token not in free[:10] and token >= FIRST_TOKEN)
    settings = {"thinking_end": tiny_tokenizer().decode([end]), "drafter": inner}
    result = run(inputs, judge, settings=settings, eos_token_id=None, max_new_tokens=60)
    new = result.ids[0, 7:].tolist()
    at = new.index(end) + 1
    assert [record.kind for record in result.records[:-1]] == ["step"] * (len(result.records) - 1)
    answer = result.records[-1]
    assert (answer.kind, answer.author, answer.start, answer.end) == ("answer", "target", at, 60)
    assert new[at:] == target_text(result.ids[0, : 7 + at].tolist(), 60 - at)


def test_a_prompt_that_has_ended_the_reasoning_is_answered_by_the_target() -> None:
    tokenizer = tiny_tokenizer()
    for text, kinds in (("abc<Z>cdef<-Z>", {"answer"}), ("abc<-Z>cdef<Z>", {"step"})):
        ids = torch.tensor([tokenizer.encode(text)])
        settings = {"thinking_end": "<-Z>"}
        result = run({"input_ids": ids}, settings=settings, eos_token_id=None, max_new_tokens=30)
        assert {record.kind for record in result.records} == kinds
        if kinds == {"answer"}:
            assert result.ids[0, ids.shape[1] :].tolist() == target_text(ids[0].tolist(), 30)


def test_reasoning_that_is_open_is_closed_before_the_question() -> None:
    tokenizer = byte_level(400)
    tokenizer.chat_template = DEEPSEEK_R1
    model = new_model("llama", vocab_size=400, pad_token_id=1, bos_token_id=0, eos_token_id=0)
    asked: list[str] = []
    forward = model.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        asked.append(tokenizer.decode(kwargs["input_ids"][0]))
        return forward(*args, **kwargs)

    for prompt, is_open in (("<|User|>Why?<|Assistant|><think>\n", True), ("Once", False)):
        drafter = SpecReasonDrafter(draft_of_400(), tokenizer=tokenizer, target_tokenizer=tokenizer, max_step_tokens=8)
        fast = specdec.accelerate(model, drafter, StepVerifier(0.5, asking(always)), strict=True)
        asked.clear()
        model.forward = spy
        fast.generate(torch.tensor([tokenizer.encode(prompt)]), max_new_tokens=12, eos_token_id=None)
        model.forward = forward
        question = next(text for text in asked if "Assign a score" in text)
        assert question.endswith("<|Assistant|><think>\n\n</think>\n\nThe score is: ")
        assert ("</think>\n\n<|end_of_sentence|><|User|>Evaluate" in question) == is_open


def draft_of_400() -> Any:
    return new_model("llama", 3, vocab_size=400, pad_token_id=1, bos_token_id=0, eos_token_id=0)


# --- budgets and gates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("judge", [always, never])
@pytest.mark.parametrize("inner", [None, "lookahead", "draft-model"])
def test_the_token_budget_ends_the_reasoning_by_force(judge: Any, inner: Any) -> None:
    text = "So<-Z>"
    settings = {"thinking_end": "<-Z>", "token_budget": 20, "budget_text": text, "drafter": inner}
    inputs = prompts(3, 8)
    result = run(inputs, judge, settings=settings, eos_token_id=None, max_new_tokens=50)
    ids = tiny_tokenizer().encode(text)
    for row, length in enumerate((3, 8)):
        new = result.ids[row, 8:].tolist()
        assert new[20 : 20 + len(ids)] == ids
        records = result.report.audit.of_row(row)
        assert [record.kind for record in records[-2:]] == ["forced end", "answer"]
        assert (records[-2].author, records[-2].start, records[-2].text) == ("forced", 20, text)
        before = result.ids[row, 8 - length : 28 + len(ids)].tolist()
        assert new[20 + len(ids) :] == target_text(before, 50 - 20 - len(ids))


def test_the_forced_end_is_the_thinking_end_by_default() -> None:
    result = run(prompts(5), settings={"thinking_end": "<-Z>", "token_budget": 11}, eos_token_id=None)
    forced = next(record for record in result.records if record.kind == "forced end")
    assert "<-Z>" in forced.text  # the line breaks have no token of their own here
    kwargs: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 40}
    out = result.fast.generate(**prompts(5), **kwargs, eos_token_id=None)
    assert out.sequences.tolist() == result.ids.tolist()
    assert len(out.scores) == 40


def test_first_steps_are_the_targets() -> None:
    result = run(prompts(7), settings=NO_END | {"first_steps": 2, "max_step_tokens": 5}, eos_token_id=None)
    assert [record.author for record in result.records[:4]] == ["target", "target", "draft", "draft"]
    assert result.ids[0, 7:17].tolist() == target_text(result.ids[0, :7].tolist(), 10)
    assert result.records[0].reason == "first steps"


def test_a_draft_model_that_does_not_know_how_to_begin_leaves_the_step() -> None:
    settings = NO_END | {"max_step_tokens": 5}
    gated = run(prompts(7), settings=settings | {"max_entropy": 1e-6}, eos_token_id=None)
    assert {record.author for record in gated.records} == {"target"}
    assert {record.reason for record in gated.records} == {"draft unsure"}
    assert gated.report.audit.num_judged == 0
    free = run(prompts(7), settings=settings | {"max_entropy": 50.0}, eos_token_id=None)
    assert free.ids.tolist() == run(prompts(7), settings=settings, eos_token_id=None).ids.tolist()
    some = run(prompts(7), settings=settings | {"max_entropy": 2.5}, eos_token_id=None, max_new_tokens=100)
    assert {record.author for record in some.records} == {"draft", "target"}


def test_exact_drafts_end_where_they_are_doubtful() -> None:
    counts = []
    for confidence in (0.0, 0.5):
        drafter = spec_reason(**NO_END, min_confidence=confidence, max_step_tokens=40, step_end="never")
        fast = specdec.accelerate(tiny_model(), drafter, strict=True, budget=specdec.budget.Budget(64, fixed=True))
        fast.generate(**prompts(7), max_new_tokens=16, eos_token_id=None)
        counts.append(fast.report.num_draft_tokens)
    assert counts[1] < counts[0] / 3


# --- other vocabularies -----------------------------------------------------------------------------------------------


def test_a_draft_with_another_vocabulary_writes_in_its_own_words() -> None:
    target_tokenizer, tokenizer = byte_level(400), sentencepiece(300, prefix="none")
    target = new_model("llama", vocab_size=400, pad_token_id=1, bos_token_id=0, eos_token_id=0)
    draft = new_model("llama", 5, vocab_size=len(tokenizer))
    settings = {
        "draft_model": draft,
        "tokenizer": tokenizer,
        "target_tokenizer": target_tokenizer,
        "max_step_tokens": 12,
        "step_end": "\n",
        "judge_prompt": "Score: ",
    }
    inputs = {"input_ids": torch.tensor([target_tokenizer.encode("    for line in read(path):\n")])}
    for judge in (always, never):
        result = run(inputs, asking(judge), target, settings=settings | NO_END, eos_token_id=None, max_new_tokens=60)
        assert result.report.drafter_figures["vocabulary"] == "text"
        assert result.report.audit.num_judged > 2
        if judge is never:
            expected = target.generate(**inputs, max_new_tokens=60, do_sample=False, eos_token_id=None)
            assert result.ids.tolist() == expected.tolist()
        else:
            assert {record.author for record in result.records if record.tokens > 1} == {"draft"}
            sampled = run(inputs, always, target, settings=settings | NO_END, do_sample=True, eos_token_id=None)
            assert sampled.ids.tolist() != result.ids.tolist()


def test_a_draft_with_another_vocabulary_and_no_tokenizer_is_an_error() -> None:
    draft = new_model("llama", vocab_size=1000)
    with pytest.raises(ValueError, match=r"needs both tokenizers, but none was found .*pass tokenizer="):
        specdec.accelerate(tiny_model(), SpecReasonDrafter(draft, target_tokenizer=tiny_tokenizer()))


# --- what is refused --------------------------------------------------------------------------------------------------


def accelerated(verifier: Any = "exact", **settings: Any) -> Any:
    return specdec.accelerate(tiny_model(), spec_reason(**settings), verifier)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_step_tokens": 0}, "max_step_tokens=0 must be at least 1"),
        ({"first_steps": -1}, "first_steps=-1 must be at least 0"),
        ({"token_budget": 0}, "token_budget=0 must be at least 1"),
        ({"step_end": ""}, "step_end is empty"),
        ({"judge_prompt": ""}, "judge_prompt is empty"),
        ({"thinking_end": None, "token_budget": 5}, "token_budget needs thinking_end"),
        ({"budget_text": "enough"}, "budget_text='enough' .* must hold thinking_end='Z'"),
        ({"token_budget": 5, "budget_text": "enough"}, "must hold thinking_end='Z'"),
        ({"max_entropy": 0.0}, r"max_entropy=0.0 must be above 0"),
        ({"min_confidence": 1.0}, r"min_confidence=1.0 must be at least 0 and below 1"),
        ({"vocabulary": "both"}, "vocabulary='both' is not known"),
        ({"drafter": "unheard-of"}, "drafter='unheard-of' is not known"),
        ({"drafter": "spec-reason"}, "cannot draft for another"),
        ({"draft_model": None}, "no draft model is given"),
        ({"token_budget": 5}, "token_budget=5 ends the reasoning by force"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accelerated(**settings)


def test_a_target_without_a_tokenizer_is_an_error() -> None:
    with pytest.raises(ValueError, match="target_tokenizer=None, and no tokenizer lies beside the target's weights"):
        specdec.accelerate(tiny_model(), SpecReasonDrafter(draft_of("llama")))


def test_a_tokenizer_without_digits_is_an_error_where_a_digit_is_asked_for() -> None:
    tokenizer = words(95)
    settings = {"tokenizer": tokenizer, "target_tokenizer": tokenizer}
    with pytest.raises(ValueError, match="has no token for 0, 1, 2"):
        accelerated("step", **settings)
    accelerated(StepVerifier(-1.0, "log-prob"), **settings)
    accelerated("exact", **settings)


def test_a_template_that_drops_the_turn_is_an_error_unless_there_is_a_prompt() -> None:
    tokenizer = tiny_tokenizer().__class__(tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="<eos>")
    tokenizer.chat_template = "{{ messages[-1].content }}"
    settings = {"tokenizer": tokenizer, "target_tokenizer": tokenizer}
    with pytest.raises(ValueError, match="pass judge_prompt="):
        accelerated("step", **settings)
    accelerated("step", judge_prompt="Score: ", **settings)


@pytest.mark.parametrize("drafter", [None, "lookahead", LookaheadDrafter(), ["lookahead", "recycling"]])
def test_steps_are_judged_of_a_drafter_that_writes_some(drafter: Any) -> None:
    with pytest.raises(ValueError, match=r"verifier='step' judges reasoning steps.*SpecReasonDrafter"):
        specdec.accelerate(tiny_model(), drafter, "step")
    with pytest.raises(ValueError, match="verifier='step' judges reasoning steps"):
        tiny_model().generate(**prompts(4), custom_generate=specdec.speculate(drafter, "step"), max_new_tokens=4)


@pytest.mark.parametrize("verifier", ["block", "traversal"])
def test_rules_that_compare_distributions_are_refused(verifier: str) -> None:
    with pytest.raises(ValueError, match=f"verifier='{verifier}' needs drafts that were drawn at random"):
        accelerated(verifier)


def test_by_name() -> None:
    with pytest.raises(ValueError, match="no draft model is given"):
        specdec.accelerate(tiny_model(), "spec-reason")
    fast = accelerated("step")
    assert isinstance(fast.verifier, StepVerifier)
    assert "approximate" in str(fast.report)


# --- what goes wrong --------------------------------------------------------------------------------------------------


class Broken(Drafter):
    """Raises at its third proposal."""

    name = "broken"
    calls = 0

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("the drafter is broken")
        return TokenTree.root_only(torch.tensor([int(ids[-1]) for ids in context.sequences]))


def test_a_drafter_that_breaks_leaves_the_rest_to_the_target() -> None:
    fast = specdec.accelerate(tiny_model(), spec_reason(**NO_END, drafter=Broken()), StepVerifier(0.5, never))
    with pytest.warns(DrafterSwitchedOffWarning, match="the drafter is broken"):
        ids = fast.generate(**prompts(7), max_new_tokens=40, eos_token_id=None)
    assert ids[0, 7:].tolist() == target_text(ids[0, :7].tolist(), 40)


def test_a_prompt_too_long_for_the_draft_model_is_the_targets() -> None:
    draft = new_model("gpt2", n_positions=32)
    settings = NO_END | {"draft_model": draft}
    result = run(prompts(40), settings=settings, eos_token_id=None)
    assert {(record.author, record.reason) for record in result.records} == {("target", "too long")}
    result = run(prompts(20), settings=settings, eos_token_id=None, max_new_tokens=30)
    assert result.records[0].author == "draft"
    assert result.records[-1].author == "target"


def test_rows_of_targets_that_take_chains_only() -> None:
    for capability in ("chain", "tree"):
        results = run(prompts(4, 7), by_length, settings=NO_END, capability=capability, max_new_tokens=12)
        assert results.ids.tolist() == run(prompts(4, 7), by_length, settings=NO_END, max_new_tokens=12).ids.tolist()


def test_a_batch_with_a_cache_of_its_own_is_left_to_the_model() -> None:
    fast = specdec.accelerate(tiny_model(), spec_reason(**NO_END), StepVerifier(0.5, always))
    cache: dict[str, Any] = {CACHE: DynamicCache(config=tiny_model().config)}
    with pytest.warns(FallbackWarning, match="row after row"):
        ids = fast.generate(**prompts(4, 7), **cache, max_new_tokens=12)
    assert ids.tolist() == tiny_model().generate(**prompts(4, 7), max_new_tokens=12).tolist()


def test_a_cache_that_is_handed_in_goes_on() -> None:
    fast = specdec.accelerate(tiny_model(), spec_reason(**NO_END), StepVerifier(0.5, by_length))
    kwargs: dict[str, Any] = {CACHE: DynamicCache(config=tiny_model().config), "eos_token_id": None}
    ids = fast.generate(**prompts(7), **kwargs, max_new_tokens=12)
    assert kwargs[CACHE].get_seq_length() == 7 + 12 - 1
    again = fast.generate(ids, **kwargs, max_new_tokens=12)
    assert again.tolist() == fast.generate(ids, eos_token_id=None, max_new_tokens=12).tolist()


def test_a_draft_model_that_breaks_leaves_the_rest_to_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("specdec.drafters.reasoning.writer.StepWriter.write", broken)
    fast = specdec.accelerate(tiny_model(), spec_reason(**NO_END), StepVerifier(0.5, always))
    with pytest.warns(DrafterSwitchedOffWarning, match="out of memory"):
        ids = fast.generate(**prompts(7), max_new_tokens=20, eos_token_id=None)
    assert ids[0, 7:].tolist() == target_text(ids[0, :7].tolist(), 20)
    assert "out of memory" in fast.report.drafter_error
    with pytest.raises(RuntimeError, match="out of memory"):
        run(prompts(7), always, settings=NO_END)


def test_calls_after_one_another_and_other_targets() -> None:
    drafter = spec_reason(**NO_END, drafter=lookahead([]))
    first = run(prompts(7), drafter=drafter)
    again = run(prompts(7), drafter=drafter)
    assert first.ids.tolist() == again.ids.tolist()
    other = run(prompts(7), drafter=drafter, model=new_model("llama", 4))
    assert other.ids.tolist() != first.ids.tolist()
    check_audit(first.report)


def test_the_targets_own_first_layers_write_steps() -> None:
    drafter = SpecReasonDrafter("self", target_tokenizer=tiny_tokenizer(), max_step_tokens=6, **NO_END)
    result = run(prompts(7), drafter=drafter, eos_token_id=None)
    assert {record.author for record in result.records if record.tokens > 1} == {"draft"}


def test_compiled_passes_write_the_same() -> None:
    with built_by(uncompiled) as built:
        results = [run(prompts(3, 7), settings=NO_END | {"compiled": on}, eos_token_id=None) for on in (False, True)]
    assert results[0].ids.tolist() == results[1].ids.tolist()
    assert built == ["LlamaForCausalLM"]


def test_as_transformers_own_hook() -> None:
    speculation = specdec.speculate(spec_reason(**NO_END), StepVerifier(0.5, always), strict=True)
    ids = tiny_model().generate(**prompts(7), custom_generate=speculation, max_new_tokens=30)
    assert ids.tolist() == run(prompts(7), settings=NO_END, max_new_tokens=30).ids.tolist()
    assert speculation.report.guarantee == "approximate"
