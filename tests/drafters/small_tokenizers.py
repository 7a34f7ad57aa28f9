"""Small tokenizers of the kinds that models come with, made in the process."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

EOS, PAD = "<|endoftext|>", "<|pad|>"

TEXT = '''def read(path: str, encoding: str = "utf-8") -> list[str]:
    """Reads the lines of a file.

    The file is closed again, also when reading fails. Naïve café, 20 € — žluťoučký kůň, 東京 and 🚀🎉.
    """
    with open(path, encoding=encoding) as file:
        return [line.rstrip("\\n") for line in file if not line.startswith("#")]


class Reader:
    def __init__(self, path: str) -> None:
        self.path = path
        self.lines: list[str] = []

    def read(self) -> list[str]:
        for line in read(self.path):
            self.lines.append(line)
        return self.lines
'''


def byte_level(vocab_size: int = 400, text: str = TEXT, special: Sequence[str] = (EOS, PAD)) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as of GPT-2, Llama 3 and Qwen; without a beginning-of-text token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text] * 4, trainer)
    pad = special[1] if len(special) > 1 else None
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=special[0], pad_token=pad)


def reordered(tokenizer: PreTrainedTokenizerFast, order: Sequence[int]) -> PreTrainedTokenizerFast:
    """The same tokenizer with other ids: the token that had the id `order[i]` has the id i."""
    saved = json.loads(tokenizer.backend_tokenizer.to_str())
    new_ids = {old: new for new, old in enumerate(order)}
    saved["model"]["vocab"] = {token: new_ids[old] for token, old in saved["model"]["vocab"].items()}
    for token in saved["added_tokens"]:
        token["id"] = new_ids[token["id"]]
    saved["added_tokens"].sort(key=lambda token: token["id"])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(saved)),
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
    )


def sentencepiece(vocab_size: int = 300, text: str = TEXT, prefix: str = "prepend") -> PreTrainedTokenizerFast:
    """BPE with `▁` for spaces and `<0xE2>` for bytes, as of Llama 2, Mistral and Gemma.

    Args:
        vocab_size: Without bytes and special tokens.
        text: What it is trained on.
        prefix: How a space gets before a text: `"prepend"` by the normalizer, `"metaspace"`, or `"none"`.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    ascii_text = "".join(char for char in text if char.isascii())
    trained.train_from_iterator([ascii_text] * 4, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [token for token in model["vocab"] if token not in tokens]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge) for merge in model["merges"]]
    bpe = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix == "metaspace":
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        replace = normalizers.Replace(" ", "▁")
        first = [normalizers.Prepend("▁")] if prefix == "prepend" else []
        bpe.normalizer = normalizers.Sequence([*first, replace])
    if prefix != "none":
        steps.append(decoders.Strip(" ", 1, 0))
    bpe.decoder = decoders.Sequence(steps)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def word_piece(vocab_size: int = 300, text: str = TEXT) -> PreTrainedTokenizerFast:
    """WordPiece, which changes the text: it lower-cases, and its spaces cannot be had back."""
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=["[PAD]", "[UNK]", "[SEP]"], show_progress=False
    )
    pieces.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="[UNK]", pad_token="[PAD]", eos_token="[SEP]")


def words(count: int = 50) -> PreTrainedTokenizerFast:
    """One token a word, and no decoder."""
    vocab = {"[UNK]": 0, "[EOS]": 1} | {f"w{i}": i + 2 for i in range(count)}
    level = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=level, unk_token="[UNK]", eos_token="[EOS]")
