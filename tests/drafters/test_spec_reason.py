"""SpecReason: steps of a draft model, judged by the target."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from specdec.compat import CACHE
from specdec.drafters import DraftContext, Drafter
from specdec.inspection.audit import StepAudit
from specdec.inspection.trace_view import trace_text
from specdec.tree import TokenTree
from tests.conformance import OracleDrafter, answers_of, assert_identical, draft_of, lookahead, reference, spec_reason
from tests.drafters.reasoning import NO_END, always, asking, by_length, continued, counted, never, run
from tests.tiny_models import EOS, PAD, new_model, prompts, tiny_model, tiny_tokenizer

INNERS: dict[str, Any] = {
    "plain": lambda: None,
    "lookahead": lambda: lookahead([]),
    "draft-model": lambda: "draft-model",
    "list": lambda: ["lookahead", "recycling"],
    "oracle": lambda: OracleDrafter([]),
}


@dataclass
class TextOracle(Drafter):
    """Knows whole texts, with the padding before them, and proposes how the one at hand goes on."""

    texts: list[list[int]]
    name = "text-oracle"

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        ids = context.sequences[0].tolist()
        texts = [text[text.index(ids[0]) if ids[0] in text else 0 :] for text in self.texts]
        found = next(([*text[len(ids) :]] for text in texts if text[: len(ids)] == ids), [])
        chain = [ids[-1], *found[: max_nodes - 1]]
        return TokenTree.from_rows([chain], [list(range(-1, len(chain) - 1))], [[0.95] * len(chain)])


@pytest.mark.parametrize("lengths", [(7,), (3, 11, 5)])
@pytest.mark.parametrize("question", [False, True])
def test_steps_that_are_all_kept_are_the_draft_models_own_text(lengths: tuple[int, ...], question: bool) -> None:
    inputs = prompts(*lengths)
    settings = NO_END | {"judge_prompt": "Score (0-9): "}
    result = run(inputs, asking(always) if question else always, settings=settings, eos_token_id=None)
    width = inputs["input_ids"].shape[1]
    for row, length in enumerate(lengths):
        own = continued(draft_of("llama"), result.ids[row, width - length : width].tolist(), 40)
        assert result.ids[row, width:].tolist() == own
    assert {record.author for record in result.records} == {"draft"}
    assert result.report.audit.kept_share == 1.0
    assert result.report.num_target_passes == len(result.records)


def test_a_trace_credits_every_token_of_a_kept_step_to_the_draft() -> None:
    for judge in (always, never):
        result = run(prompts(3, 11), judge, settings=NO_END, eos_token_id=None, trace=True)
        trace, name = result.report.trace, result.report.drafter
        for row, made in enumerate(map(trace.of_row, range(2))):
            assert [token for one in made for token in one.tokens] == result.ids[row, 11:].tolist()
        salvaged = sum(record.salvaged for record in result.records)
        assert trace.count((name,)) == (80 if judge is always else salvaged)
        assert trace.count(()) == 80 - trace.count((name,))
        assert 'class="own"' in trace.to_html(tiny_tokenizer())
        assert trace_text(trace, tiny_tokenizer()).renderables


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("do_sample", [False, True])
def test_without_a_step_kept_the_text_is_the_targets(inner: str, do_sample: bool) -> None:
    # Rows are written one after another, and so drawn in another order than those of `generate`.
    for inputs in (prompts(7),) if do_sample else (prompts(7), prompts(3, 11, 5)):
        expected = reference(tiny_model(), inputs, 1, max_new_tokens=40, do_sample=do_sample)
        settings = NO_END | {"drafter": INNERS[inner](), "judge_prompt": "Score: "}
        result = run(inputs, asking(never), settings=settings, seed=1, do_sample=do_sample)
        assert result.ids.tolist() == expected.ids.tolist()
        assert torch.equal(torch.get_rng_state(), expected.rng_state)
        assert {record.author for record in result.records} == {"target"}
        assert result.report.audit.num_judged > 0


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_drafter_of_tokens_changes_no_word(inner: str, do_sample: bool) -> None:
    """It ends where the step ends, so that the next one is drafted as without it."""
    inputs = prompts(3, 11, 5)
    settings: dict[str, Any] = {"judge_prompt": "Score: ", "step_end": "e", "max_step_tokens": 9}
    by_sum = asking(lambda step: float(int(step.tokens.sum()) % 2 == 0))
    options: dict[str, Any] = {"judge": by_sum, "do_sample": do_sample, "max_new_tokens": 60}
    plain = run(inputs, settings=settings, **options)
    drafter = TextOracle(plain.ids.tolist()) if inner == "oracle" else INNERS[inner]()
    drafted = run(inputs, settings=settings | {"drafter": drafter}, **options)
    assert drafted.ids.tolist() == plain.ids.tolist()
    for row in range(3):
        mine, theirs = (
            [(record.author, record.text, record.score) for record in of.report.audit.of_row(row)]
            for of in (drafted, plain)
        )
        assert mine == theirs
    assert {record.author for record in plain.records} == {"draft", "target"}
    if inner == "oracle":
        assert drafted.report.num_target_passes < 0.8 * plain.report.num_target_passes


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("do_sample", [False, True])
def test_exact_steps_are_token_identical(inner: str, do_sample: bool) -> None:
    for settings in ({}, {"min_confidence": 0.0}, {"first_steps": 1}):
        drafter = spec_reason(drafter=INNERS[inner](), **settings)
        report = assert_identical(
            tiny_model(), drafter, prompts(3, 11, 5), max_new_tokens=32, do_sample=do_sample, seed=2
        )
        assert report.audit is None, "all is the target's"


@pytest.mark.parametrize("question", ["", "Score: "])
def test_one_pass_per_step_and_nothing_is_read_twice(question: str) -> None:
    inputs, model, draft = prompts(9), tiny_model(), draft_of("llama")
    for judge in (always, never, by_length):
        judge = asking(judge) if question else judge
        settings = NO_END | {"judge_prompt": question or None}
        with counted(model) as passes, counted(draft) as draft_passes:
            result = run(inputs, judge, capability="tree", settings=settings, max_new_tokens=60, eos_token_id=None)
        audit = result.report.audit
        assert audit.num_judged > 3
        drafted = sum(record.drafted for record in result.records)
        asked = sum(record.question_tokens for record in result.records)
        assert asked == audit.num_judged * len(question)
        # The prompt, and per pass the root and what is drafted and asked behind it: nothing else.
        assert sum(passes) == 9 - 1 + len(passes) + drafted + asked
        # A judged step takes one pass, any other pass gives a token, and what is kept or salvaged is not read again.
        kept = sum(record.tokens for record in result.records if record.author == "draft")
        salvaged = sum(record.salvaged for record in result.records)
        assert len(passes) == result.report.num_target_passes == audit.num_kept + (60 - kept - salvaged)
        # The draft model reads each token once, and of each step all but the last token as it writes it.
        own = sum(draft_passes)
        assert own <= 9 + 60 + drafted


def test_what_is_rejected_is_salvaged() -> None:
    inputs = prompts(9)
    plain = reference(tiny_model(), inputs, max_new_tokens=60, eos_token_id=None, do_sample=False)
    result = run(inputs, never, settings=NO_END, max_new_tokens=60, eos_token_id=None, do_sample=False)
    assert result.ids.tolist() == plain.ids.tolist()
    salvaged = sum(record.salvaged for record in result.records)
    assert salvaged == result.report.num_accepted_tokens > 0
    assert result.report.num_target_passes == 60 - salvaged


def test_rows_are_judged_as_if_they_were_alone() -> None:
    lengths = (3, 11, 5, 8)
    inputs = prompts(*lengths)
    together = run(inputs, by_length, settings=NO_END | {"drafter": "lookahead"}, max_new_tokens=50)
    verdicts = set()
    for row, length in enumerate(lengths):
        ids = inputs["input_ids"][row : row + 1, -length:]
        alone = run({"input_ids": ids}, by_length, settings=NO_END | {"drafter": "lookahead"}, max_new_tokens=50)
        new = answers_of(together.ids, inputs["input_ids"].shape[1], {EOS})[row]
        assert new == answers_of(alone.ids, length, {EOS})[0]
        mine = together.report.audit.of_row(row)
        assert [(r.text, r.author, r.accepted) for r in mine] == [(r.text, r.author, r.accepted) for r in alone.records]
        verdicts |= {tuple(record.accepted for record in mine)}
    assert len(verdicts) > 1, "rows are of different fates"


@pytest.mark.parametrize("judge", [always, by_length])
def test_tokens_are_streamed_as_they_are_kept(judge: Any) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.puts: list[list[int]] = []

        def put(self, value: Any) -> None:
            self.puts.append(value.flatten().tolist())

        def end(self) -> None:
            self.puts.append([])

    streamer = Streamer()
    result = run(prompts(7), judge, settings=NO_END, streamer=streamer)
    assert streamer.puts[-1] == []
    assert [token for tokens in streamer.puts[1:] for token in tokens] == result.ids[0, 7:].tolist()
    assert streamer.puts[0] == result.ids[0, :7].tolist()


def test_the_draft_model_does_not_end_the_text() -> None:
    # With many end tokens, drafts soon run into one.
    ends = list(range(2, 40))
    for seed in range(4):
        inputs = prompts(4, 6, 9, seed=seed)
        result = run(inputs, settings=NO_END, eos_token_id=ends)
        for row in range(3):
            records = result.report.audit.of_row(row)
            new = answers_of(result.ids, 9, set(ends))[row]
            assert not set(new[:-1]) & set(ends)
            if new[-1] in ends:
                assert records[-1].author == "target"


def test_a_stop_string_inside_a_step_ends_the_row_there() -> None:
    strings = ["z", "9", "HJ", "Q", "R"]
    inputs = prompts(3, 11, 5, 7)
    free = run(inputs, settings=NO_END | {"max_step_tokens": 30}, eos_token_id=None)
    result = run(inputs, settings=NO_END | {"max_step_tokens": 30}, stop_strings=strings, tokenizer=tiny_tokenizer())
    tokenizer, stopped = tiny_tokenizer(), 0
    for row in range(4):
        new = [token for token in result.ids[row, 11:].tolist() if token != PAD]
        text = tokenizer.decode(new)
        at = min((text.find(string) for string in strings if string in text), default=-1)
        if at >= 0:
            stopped += 1
            assert len(text) - at <= 2, "nothing follows the string"
        own = tokenizer.decode(free.ids[row, 11:])
        assert own.startswith(text) or "<eos>" in own
    assert stopped >= 2


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 7])
def test_the_length_limit_inside_a_step(max_new_tokens: int) -> None:
    for judge in (always, never):
        result = run(prompts(4, 6), judge, settings=NO_END, max_new_tokens=max_new_tokens, eos_token_id=None)
        assert result.ids.shape[1] == 6 + max_new_tokens


def test_steps_longer_than_any_tree() -> None:
    settings = NO_END | {"max_step_tokens": 300, "step_end": "never", "judge_prompt": "rate " * 14}
    with counted(tiny_model()) as passes:
        result = run(prompts(5), asking(always), settings=settings, max_new_tokens=340, eos_token_id=None)
    assert [record.tokens for record in result.records] == [300, 40]
    assert passes == [5 + 300 + 70, 1 + 40 + 70]
    settings |= {"max_step_tokens": 200}
    result = run(prompts(5), asking(never), settings=settings, max_new_tokens=210, eos_token_id=None)
    assert result.ids[0, 5:].tolist() == continued(tiny_model(), result.ids[0, :5].tolist(), 210)


def test_budget_rests_and_trees_do_not_keep_steps_from_being_judged() -> None:
    import specdec
    from specdec.verifiers import StepVerifier

    drafter = spec_reason(**NO_END, drafter="lookahead", max_step_tokens=20, step_end="never")
    fast = specdec.accelerate(tiny_model(), drafter, StepVerifier(0.5, always), max_nodes=4, strict=True)
    fast.generate(**prompts(5), max_new_tokens=100, eos_token_id=None)
    assert [record.tokens for record in fast.report.audit.records] == [20] * 5
    assert fast.report.num_target_passes == 5
    fast.speculation.budget.nodes_to_draft = lambda: 1
    fast.generate(**prompts(5), max_new_tokens=100, eos_token_id=None)
    assert fast.report.num_target_passes == 5


def test_sampled_steps_are_drawn_apart_from_the_global_generator() -> None:
    inputs = prompts(3, 11)
    kwargs: dict[str, Any] = {"do_sample": True, "eos_token_id": None, "temperature": 0.9}
    results = [run(inputs, by_length, settings=NO_END, seed=seed, **kwargs) for seed in (0, 0, 1)]
    assert results[0].ids.tolist() == results[1].ids.tolist()
    assert results[0].ids.tolist() != results[2].ids.tolist()
    greedy = run(inputs, always, settings=NO_END, do_sample=False, eos_token_id=None)
    sampled = run(inputs, always, settings=NO_END, **kwargs)
    assert greedy.ids.tolist() != sampled.ids.tolist(), "the draft model samples too"


def test_what_processors_forbid_is_not_drafted() -> None:
    inputs = prompts(7)
    free = run(inputs, settings=NO_END, eos_token_id=None).ids[0, 8:].tolist()
    banned = [[token] for token in set(free[::3])]
    for do_sample in (False, True):
        result = run(inputs, settings=NO_END, eos_token_id=None, bad_words_ids=banned, do_sample=do_sample)
        assert not set(result.ids[0, 7:].tolist()) & {token for (token,) in banned}
        assert {record.author for record in result.records} == {"draft"}


def test_scores_and_cache_of_kept_steps() -> None:
    inputs = prompts(7)
    kwargs: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain_run = run(inputs, by_length, settings=NO_END, eos_token_id=None, top_k=5)
    fast = plain_run.fast
    out = fast.generate(**inputs, max_new_tokens=40, eos_token_id=None, top_k=5, do_sample=False, **kwargs)
    assert out.sequences.tolist() == plain_run.ids.tolist()
    logits = tiny_model()(out.sequences).logits[0, 6:-1]
    assert torch.allclose(torch.cat(out.logits), logits, atol=1e-4)
    assert all(bool(torch.isfinite(scores).sum() == len(scores[0])) for scores in out.scores)
    assert out[CACHE].get_seq_length() == 7 + 40 - 1


def test_report_is_ready_for_json_and_prints_as_tables() -> None:
    result = run(prompts(5, 8), by_length, settings=NO_END)
    loaded = json.loads(json.dumps(result.report.to_dict()))
    audit = StepAudit.of_dicts(loaded["drafter_figures"]["steps"])
    assert audit == result.report.audit
    assert str(len(audit.records)) in str(audit).splitlines()[0]
    assert "author" in str(audit)
    assert "approximate" in str(result.report)
    assert len(str(result.report).splitlines()) < 30


def test_targets_that_take_chains_only() -> None:
    for judge in (always, by_length, never):
        inputs = prompts(7)
        chain = run(inputs, judge, settings=NO_END | {"drafter": "lookahead"}, capability="chain")
        assert chain.report.capability == "chain"
        tree = run(inputs, judge, settings=NO_END | {"drafter": "lookahead"})
        assert chain.ids.tolist() == tree.ids.tolist()


def test_windows_and_ragged_rows() -> None:
    for name in ("mistral-window", "gemma3-mixed-windows"):
        inputs = prompts(3, 19, 8)
        settings = NO_END | {"draft_model": draft_of(name), "judge_prompt": "Score: "}
        result = run(inputs, asking(by_length), model=tiny_model(name), settings=settings, do_sample=False)
        for row, length in enumerate((3, 19, 8)):
            ids = {"input_ids": inputs["input_ids"][row : row + 1, -length:]}
            alone = run(ids, asking(by_length), model=tiny_model(name), settings=settings, do_sample=False)
            new = answers_of(result.ids, 19, {EOS})[row]
            assert new == answers_of(alone.ids, length, {EOS})[0]


def test_no_question_beyond_the_last_position_of_the_model() -> None:
    model = new_model("gpt2", n_positions=40)
    settings = NO_END | {"draft_model": draft_of("gpt2"), "judge_prompt": "Score (0-9): "}
    result = run(prompts(4, 8), asking(always), model=model, settings=settings, max_new_tokens=32, eos_token_id=None)
    assert result.ids.shape[1] == 40
    assert result.records[0].author == "draft"
    assert result.records[-1].author == "target"
