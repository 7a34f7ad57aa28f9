"""The task of the reasoning test bed: problems, steps, the rubric, training examples and the answer checker."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from tests.examples.scripts import imported

NAMES = ("task", "chains")


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    with imported(["reasoning"], NAMES) as modules:
        yield modules


@pytest.fixture(scope="module")
def writer(scripts, tmp_path_factory):
    return scripts["chains"].Writer(scripts["chains"].make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_problems_stay_in_range_and_are_the_same_each_time(scripts):
    problems = list(scripts["chains"].problems(50))
    assert problems == list(scripts["chains"].problems(50))
    assert len(set(map(str, problems))) == 50
    for problem in problems:
        assert 6 <= len(problem.operations) <= 9
        assert all(10 <= value <= 99 for value in problem.values)
        assert problem.answer == problem.values[-1]


def test_training_examples_never_hold_a_held_out_problem(scripts, writer, monkeypatch):
    chains = scripts["chains"]
    rng = random.Random(0)
    first = chains.training_problem(random.Random(0))
    monkeypatch.setattr(chains, "_held_out", lambda: frozenset([str(first)]))
    assert str(chains.training_problem(rng)) != str(first)


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("(b) Adding 27 to 34 gives 34+27=61. This looks right to me.\n\n", 9),
        ("(b) 34+27=61.\n\n", 9),
        ("(b) Adding 27 to 34 gives 34+27=51. This looks right to me.\n\n", 6),
        ("(b) 34+27=71.\n\n", 5),
        ("(b) Adding 27 to 34 gives 34+27=63. This looks right to me.\n\n", 4),
        ("(b) 34+27=63.\n\n", 3),
        ("(b) Adding 27 to 34 gives 34+27=52. This looks right to me.\n\n", 2),
        ("(b) 34+27=52.\n\n", 1),
        ("(b) 34+26=60.\n\n", 0),
        ("(b) 35+27=62.\n\n", 0),
        ("(b) 34-27=7.\n\n", 0),
        ("(a) 34+27=61.\n\n", 0),
        ("The result is 61.", 0),
        ("", 0),
    ],
)
def test_the_rubric(scripts, text, points):
    task = scripts["task"]
    assert task.score(text, 1, task.Operation("add", 27), 34) == points


def test_corrupted_steps_are_wrong_in_every_way(scripts):
    task = scripts["task"]
    rng = random.Random(1)
    seen: Counter[int] = Counter()
    for _ in range(500):
        value = rng.randint(10, 99)
        operation = task.draw_operation(value, rng)
        others = tuple(task.draw_operation(value, rng) for _ in range(3))
        done, read, result = task.corrupt(operation, value, others, rng)
        assert 10 <= result <= 99
        seen[task.score(str(task.write_step(0, done, read, result, rng, short=False)), 0, operation, value)] += 1
    assert set(seen) == {0, 2, 4, 6}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("(a) 34+27=61.\n\n</think>\n\nThe result is 61.", 61),
        ("(a) 34+27=61.\n\nThe result is 61.", None),
        ("</think>\n\nThe result is", None),
        ("", None),
    ],
)
def test_the_answer_is_read_behind_the_thought(scripts, text, answer):
    assert scripts["task"].written_answer(text) == answer


def test_tokens_of_digits_breaks_and_thinking(writer):
    assert len(set(writer.digit_ids)) == 10
    for text in ("7", "</think>", "<think>", ".\n\n"):
        assert len(writer.encode(text)) == 1
    assert len(writer.encode("34+27=61")) == 8


def test_pieces_of_an_example_are_the_tokens_of_its_text(scripts, writer):
    """A model meets the text's tokens when it reads; those it was taught piece by piece must be the same."""
    tokenizer = scripts["chains"].PreTrainedTokenizerFast
    for write in (writer.for_target, writer.for_draft):
        for number in range(20):
            ids = write(random.Random(number)).ids
            text = writer.tokenizer.decode(ids)
            assert isinstance(writer.tokenizer, tokenizer)
            assert writer.encode(text) == ids


def test_every_step_of_the_targets_examples_is_judged_as_the_rubric_says(scripts, writer):
    task = scripts["task"]
    seen: Counter[int] = Counter()
    for number in range(100):
        example = writer.for_target(random.Random(number))
        text = writer.tokenizer.decode(example.ids)
        problem, _, thought = text.partition("<think>\n")
        value = int(problem.split("Start with ")[1].split(".")[0])
        listed = [line.split(") ")[1].split() for line in problem.splitlines() if line.startswith("(")]
        steps = [step + "\n\n" for step in thought.partition("</think>")[0].split("\n\n") if step]
        assert len(steps) == len(listed) == len(example.judged)
        for i, (words, step, (anchor, points)) in enumerate(zip(listed, steps, example.judged, strict=True)):
            assert writer.tokenizer.decode(example.ids[:anchor]).endswith(step)
            number_of = int(words[1]) if len(words) > 1 else task.NUMBERS[words[0]]
            assert task.score(step, i, task.Operation(words[0], number_of), value) == points
            value = int(task.STEP.fullmatch(step.strip())["result"])
            seen[points] += 1
        assert task.written_answer(text) == value
    assert set(seen) >= {0, 2, 3, 4, 5, 6, 9}
    assert 0.5 < seen[9] / sum(seen.values()) < 0.9


