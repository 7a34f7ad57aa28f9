"""Prompts that a model writes itself: resumed without a difference, new, and of all kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from specdec.common.embedded import load_embedded
from specdec.training import own_prompts, write_prompts
from specdec.training.own_prompts import Novelty

LINES = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
"""A turn ends with its line, as the embedded model of code can write one."""


@pytest.fixture(scope="module")
def writer() -> tuple[Any, Any]:
    model, tokenizer = load_embedded()
    tokenizer.chat_template = LINES
    return model, tokenizer


@pytest.mark.filterwarnings("ignore:.* prompts were written")
def test_an_interrupted_run_writes_the_same_prompts(
    writer: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_prompts(*writer, 8, tmp_path / "whole", batch_size=4)
    assert 0 < len(whole) <= 8
    assert len({prompt.input_ids for prompt in whole}) == len(whole)
    assert all(prompt.text.endswith("\n") and prompt.id.startswith("own:") for prompt in whole)
    written, write = [0], own_prompts.write_shard

    def killed_at_third(*args: Any) -> None:
        written[0] += 1
        if written[0] == 3:
            raise KeyboardInterrupt
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(own_prompts, "write_shard", killed_at_third)
        with pytest.raises(KeyboardInterrupt):
            write_prompts(*writer, 8, tmp_path / "parts", batch_size=4)
    assert write_prompts(*writer, 8, tmp_path / "parts", batch_size=4) == whole
    with pytest.raises(ValueError, match="num_prompts was 8 and is 9"):
        write_prompts(*writer, 9, tmp_path / "parts", batch_size=4)


def test_a_template_is_needed(writer: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer[1], "chat_template", None)
    with pytest.raises(ValueError, match="own_prompts=3 needs a chat template"):
        write_prompts(*writer, 3, tmp_path)


def test_short_repetitive_and_nearly_equal_texts_are_not_accepted() -> None:
    novelty, text = Novelty(min_words=4), "one two three four five six seven eight nine ten"
    assert not novelty.accepts("too short a")
    assert not novelty.accepts("again and again and again and again and again and")
    assert novelty.accepts(text)
    assert not novelty.accepts(text.upper())
    assert not novelty.accepts(text + " eleven")
    assert novelty.accepts("quite other words stand in this line of text")
