"""Replaying recorded answers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from rich.console import Console

from specdec.benchmark.offline_replay import replay
from specdec.drafters.base import DraftContext, Drafter, DraftSession, Step
from specdec.drafters.lookahead import LookaheadDrafter
from specdec.tree import TokenTree


@dataclass
class ScriptedDrafter(Drafter):
    """Proposes the trees it was given, one after the other, and writes down what it is told."""

    trees: list[TokenTree]
    told: list[Any] = field(default_factory=list)

    def start(self, context: DraftContext) -> DraftSession:
        self.told.append(("start", context.sequences[0].tolist(), context.prompt_lengths))
        return self

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        self.told.append(("propose", context.sequences[0].tolist(), context.max_depth, max_nodes))
        return self.trees.pop(0)

    def observe(self, context: DraftContext, step: Step) -> None:
        self.told.append(("observe", context.sequences[0].tolist(), step.accepted))

    def finish(self, context: DraftContext) -> None:
        self.told.append(("finish", context.sequences[0].tolist()))


def chain(*tokens: int, scores: list[float] | None = None) -> TokenTree:
    parents = [list(range(-1, len(tokens) - 1))]
    return TokenTree.from_rows([list(tokens)], parents, None if scores is None else [[0.0, *scores]])


def test_every_step_is_counted_as_in_a_real_call() -> None:
    branching = TokenTree.from_rows([[3, 9, 4, 9, 5, 8]], [[-1, 0, 0, 2, 2, 4]], [[0, 0.5, 0.4, 0.1, 0.5, 0.5]])
    drafter = ScriptedDrafter([branching, chain(6, 1), chain(7, 8, scores=[0.5])])
    report = replay(drafter, [{"prompt": [1, 2], "answer": [3, 4, 5, 6, 7, 8, 9]}], max_nodes=6)
    assert drafter.told == [
        ("start", [1, 2], [2]),
        ("propose", [1, 2, 3], [5], 6),  # the answer's first token is the prefill's
        ("observe", [1, 2, 3, 4, 5, 6], [2]),
        ("propose", [1, 2, 3, 4, 5, 6], [2], 6),
        ("observe", [1, 2, 3, 4, 5, 6, 7], [0]),
        ("propose", [1, 2, 3, 4, 5, 6, 7], [1], 6),
        ("observe", [1, 2, 3, 4, 5, 6, 7, 8, 9], [1]),
        ("finish", [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ]
    assert (report.num_records, report.num_target_passes, report.num_drafts) == (1, 3, 3)
    assert report.num_draft_tokens == 7
    assert (report.num_accepted_tokens, report.num_accepted_tokens_per_pos) == (3, [2, 1])
    assert report.num_generated_tokens == 6 and report.tokens_per_pass == 2.0
    assert report.acceptance_per_pos == [2 / 3, 1 / 3]
    assert report.expected_accepted_tokens == pytest.approx(0.5 + 0.4 + 0.04 + 0.2 + 0.1 + 0.5)


def test_the_last_token_is_never_a_draft_token() -> None:
    """The pass that accepts everything still gives one more token, so a tree is at most one shorter than the rest."""
    report = replay(ScriptedDrafter([chain(3, 4, 5)]), [{"prompt": [1], "answer": [3, 4, 5]}])
    assert report.num_accepted_tokens == 1 and report.num_generated_tokens == 2


def test_padding_nodes_count_for_nothing() -> None:
    report = replay(ScriptedDrafter([chain(3, 4).padded_to(8)]), [{"prompt": [1], "answer": [3, 0, 5]}])
    assert report.num_draft_tokens == 1 and report.num_accepted_tokens == 0
    assert (report.num_target_passes, report.num_drafts) == (2, 1)  # with one token left nothing is drafted


def test_lookahead_gains_on_repeated_answers() -> None:
    answer = list(range(10, 60))
    records = [{"prompt": [1, 2, 3], "answer": answer}] * 4
    repeated = replay(LookaheadDrafter(), records, max_nodes=16)
    assert repeated.tokens_per_pass > 2.5
    assert repeated.expected_accepted_tokens is not None
    nothing = replay(LookaheadDrafter(share_outputs=False), records, max_nodes=16)
    assert nothing.tokens_per_pass == 1.0 and nothing.num_accepted_tokens_per_pos == []
    assert replay(LookaheadDrafter(), records, max_nodes=1).num_draft_tokens == 0


def test_answers_of_no_or_one_token() -> None:
    report = replay(LookaheadDrafter(), [{"prompt": [1], "answer": []}, {"prompt": [], "answer": [1]}])
    assert (report.num_records, report.num_target_passes, report.tokens_per_pass) == (1, 0, 0.0)
    assert report.to_dict()["mean_draft_seconds"] == report.to_dict()["p99_draft_seconds"] == 0.0


def test_dict_and_table() -> None:
    record = {"prompt": [1, 2], "answer": [5, 6, 5, 6, 5, 6, 5, 6]}
    report = replay(LookaheadDrafter(max_hits=7), [record] * 2, max_nodes=8)
    figures = json.loads(json.dumps(report.to_dict()))
    assert figures["num_records"] == 2 and figures["settings"]["max_hits"] == 7 and figures["max_nodes"] == 8
    assert figures["tokens_per_pass"] == report.tokens_per_pass > 1
    assert figures["mean_draft_seconds"] > 0 and "draft_seconds" not in figures
    console = Console(record=True, width=100)
    console.print(report)
    assert f"{report.tokens_per_pass:.2f}" in console.export_text()


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": [1]}, "record 1: 'answer'"),
        ({"prompt": [1], "answer": "text"}, "record 1: 'answer'"),
        ({"prompt": [-1], "answer": [1]}, "record 1: 'prompt'"),
        ({"prompt": [1.5], "answer": [1]}, "record 1: 'prompt'"),
        ({"prompt": [1], "answer": [[1]]}, "record 1: 'answer'"),
        ([1, 2], "record 1: 'prompt'"),
    ],
)
def test_wrong_records_are_named(record: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replay(LookaheadDrafter(), [{"prompt": [1], "answer": [2]}, record])


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="max_nodes must be at least 1"):
        replay(LookaheadDrafter(), [], max_nodes=0)


def test_the_session_of_each_record_does_the_work() -> None:
    sessions: list[ScriptedDrafter] = []

    class Opening(Drafter):
        def start(self, context: DraftContext) -> DraftSession:
            sessions.append(ScriptedDrafter([chain(3, 4)]))
            return sessions[-1]

    report = replay(Opening(), [{"prompt": [1], "answer": [3, 4, 5]}] * 2)
    assert report.num_accepted_tokens == 2
    calls = [[kind for kind, *_ in session.told] for session in sessions]
    assert calls == [["propose", "observe", "finish"]] * 2
