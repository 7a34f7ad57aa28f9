"""Rows end inside an accepted path as they end in plain decoding, and streamers get each token once, in order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from transformers.generation import StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

import specdec
from specdec.budget import Budget
from specdec.rows.sequences import Sequences
from specdec.rows.stopping import StopRule, not_row_wise
from specdec.rows.streaming import StreamFeeder
from tests.conformance import OracleDrafter, RandomTreeDrafter, Reference, assert_identical, reference
from tests.tiny_models import prompts, tiny_model, tiny_tokenizer

NEW_TOKENS = 24
SINGLE, PADDED = prompts(8), prompts(8, 3, 6, 5)
BATCHES = pytest.mark.parametrize("inputs", [SINGLE, PADDED], ids=["single", "padded"])
SAMPLING = pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])


def beyond_the_end(inputs: Any, **kwargs: Any) -> list[list[int]]:
    """What the rows would go on with if nothing ended them: drafts that run over every end."""
    return reference(tiny_model(), inputs, **{"max_new_tokens": 2 * NEW_TOKENS, "eos_token_id": None} | kwargs).answers


def drafters(answers: list[list[int]]) -> list[Any]:
    return [OracleDrafter(answers), OracleDrafter(answers, decoys=False), RandomTreeDrafter(answers)]


@BATCHES
@SAMPLING
def test_end_inside_an_accepted_path(inputs: Any, do_sample: bool) -> None:
    answers = beyond_the_end(inputs, do_sample=do_sample)
    for position in (1, 2, 5, 9):
        eos = [answer[position] for answer in answers]
        kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": do_sample, "eos_token_id": eos}
        expected: Reference = reference(tiny_model(), inputs, **kwargs)
        assert min(map(len, expected.answers)) <= position + 1
        for drafter in drafters(answers):
            report = assert_identical(tiny_model(), drafter, inputs, expected=expected, **kwargs)
            assert report.num_generated_tokens == sum(map(len, expected.answers))


@BATCHES
@SAMPLING
def test_length_limit_inside_an_accepted_path(inputs: Any, do_sample: bool) -> None:
    answers = beyond_the_end(inputs, do_sample=do_sample)
    for max_new_tokens in (1, 2, 5, 13):
        kwargs = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "eos_token_id": None}
        for drafter in drafters(answers):
            assert_identical(tiny_model(), drafter, inputs, **kwargs)


@pytest.mark.filterwarnings("ignore::specdec.generation.FallbackWarning")
@pytest.mark.parametrize("eos", [None, 2, [11, 12]])
@BATCHES
@SAMPLING
def test_stop_string_inside_an_accepted_path(inputs: Any, do_sample: bool, eos: Any) -> None:
    answers = beyond_the_end(inputs, do_sample=do_sample)
    tokenizer = tiny_tokenizer()
    texts = [tokenizer.decode(answer) for answer in answers]
    for strings in ([text[4:6] for text in texts], [texts[0][9:12]], "never found"):
        kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": do_sample, "eos_token_id": eos, "pad_token_id": 0}
        for drafter in drafters(answers):
            report = assert_identical(
                tiny_model(), drafter, inputs, **kwargs, stop_strings=strings, tokenizer=tokenizer
            )
            # Without an end-of-sequence token, plain decoding goes on with a row that has stopped.
            assert (report.fallback is not None) == (eos is None and len(answers) > 1)


@BATCHES
def test_token_that_pads_finished_rows(inputs: Any) -> None:
    answers = beyond_the_end(inputs)
    for pad in (0, 33, None):
        kwargs = {"max_new_tokens": NEW_TOKENS, "eos_token_id": [answer[3] for answer in answers], "pad_token_id": pad}
        for drafter in drafters(answers):
            assert_identical(tiny_model(), drafter, inputs, **kwargs)


@BATCHES
def test_end_of_text_as_padding_of_the_prompt(inputs: Any) -> None:
    ids = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 2)
    assert_identical(
        tiny_model(),
        RandomTreeDrafter,
        {**inputs, "input_ids": ids},
        max_new_tokens=NEW_TOKENS,
        pad_token_id=2,
        repetition_penalty=1.2,
        do_sample=True,
    )


def test_all_rows_end_in_the_same_step() -> None:
    inputs = prompts(6, 6)
    inputs = {name: tensor[:1].expand(2, -1) for name, tensor in inputs.items()}
    answers = beyond_the_end(inputs)
    assert_identical(
        tiny_model(), OracleDrafter(answers), inputs, max_new_tokens=NEW_TOKENS, eos_token_id=answers[0][6]
    )


# --- the rule by itself -----------------------------------------------------------------------------------------------


def sequences(batch: int = 2, prompt: int = 3, max_length: int = 10) -> Sequences:
    return Sequences(torch.arange(batch * prompt).view(batch, prompt), None, max_length)


def test_nothing_behind_the_first_end_is_kept() -> None:
    criteria = StoppingCriteriaList([EosTokenCriteria(torch.tensor([7, 9])), MaxLengthCriteria(max_length=10)])
    rule = StopRule(criteria, sequences())
    assert rule.count(0, [1, 2, 3]) == (3, False)
    assert rule.count(0, [1, 9, 7]) == (2, True)
    assert rule.count(0, [7]) == (1, True)
    assert rule.count(1, list(range(20, 30))) == (7, True), "three tokens of prompt, ten in all"
    assert rule.count(1, list(range(20, 26))) == (6, False)


def test_length_is_counted_from_what_is_committed() -> None:
    tokens = sequences()
    rule = StopRule(StoppingCriteriaList([MaxLengthCriteria(max_length=10)]), tokens)
    tokens.append(0, [1, 2, 3, 4])
    assert rule.count(0, [5, 6, 7, 8]) == (3, True)
    assert rule.count(1, [5, 6, 7, 8]) == (4, False)


def test_other_criteria_see_each_prefix_in_order() -> None:
    seen = []

    class Watching(tf.StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            seen.append(input_ids.tolist())
            return torch.tensor([input_ids[0, -1] == 6])

    tokens = sequences()
    tokens.append(1, [8])
    rule = StopRule(StoppingCriteriaList([Watching()]), tokens)
    assert rule.count(1, [5, 6, 7]) == (2, True)
    assert seen == [[[3, 4, 5, 8, 5]], [[3, 4, 5, 8, 5, 6]]]
    assert not_row_wise(StoppingCriteriaList([Watching(), MaxLengthCriteria(max_length=3)])) == ["Watching"]


# --- the streamer by itself -------------------------------------------------------------------------------------------


class Recorder(tf.generation.streamers.BaseStreamer):
    def __init__(self) -> None:
        self.put_in: list[list[int]] = []
        self.ends = 0

    def put(self, value: Any) -> None:
        self.put_in.append(value.tolist())

    def end(self) -> None:
        self.ends += 1


def test_a_position_is_fed_when_every_row_has_it() -> None:
    tokens, recorder = sequences(), Recorder()
    feeder = StreamFeeder(recorder, tokens, pad_token=99)
    tokens.append(0, [10, 11, 12])
    tokens.append(1, [20])
    feeder.feed([0, 1])
    assert recorder.put_in == [[10, 20]]
    feeder.feed([0, 1])
    assert len(recorder.put_in) == 1, "nothing is fed twice"
    tokens.append(1, [21])
    feeder.feed([0])  # row 1 has ended
    assert recorder.put_in[1:] == [[11, 21], [12, 99]]
    tokens.append(0, [13])
    feeder.feed([])
    assert recorder.put_in[3:] == [[13, 99]]
    feeder.end()
    assert recorder.ends == 1


def test_without_a_streamer_nothing_happens() -> None:
    feeder = StreamFeeder(None, sequences(), pad_token=0)
    feeder.feed([0, 1])
    feeder.end()


@pytest.mark.parametrize("decoys", [False, True])
def test_streamed_tokens_stop_at_the_end_of_the_text(decoys: bool) -> None:
    answers = beyond_the_end(PADDED)
    kwargs = {"max_new_tokens": NEW_TOKENS, "eos_token_id": [answer[7] for answer in answers]}
    streams = [Recorder(), Recorder()]
    drafter = OracleDrafter(answers, decoys=decoys)
    fast = specdec.accelerate(tiny_model(), drafter, strict=True, budget=Budget(64, fixed=True))
    for model, streamer in zip((fast, tiny_model()), streams, strict=True):
        model.generate(**PADDED, **kwargs, streamer=streamer)
    assert streams[0].put_in == streams[1].put_in
    assert fast.report.num_accepted_tokens > 0


def test_stream_is_given_while_tokens_are_generated() -> None:
    counts = []

    class Counting(OracleDrafter):
        def propose(self, *args: Any) -> Any:
            counts.append(len(recorder.put_in))
            return super().propose(*args)

    recorder = Recorder()
    drafter = Counting(beyond_the_end(SINGLE), max_nodes=4)
    specdec.accelerate(tiny_model(), drafter, budget=Budget(4, fixed=True), strict=True).generate(
        **SINGLE, max_new_tokens=NEW_TOKENS, eos_token_id=None, streamer=recorder
    )
    assert counts == sorted(set(counts)), "more has been streamed at every step"
    assert len(recorder.put_in) == NEW_TOKENS + 1
