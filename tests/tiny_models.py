"""Tiny random models, their tokenizer, and prompts."""

from __future__ import annotations

import string
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

PAD, BOS, EOS = 0, 1, 2
FIRST_TOKEN = 3
VOCAB = 97
WINDOW = 8

# A wide initialisation gives varied text, and logits far enough apart for rounding not to matter.
LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.4,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
GPT2_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 1024,
    "initializer_range": 0.4,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}

MODELS: dict[str, Callable[[], tuple[type, Any]]] = {
    "llama": lambda: (tf.LlamaForCausalLM, tf.LlamaConfig(**LLAMA_LIKE)),
    "gpt2": lambda: (tf.GPT2LMHeadModel, tf.GPT2Config(**GPT2_LIKE)),
    "qwen3": lambda: (tf.Qwen3ForCausalLM, tf.Qwen3Config(**LLAMA_LIKE, head_dim=8)),
    "mistral-window": lambda: (tf.MistralForCausalLM, tf.MistralConfig(**LLAMA_LIKE, sliding_window=WINDOW)),
    "gemma3-mixed-windows": lambda: (
        tf.Gemma3ForCausalLM,
        tf.Gemma3TextConfig(
            **LLAMA_LIKE | {"num_hidden_layers": 3},
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "gemma2-softcap": lambda: (
        tf.Gemma2ForCausalLM,
        tf.Gemma2Config(
            **LLAMA_LIKE | {"num_hidden_layers": 3},
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=WINDOW,
            attn_logit_softcapping=5.0,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "llama4-chunks": lambda: (
        tf.Llama4ForCausalLM,
        tf.Llama4TextConfig(
            **LLAMA_LIKE,
            head_dim=8,
            intermediate_size_mlp=48,
            num_local_experts=2,
            num_experts_per_tok=1,
            attention_chunk_size=WINDOW,
            layer_types=["chunked_attention", "full_attention"],
            no_rope_layers=[1, 0],
        ),
    ),
}


def new_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model of its own, for tests that change it."""
    model_class, config = MODELS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).eval()


@cache
def tiny_model(name: str = "llama") -> Any:
    """A tiny random model that the tests of a process share; it must not be changed."""
    return new_model(name)


@cache
def tiny_tokenizer() -> tf.PreTrainedTokenizerFast:
    """One character per token id."""
    letters = string.ascii_lowercase + string.digits + string.ascii_uppercase + string.punctuation + " "
    vocab = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS}
    vocab |= {letter: FIRST_TOKEN + i for i, letter in enumerate(letters[: VOCAB - FIRST_TOKEN])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def prompts(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    """Random prompts, left-padded to the longest, as keyword arguments of `generate`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_TOKEN, VOCAB, (len(lengths), max(lengths)), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, max(lengths) - length :] = 1
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}
