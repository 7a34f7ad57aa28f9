"""What is read from where, and that only what is to be learned is supervised."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from rich.console import Console

from specdec.training import chat, examples
from specdec.training.examples import Example, flat_columns, load_examples, show_example, split, to_dataset
from tests.training.tokenizers import (
    CHATML,
    CHATML_MARKED,
    END_AT_LAST,
    INCONSISTENT,
    INST,
    THINKING,
    byte_tokenizer,
    runs,
)

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3+3? é"},
    {"role": "assistant", "content": "6, naïvely"},
]


def write(folder: Path, *records: Any, name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def supervised_texts(source: str, tokenizer: Any, **kwargs: Any) -> list[list[str]]:
    return [runs(row["input_ids"], row["supervised"], tokenizer) for row in load_examples(source, tokenizer, **kwargs)]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, [["4<|im_end|>", "6, naïvely<|im_end|>"]]),
        (CHATML_MARKED, [["4<|im_end|>", "6, naïvely<|im_end|>"]]),
        (INST, [[" 4<end>", " 6, naïvely<end>"]]),
        (END_AT_LAST, [["4<end>"], ["6, naïvely<end>"]]),
        (THINKING, [["4<|im_end|>", "6, naïvely<|im_end|>"]]),
    ],
    ids=["chatml", "marked", "inst", "end-at-last", "thinking"],
)
def test_only_the_assistant_is_supervised(tmp_path: Path, template: str, expected: list[list[str]]) -> None:
    tokenizer = byte_tokenizer(template)
    assert supervised_texts(write(tmp_path, {"messages": TURNS}), tokenizer) == expected


def test_the_whole_conversation_is_read(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML)
    row = load_examples(write(tmp_path, {"messages": TURNS}), tokenizer)[0]
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(TURNS, tokenize=False)


def test_each_turn_stands_after_the_prompt_it_was_written_to(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(END_AT_LAST)
    rows = load_examples(write(tmp_path, {"messages": TURNS}), tokenizer)
    for row, before in zip(rows, (TURNS[:2], TURNS[:4]), strict=True):
        prompt = tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
        assert row["input_ids"][: row["supervised"].index(True)] == prompt


def test_tokens_across_the_edge_of_a_turn_are_not_supervised(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML, merges=(("Ċ", "4"),))
    source = write(tmp_path, {"messages": [TURNS[1], {"role": "assistant", "content": "42"}]})
    assert supervised_texts(source, tokenizer) == [["2<|im_end|>"]]


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED])
def test_tokenizer_without_offsets(tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer(template)
    source = write(tmp_path, {"messages": TURNS})
    expected = supervised_texts(source, tokenizer)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert supervised_texts(source, tokenizer) == expected
    merging = byte_tokenizer(template, merges=(("Ċ", "4"),))
    with pytest.raises(ValueError, match="joins some across the edge of a turn; use a fast tokenizer"):
        load_examples(source, merging)


@pytest.mark.parametrize(
    "names", [("human", "gpt"), ("user", "assistant"), ("Human", "chatgpt"), ("user", "GPT")], ids="-".join
)
def test_sharegpt(tmp_path: Path, names: tuple[str, str]) -> None:
    user, assistant = names
    turns = [
        {"from": assistant, "value": "Hello, I was not asked."},
        {"from": "system", "value": "s"},
        {"from": user, "value": "q"},
        {"from": assistant, "value": "a"},
        {"from": "tool", "value": "t"},
        {"from": assistant, "value": "b"},
    ]
    tokenizer = byte_tokenizer(CHATML)
    leading = write(tmp_path, {"conversations": turns[1:]}, {"conversations": [turns[1], turns[0], *turns[2:]]})
    assert supervised_texts(leading, tokenizer) == [["a<|im_end|>", "b<|im_end|>"]] * 2
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"conversations": turns[2:]}]))
    assert supervised_texts(str(path), tokenizer) == [["a<|im_end|>", "b<|im_end|>"]]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": [{"from": "cat", "value": "miaow"}]}, "line 2 of .* role 'cat'; known are human, user"),
        ({"messages": [{"role": "user"}]}, "line 2 of .* a turn of user has no content"),
        ({"messages": "hello"}, "line 2 of .* must be a list of objects"),
        ({"question": "q", "answer": "a"}, "line 2 of .* has the fields question, answer; .*--text-field"),
        ({"prompt": "q"}, "line 2 of .* has a prompt and no completion; .* specdec distill"),
        ({"prompt": ["q"], "completion": "a"}, "line 2 of .* must be text; write turns as messages"),
        ({"input_ids": [1, 99999]}, "line 2 of .* must be token ids from 0 to 259"),
        ({"input_ids": [1, 2], "num_prompt_tokens": 3}, "line 2 of .* num_prompt_tokens is 3"),
        ([1], "line 2 of .* is not a JSON object"),
    ],
)
def test_record_of_no_known_form(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_examples(write(tmp_path, {"text": "fine"}, record), byte_tokenizer(CHATML))


def test_cut_off_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "one\\u2028line"}\n\n{"text": "tw')
    with pytest.raises(ValueError, match=r"line 3 of .*data\.jsonl is not JSON .*cut off"):
        load_examples(str(path), byte_tokenizer())


def test_line_separators_of_unicode_do_not_end_a_record(tmp_path: Path) -> None:
    assert supervised_texts(write(tmp_path, {"text": "one\u2028line"}), byte_tokenizer()) == [["one\u2028line<end>"]]


def test_template_whose_prompt_is_not_a_beginning(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 1 of .*cannot be told; mark it by \{% generation %\}"):
        load_examples(write(tmp_path, {"messages": TURNS}), byte_tokenizer(INCONSISTENT))


def test_conversation_without_a_template(tmp_path: Path) -> None:
    source = write(tmp_path, {"messages": TURNS})
    with pytest.raises(ValueError, match="no chat template; name a Jinja file with --chat-template"):
        load_examples(source, byte_tokenizer())
    file = tmp_path / "chatml.jinja"
    file.write_text(CHATML)
    assert supervised_texts(source, byte_tokenizer(), chat_template=str(file)) == [
        ["4<|im_end|>", "6, naïvely<|im_end|>"]
    ]
    with pytest.raises(ValueError, match=r"missing\.jinja cannot be read"):
        load_examples(source, byte_tokenizer(), chat_template=str(tmp_path / "missing.jinja"))


def test_completion_and_its_end_are_supervised_and_the_prompt_is_not(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(merges=(("b", "c"),))
    source = write(tmp_path, {"prompt": "def f", "completion": "(x)"}, {"prompt": "ab", "completion": "cd"})
    rows = load_examples(source, tokenizer)
    assert [runs(row["input_ids"], row["supervised"], tokenizer) for row in rows] == [["(x)<end>"], ["cd<end>"]]
    # The prompt's tokens are those that it has when it is to be continued.
    assert rows[1]["input_ids"][:2] == tokenizer("ab").input_ids


def test_document_is_supervised_with_one_end(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    (tmp_path / "b.py").write_text("x = 1\n")
    (tmp_path / "a.txt").write_text("hé<end>")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "picture.png").write_bytes(b"\xff\xd8")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.md").write_text("# c")
    assert supervised_texts(str(tmp_path), tokenizer) == [["hé<end>"], ["x = 1\n<end>"], ["# c<end>"]]
    assert supervised_texts(str(tmp_path / "b.py"), tokenizer) == [["x = 1\n<end>"]]


@pytest.mark.parametrize("form", ["saved", "saved-splits", "parquet", "csv", "file"])
def test_data_sets(tmp_path: Path, form: str) -> None:
    dataset = Dataset.from_dict({"n": [1, 2], "story": ["once", "upon"]})
    folder = tmp_path / "data"
    if form == "saved":
        dataset.save_to_disk(folder)
    elif form == "saved-splits":
        DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(folder)
    else:
        folder.mkdir()
        writer = dataset.to_csv if form == "csv" else dataset.to_parquet
        writer(folder / f"train.{'csv' if form == 'csv' else 'parquet'}")
    source = str(folder / "train.parquet" if form == "file" else folder)
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match=r"row 0 of .* has the fields n, story"):
        load_examples(source, tokenizer)
    assert supervised_texts(source, tokenizer, text_field="story") == [["once<end>"], ["upon<end>"]]
    with pytest.raises(ValueError, match="no text and no turns in 'n'; its fields are n, story"):
        load_examples(source, tokenizer, text_field="n")
    if form == "saved-splits":
        assert supervised_texts(source, tokenizer, text_field="story", split="test") == [["upon<end>"]]
        with pytest.raises(ValueError, match=r"split='dev' is not in .*; it has train, test"):
            load_examples(source, tokenizer, split="dev")


def test_turns_in_a_column_of_another_name(tmp_path: Path) -> None:
    Dataset.from_dict({"chat": [TURNS]}).save_to_disk(tmp_path / "data")
    texts = supervised_texts(str(tmp_path / "data"), byte_tokenizer(CHATML), text_field="chat")
    assert texts == [["4<|im_end|>", "6, naïvely<|im_end|>"]]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", "does not exist; check the path"),
        ("missing.jsonl", "does not exist; check the path"),
        ("no-such-owner/no-such-data", "nor a data set that can be loaded .*name:configuration"),
    ],
)
def test_source_that_is_not_there(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_examples(source, byte_tokenizer())


def test_files_that_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\x00")
    with pytest.raises(ValueError, match=r"holds no data: no file ends in \.jsonl"):
        load_examples(str(tmp_path), byte_tokenizer())
    (tmp_path / "weights.bin").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"weights\.bin cannot be read as text in UTF-8"):
        load_examples(str(tmp_path / "weights.bin"), byte_tokenizer())
    (tmp_path / "data.json").write_text('{"text": "a"}')
    with pytest.raises(ValueError, match="holds dict, not a list of records"):
        load_examples(str(tmp_path / "data.json"), byte_tokenizer())


def test_nothing_supervised(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(INST)
    questions = write(tmp_path, {"messages": TURNS[:2]}, {"messages": []})
    with pytest.raises(ValueError, match=r"no supervised token in 2 records: line 1 of .*: nothing in it is super"):
        load_examples(questions, tokenizer)
    refused = {"messages": [{"role": "tool", "content": "t"}, TURNS[2]]}
    with pytest.warns(UserWarning, match=r"2 of 3 records are left out; the first is line 2 of .* refuses .* tool"):
        rows = load_examples(write(tmp_path, {"messages": TURNS}, refused, {"messages": TURNS[:2]}), tokenizer)
    assert len(rows) == 1


def test_limit_is_a_choice_of_the_seed(tmp_path: Path) -> None:
    source = write(tmp_path, *({"text": f"{i:02}"} for i in range(50)))
    tokenizer = byte_tokenizer()
    first = supervised_texts(source, tokenizer, limit=5, seed=1)
    assert len(first) == 5 and first == sorted(first)
    assert first == supervised_texts(source, tokenizer, limit=5, seed=1)
    assert first != supervised_texts(source, tokenizer, limit=5, seed=2)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        load_examples(source, tokenizer, limit=0)


def test_split_sets_examples_apart() -> None:
    rows = to_dataset(Example([i, i], [True, True]) for i in range(20))
    train, held_out = split(rows, 0.1, seed=3)
    assert (len(train), len(held_out)) == (18, 2)
    assert sorted([*flat_columns(train)[0], *flat_columns(held_out)[0]]) == sorted([*range(20)] * 2)
    assert split(rows, 0.1, seed=3)[1]["input_ids"][:] == held_out["input_ids"][:]
    assert len(split(rows, 0.001)[1]) == 1
    assert len(split(rows, 0.0)[1]) == 0
    with pytest.raises(ValueError, match=r"eval_fraction=0\.5 of 1 examples leaves none"):
        split(rows.select([0]), 0.5)
    with pytest.raises(ValueError, match="must be from 0 to below 1"):
        split(rows, 1.0)


def test_shown_example_is_coloured_where_it_is_supervised(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML)
    row = load_examples(write(tmp_path, {"messages": [{"role": "user", "content": "[bold]é"}, TURNS[2]]}), tokenizer)[0]
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
    show_example(row, tokenizer, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[4;32m4<|im_end|>\x1b[0m" in shown
    assert "[bold]é" in shown and "2 of them" in shown
    plain = Console(file=io.StringIO())
    show_example(row, tokenizer, plain, max_tokens=3)
    assert f"and {len(row['input_ids']) - 3} tokens more" in plain.file.getvalue()  # type: ignore[attr-defined]


def test_example_of_two_lengths() -> None:
    with pytest.raises(ValueError, match="2 input_ids and 1 supervised"):
        Example([1, 2], [True])


class TestMutations:
    """Supervising what the assistant did not write does not go unnoticed."""

    def test_prompt_of_a_conversation(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        original = chat.ChatEncoder._span

        def from_the_start(self: Any, before: str, through: str, where: str) -> chat.Span:
            return 0, original(self, before, through, where)[1]

        monkeypatch.setattr(chat.ChatEncoder, "_span", from_the_start)
        with pytest.raises(AssertionError):
            test_only_the_assistant_is_supervised(tmp_path, CHATML, [["4<|im_end|>", "6, naïvely<|im_end|>"]])

    def test_marks_of_the_template(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        original = chat.ChatEncoder._tokens

        def one_character_early(self: Any, text: str, spans: Sequence[chat.Span], where: str) -> chat.Encoded:
            return original(self, text, [(start - 1, end) for start, end in spans], where)

        monkeypatch.setattr(chat.ChatEncoder, "_tokens", one_character_early)
        with pytest.raises(AssertionError):
            test_only_the_assistant_is_supervised(tmp_path, CHATML_MARKED, [["4<|im_end|>", "6, naïvely<|im_end|>"]])

    def test_prompt_of_a_completion(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(examples, "prompt_ids", lambda tokenizer, prompt: [])
        with pytest.raises(AssertionError):
            test_completion_and_its_end_are_supervised_and_the_prompt_is_not(tmp_path)
