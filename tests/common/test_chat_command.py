"""`specdec chat`: turns, their cache, and how an answer is stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import specdec
from specdec.cli import app
from specdec.commands.conversation import Conversation

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)


def tokenizer() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({"<end>": 0} | {c: i for i, c in enumerate(alphabet, 1)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>", chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat")
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def chat(folder: Path, lines: str, *args: str) -> Any:
    return CliRunner().invoke(app, ["chat", "--model", str(folder), "--max-new-tokens", "16", *args], input=lines)


def answers(model: Any, *questions: str) -> list[str]:
    """What the model's own `generate` answers, each turn from the beginning."""
    turns, found, made = [], [], tokenizer()
    for question in questions:
        turns.append({"role": "user", "content": question})
        inputs = made.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        found.append(made.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
        turns.append({"role": "assistant", "content": found[-1]})
    return found


@pytest.mark.parametrize("args", [[], ["--show-drafts"], ["--drafter", "none"]])
def test_turns_are_those_of_generate(model: Any, folder: Path, args: list[str]) -> None:
    result = chat(folder, "hello\nand now?\n", *args)
    assert result.exit_code == 0, result.output
    assert result.stdout == "".join(answer + "\n" for answer in answers(model, "hello", "and now?"))
    assert result.stderr.count("16 tokens, ") == 2


def test_reset_forgets_and_quit_ends(model: Any, folder: Path) -> None:
    result = chat(folder, "hello\n/reset\n/help\nhello\n/quit\nhello\n")
    assert result.stdout == "".join(answer + "\n" for answer in answers(model, "hello") * 2)
    assert "a new conversation" in result.stderr
    assert result.stderr.count("/reset starts a new conversation") == 2


def test_cache_is_kept_from_turn_to_turn(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(specdec.accelerate(model, "lookahead"), tokenizer())
    lengths = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        conversation.ask("a question of some length", max_new_tokens=4)
        lengths.clear()
        conversation.ask("hi", max_new_tokens=4)
    finally:
        handle.remove()
    # Of 62 tokens, 33 are kept: this template renders an answer differently from the prompt for it.
    assert max(lengths) == 29


def test_stopped_answer_leaves_the_conversation_whole(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(specdec.accelerate(model, "lookahead"), tokenizer())
    first = conversation.stopping
    calls = 0
    check = type(first).__call__

    def stop_at_the_fifth(self: Any, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            conversation.stop()
        return check(self, input_ids, scores, **kwargs)

    type(first).__call__ = stop_at_the_fifth  # type: ignore[method-assign]
    try:
        assert conversation.ask("hello", max_new_tokens=64).startswith("[stopped; ")
    finally:
        type(first).__call__ = check  # type: ignore[method-assign]
    conversation.ask("go on", max_new_tokens=8)
    kept = conversation.turns[-1]["content"]
    fresh = Conversation(specdec.accelerate(model, None), tokenizer())
    fresh.turns = conversation.turns[:2]
    fresh.ask("go on", max_new_tokens=8)
    assert fresh.turns[-1]["content"] == kept


def test_too_long_question_ends_neither_program_nor_conversation(model: Any, folder: Path) -> None:
    result = chat(folder, "x" * 600 + "\nhello\n")
    assert result.exit_code == 0, result.output
    assert "and the model takes 512; /reset starts a new conversation" in result.stderr
    assert result.stdout == answers(model, "hello")[0] + "\n"


def test_chat_needs_a_template() -> None:
    result = CliRunner().invoke(app, ["chat", "--model", "embedded"], input="hi\n")
    assert result.exit_code == 2
    assert "embedded has no chat template; name a chat model, such as --model smollm2" in result.stderr
