"""The package's own chat prompts."""

from __future__ import annotations

from collections import Counter

import pytest
from transformers import AutoTokenizer

from specdec.benchmark.prompts import read_benchmark_prompts
from specdec.common.embedded import embedded_path
from specdec.common.prompts import CATEGORIES, SPLITS, own_prompts

WITH_MATERIAL = ("summary", "answer", "edit", "extraction", "translation")
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def test_each_category_has_as_many_prompts_in_each_split() -> None:
    found = Counter((prompt.category, prompt.split) for prompt in own_prompts(None))
    assert found == {(category, split): 4 for category in CATEGORIES for split in SPLITS}


def test_prompts_differ_and_ask_the_assistant() -> None:
    prompts = own_prompts(None)
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    assert len({prompt.messages[0]["content"] for prompt in prompts}) == len(prompts)
    # Splits share no material: neither whole texts nor paragraphs.
    paragraphs = Counter(p for q in prompts for p in set(q.messages[0]["content"].split("\n\n")) if len(p) > 200)
    assert set(paragraphs.values()) == {1}
    assert all(prompt.messages[-1]["role"] == "user" for prompt in prompts)


def test_given_texts_have_a_realistic_size() -> None:
    for prompt in own_prompts(None):
        words = len(prompt.messages[0]["content"].split())
        assert (64 if prompt.category in WITH_MATERIAL else 15) <= words <= 250, prompt.id


def test_splits_are_disjoint() -> None:
    assert {p.split for p in own_prompts()} == {"heldout"}
    assert {p.split for p in own_prompts("tuning")} == {"tuning"}
    with pytest.raises(ValueError, match="use one of 'heldout', 'tuning', or None for both"):
        own_prompts("test")


@pytest.mark.parametrize(("source", "split"), [("own", "heldout"), ("own-tuning", "tuning")])
def test_benchmark_reads_them_with_category_and_template(source: str, split: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_path("target"))
    tokenizer.chat_template = TEMPLATE
    prompts = read_benchmark_prompts(source, tokenizer)
    assert [prompt.id for prompt in prompts] == [prompt.id for prompt in own_prompts(split)]
    assert Counter(prompt.category for prompt in prompts) == dict.fromkeys(CATEGORIES, 4)
    text = tokenizer.decode(prompts[0].input_ids[0])
    assert text.replace(" ", "").startswith("<user>")
    assert text.replace(" ", "").endswith("<assistant>")
    assert {prompt.category for prompt in read_benchmark_prompts(source, tokenizer, limit=9)} == set(CATEGORIES)


def test_chat_models_are_measured_on_them_by_default() -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_path("target"))
    assert read_benchmark_prompts("default", tokenizer, 1)[0].category is None
    tokenizer.chat_template = TEMPLATE
    assert read_benchmark_prompts("default", tokenizer, 1)[0].category == "chat"
