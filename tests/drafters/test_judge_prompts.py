"""The question behind a step, in the shapes of real chat templates."""

from __future__ import annotations

from typing import Any

import pytest

from specdec.drafters.reasoning.judge_prompts import (
    ANSWER,
    PLAIN,
    QUESTION,
    default_question,
    digit_tokens,
    has_ended_thinking,
    is_thinking,
    make_question,
)
from specdec.drafters.tokenizers.token_text import token_text
from tests.drafters.small_tokenizers import byte_level, sentencepiece, words

# Shapes of templates that models come with, shortened to what matters here.
CHATML = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{%- endif %}"
)
"""Qwen2.5 and others: no block of reasoning."""

QWEN3 = (
    "{%- for message in messages %}"
    "{%- set content = message.content %}"
    "{%- if message.role == 'assistant' %}"
    "{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "<|im_start|>assistant\n{{ content }}<|im_end|>\n"
    "{%- else %}<|im_start|>{{ message.role }}\n{{ content }}<|im_end|>\n{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n<think>\n{%- endif %}"
)
"""Qwen3-Thinking: reasoning of earlier turns is dropped, and the answer begins in an open block."""

DEEPSEEK_R1 = (
    "{%- for message in messages %}"
    "{%- if message.role == 'user' %}<|User|>{{ message.content }}{%- endif %}"
    "{%- if message.role == 'assistant' %}"
    "<|Assistant|>{{ message.content.split('</think>')[-1] }}<|end_of_sentence|>{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}<|Assistant|><think>\n{%- endif %}"
)
"""DeepSeek-R1: the same in other words."""

WITH_SYSTEM = (
    "{%- if messages[0].role != 'system' %}<|start_header_id|>system<|end_header_id|>\n\nYou are helpful.<|eot_id|>"
    "{%- endif %}{%- for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{%- endfor %}"
    "{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{%- endif %}"
)
"""Llama 3: a system prompt by default."""


def tokenizer_with(template: str | None) -> Any:
    tokenizer = byte_level(400)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "begins", "ends"),
    [
        (CHATML, "<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
        (QWEN3, "<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        (DEEPSEEK_R1, "<|end_of_sentence|><|User|>", "<|Assistant|><think>\n\n</think>\n\n"),
        (
            WITH_SYSTEM,
            "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ],
    ids=["no block", "qwen3", "deepseek-r1", "system prompt"],
)
def test_question_in_the_words_of_the_template(template: str, begins: str, ends: str) -> None:
    tokenizer = tokenizer_with(template)
    # A newline right before a tag that trims white space is not shown.
    shown = default_question(tokenizer, "</think>").replace("\n", "")
    assert shown == f"{begins}{QUESTION}{ends}{ANSWER}".replace("\n", "")
    question = make_question(tokenizer, token_text(tokenizer), None, "</think>")
    assert tokenizer.decode(question.bare) == default_question(tokenizer, "</think>")
    assert tokenizer.decode(question.thinking) == "</think>\n\n" + tokenizer.decode(question.bare)
    assert "You are helpful" not in shown, "what stands before the step is not repeated"


def test_plain_words_without_a_template() -> None:
    assert default_question(tokenizer_with(None), "</think>") == PLAIN


def test_prompt_of_ones_own_follows_the_step_as_it_is() -> None:
    tokenizer = tokenizer_with(QWEN3)
    question = make_question(tokenizer, token_text(tokenizer), "Rate it: ", "</think>")
    assert tokenizer.decode(question.bare) == tokenizer.decode(question.thinking) == "Rate it: "


def test_special_tokens_of_the_template_are_single_tokens() -> None:
    tokenizer = byte_level(400, special=("<|im_end|>", "<|im_start|>"))
    tokenizer.chat_template = CHATML
    question = make_question(tokenizer, token_text(tokenizer), None, None)
    assert question.bare[0] == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content }}",
        "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}{% endif %}{% endfor %}",
        "{{ raise_exception('one turn only') }}",
    ],
)
def test_template_that_drops_turns_is_an_error_with_a_remedy(template: str) -> None:
    with pytest.raises(ValueError, match="pass judge_prompt="):
        default_question(tokenizer_with(template), "</think>")


def test_digits_with_and_without_a_space() -> None:
    for tokenizer in (byte_level(400), sentencepiece()):
        text = token_text(tokenizer)
        digits = digit_tokens(text)
        for digit, tokens in enumerate(digits):
            assert tokens, digit
            assert {(text.piece(token) or b"").strip() for token in tokens} == {str(digit).encode()}


def test_tokenizer_without_digits_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"no token for 0, 1, .*judge='log-prob'"):
        digit_tokens(token_text(words()))


def test_open_and_ended_reasoning() -> None:
    assert is_thinking("<think>\nso", "</think>")
    assert not is_thinking("<think>\nso</think>\n", "</think>")
    assert is_thinking("<think>a</think>b<think>c", "</think>")
    assert not is_thinking("so", None)
    assert has_ended_thinking("<think>\n\n</think>\n\n", "</think>")
    assert not has_ended_thinking("<think>\n\n</think>\n\nWell", "</think>")
    assert not has_ended_thinking("Well", None)
