"""Tokenizers and chat templates of the training tests."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<end>", "<|im_start|>", "<|im_end|>", "<bos>")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "<bos>{% for m in messages %}{% if m.role == 'system' %}<<{{ m.content }}>>"
    "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}<end>"
    "{% else %}{{ raise_exception('no role ' + m.role) }}{% endif %}{% endfor %}"
)
"""Nothing is written for the assistant to start with."""
END_AT_LAST = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if loop.last and m.role == 'assistant' %}<end>"
    "{% else %}\n{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
"""Writes the last turn otherwise than those before."""
THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content.split('</think>')[-1] }}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
"""Begins a thought in a prompt, and writes none of it later."""
INCONSISTENT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Now write the answer: {% endif %}"
)


def byte_tokenizer(chat_template: str | None = None, merges: tuple[tuple[str, str], ...] = ()) -> Any:
    """One token per byte, and per merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*SPECIAL, *alphabet, *(a + b for a, b in merges)))}
    tokenizer = Tokenizer(models.BPE(vocab, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", bos_token="<bos>", extra_special_tokens=list(SPECIAL[1:3])
    )
    fast.chat_template = chat_template
    return fast


def runs(ids: list[int], flags: list[bool], tokenizer: Any) -> list[str]:
    """Texts of the supervised runs."""
    texts: list[list[int]] = []
    for i, (token, flag) in enumerate(zip(ids, flags, strict=True)):
        if flag:
            if i == 0 or not flags[i - 1]:
                texts.append([])
            texts[-1].append(token)
    return [tokenizer.decode(tokens) for tokens in texts]