def test_a_judgement_sees_its_chain_and_nothing_else(writer):
    example = next(e for e in map(writer.for_target, map(random.Random, range(9))) if len(e.judged) > 1)
    size = writer.size(example)
    batch = writer.batch([example], size + 5)
    allowed = batch["mask"][0, 0] == 0
    chain, branch = len(example.ids), len(writer.judge_ids)
    assert not allowed.triu(1).any()
    for number, (anchor, points) in enumerate(example.judged):
        last = chain + branch * (number + 1) - 1
        seen = allowed[last].nonzero().flatten().tolist()
        assert seen == [*range(anchor), *range(last - branch + 1, last + 1)]
        assert batch["ids"][0, seen].tolist() == example.ids[:anchor] + writer.judge_ids
        assert batch["position_ids"][0, seen].tolist() == list(range(anchor + branch))
        assert batch["scores"][0, last] == batch["totals"][0, anchor - 1] == points
        assert not batch["is_chain"][0, last]
    for name in ("scores", "totals"):
        assert (batch[name] >= 0).sum() == len(example.judged)
    assert not batch["weights"][0, chain:].any()
    assert batch["is_chain"].sum() == chain


def test_wrong_digits_are_not_learned(scripts, writer):
    task = scripts["task"]
    for number in range(50):
        example = writer.for_target(random.Random(number))
        start = 0
        for anchor, points in example.judged:
            step = writer.tokenizer.decode(example.ids[start:anchor])
            step = step.partition("<think>\n")[2] or step
            result = task.STEP.fullmatch(step.strip())["result"]
            weights = torch.tensor(example.weights[start:anchor])
            assert (weights > 1).sum() == (len(result) if points == 9 else 0)
            start = anchor


def test_chains_of_the_draft_are_judged_and_not_imitated(scripts, writer):
    chain = {"start": 34, "operations": [["add", 27], ["halve", 2]], "steps": ["(a) 34+27=51.\n\n", "(b) 51/2=25.\n\n"]}
    judging = scripts["chains"].Writer(writer.tokenizer, [chain])
    examples = [judging.for_target(random.Random(number)) for number in range(40)]
    drafted = [e for e in examples if len(e.judged) == 1]
    assert 4 < len(drafted) < 24
    assert [points for _, points in drafted[0].judged] == [5]
    # how the draft begins a step is not learned, how a right beginning goes on is
    assert learned(writer, drafted[0]) == "4+27="
    chain["steps"][0] = "(a) 34+27=61.\n\n"
    right = scripts["chains"].Writer(writer.tokenizer, [chain], scripts["chains"].Mixture(by_draft=1.0))
    assert learned(writer, right.for_target(random.Random(0))) == "4+27=61"


def learned(writer, example) -> str:
    return "".join(writer.tokenizer.decode([i]) for i, w in zip(example.ids, example.weights, strict=True) if w)


@pytest.mark.parametrize(
    ("step", "ought"),
    [
        ("(a) Adding 26 to 34 gives 34+26=60. Good, the sum is done.", "2734 34+27"),
        ("(a) Adding 27 to 34 gives 34+27=51. Good, the sum is done.", "2734 34+27=61"),
        ("(a) Doubling 34 gives 34*2=68. Good, the sum is done.", " 34+"),
        ("(a) 34+27=5.", "34+27="),
        ("(a) 34+2=36.", "34+27"),
        ("(a) 34+277=311.", "34+27="),
    ],
)
def test_what_ought_to_stand_in_place_of_digits_and_signs(scripts, writer, step, ought):
    """Up to the first that differs in a sum, and of a result only behind the right sum."""
    chain = {"start": 34, "operations": [["add", 27]], "steps": [f"{step}\n\n"]}
    example = writer.of_chain(chain)
    assert len(example.rights) == len(example.ids)
    known = [token for token in example.rights if token >= 0]
    assert writer.tokenizer.decode(known).replace(" ", "") == ought.replace(" ", "")


def test_too_long_an_example_is_an_error(writer):
    with pytest.raises(ValueError, match="does not fit into rows of 64"):
        writer.batch([writer.for_target(random.Random(0))], 64)
