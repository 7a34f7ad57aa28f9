"""Prompts that the model writes itself (Magpie, arXiv 2406.08464), and tasks over texts that it wrote."""

from __future__ import annotations

import json
import math
import re
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from specdec.drafters.ngrams.documents import tokenizer_fingerprint
from specdec.training import prompt_kinds as kinds
from specdec.training.chat import ChatEncoder
from specdec.training.prompts import DistillationPrompt
from specdec.training.records import SHARDS
from specdec.training.shards import OWN_PROMPTS, begin, end_tokens, progress_bar, seeded, write_atomically

FORMAT = 1
TEMPERATURES = (0.8, 1.0)
TOP_P = 0.95
PROMPT_TOKENS = 96
"""A user turn that does not end within so many tokens is dropped."""
TEXT_TOKENS = 192
"""Longest text of a task, in tokens."""
MIN_PROMPT_WORDS = 4
MIN_TEXT_WORDS = 25
MIN_DISTINCT = 0.6
"""Least share of distinct trigrams; a text below it repeats itself and is dropped."""
MAX_OVERLAP = 0.5
"""Largest Jaccard overlap of trigrams with an earlier text; above it, a text is dropped as a near duplicate."""
PATIENCE = 6
"""A stage ends after this multiple of the batches it would need if no sample were dropped."""

_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+")
Row = dict[str, str]


class Novelty:
    """Finds texts that are degenerate, or equal or nearly equal to an earlier one.

    Args:
        min_words: Shorter texts are not accepted.
    """

    def __init__(self, min_words: int) -> None:
        self.min_words = min_words
        self._texts: set[tuple[str, ...]] = set()
        self._sizes: list[int] = []
        self._holders: dict[tuple[str, ...], list[int]] = defaultdict(list)

    def accepts(self, text: str) -> bool:
        """Whether the text is new and sound; if so, it is remembered."""
        words = tuple(_WORDS.findall(text.lower()))
        if len(words) < self.min_words or words in self._texts:
            return False
        grams = list(zip(words, words[1:], words[2:], strict=False))
        distinct = set(grams)
        if len(distinct) < MIN_DISTINCT * len(grams):
            return False
        shared = Counter(holder for gram in distinct for holder in self._holders.get(gram, ()))
        if any(n > MAX_OVERLAP * (len(distinct) + self._sizes[i] - n) for i, n in shared.items()):
            return False
        for gram in distinct:
            self._holders[gram].append(len(self._sizes))
        self._texts.add(words)
        self._sizes.append(len(distinct))
        return True


def write_prompts(
    model: Any,
    tokenizer: Any,
    count: int,
    folder: str | Path,
    *,
    batch_size: int = 32,
    seed: int = 0,
    chat_template: str | None = None,
    console: Console | None = None,
) -> list[DistillationPrompt]:
    """Lets a chat model write prompts: user turns, and tasks over texts that it wrote.

    User turns are sampled after the user header of the chat template and a few first words. Each batch is written at
    once; an interrupted run continues when it is started again with the same arguments, with the same result.

    Args:
        model: A causal LM with a chat template.
        tokenizer: Its tokenizer.
        count: Prompts to write.
        folder: The answers' folder; the prompts are kept in `own_prompts` in it.
        batch_size: Texts sampled at once.
        seed: Of the sampling.
        chat_template: File with a Jinja template, in place of the tokenizer's own.
        console: Where to show progress; None for nowhere.

    Returns:
        The prompts, for `distill`.

    Raises:
        ValueError: A setting is out of range, there is no chat template, or the model writes no usable prompt.
    """
    for name, value in (("own_prompts", count), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if chat_template is None and not tokenizer.chat_template:
        raise ValueError(
            f"own_prompts={count} needs a chat template, and the tokenizer has none; name a Jinja file with "
            "--chat-template, or give prompts of your own: --prompts of train-medusa, PROMPTS of distill"
        )
    encoder = ChatEncoder(tokenizer, chat_template)
    target = Path(folder).expanduser() / OWN_PROMPTS
    manifest = {
        "format": FORMAT,
        "model": str(model.config.name_or_path),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": list(encoder.user_turn()),
        "num_prompts": count,
        "batch_size": batch_size,
        "seed": seed,
    }
    begin(target, manifest)
    writer = _Writer(model, tokenizer, encoder, target, batch_size, seed)
    with progress_bar(console) as progress:
        writer.progress, writer.task = progress, progress.add_task("writing prompts", total=count, speed="")
        rows = writer.write(count)
    if not rows:
        raise ValueError("the model wrote no usable prompt; give prompts of your own, in place of own_prompts")
    if len(rows) < count:
        warnings.warn(f"{len(rows)} of {count} prompts were written: the model repeats itself", stacklevel=2)
    return [_as_prompt(i, row, encoder, tokenizer) for i, row in enumerate(rows)]


def _as_prompt(index: int, row: Row, encoder: ChatEncoder, tokenizer: Any) -> DistillationPrompt:
    ids = encoder.prompt([{"role": "user", "content": row["text"]}], None, "a prompt")
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return DistillationPrompt(f"own:{row['kind']}:{index}", tuple(ids), text)


@dataclass
class _Writer:
    """Writes user turns, then texts, then tasks over these.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        encoder: Of its chat template.
        folder: For the batches.
        batch_size: Texts sampled at once.
        seed: Of the sampling.
    """

    model: Any
    tokenizer: Any
    encoder: ChatEncoder
    folder: Path
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        self.progress: Any = None
        self.task: Any = None
        self.before, self.after = self.encoder.user_turn()
        self.num_batches, self.num_tokens, self.seconds = 0, 0, 0.0
        self.ends = end_tokens(self.model, self.tokenizer)
        lines = [line for line in self.after.strip().splitlines() if line.strip()] or ["\n"]
        first = self.tokenizer(self.after.lstrip(), add_special_tokens=False).input_ids[:1]
        is_special = bool(first) and first[0] in {*self.tokenizer.added_tokens_decoder}
        self.turn_ends = [*self.ends, *first] if is_special else self.ends
        self.stop = None if is_special else lines[0]

    def write(self, count: int) -> list[Row]:
        """The prompts, each with `kind` and `text`."""
        num_tasks = round(count * kinds.TASK_SHARE)
        prompts, turns = [], Novelty(MIN_PROMPT_WORDS)
        for kind, wanted in _shares(count - num_tasks, kinds.FREE_SHARES).items():
            found = self._turns(kind, kinds.FIRST_WORDS[kind], wanted, turns)
            prompts += found
        num_texts = math.ceil(num_tasks / kinds.TASKS_PER_TEXT)
        num_code = round(num_texts * kinds.CODE_SHARE)
        texts = self._texts("text", kinds.TEXT_REQUESTS, num_texts - num_code)
        texts += self._texts("code", kinds.CODE_REQUESTS, num_code)
        tasks = list(_tasks(texts, num_tasks, np.random.default_rng(self.seed)))
        self._advance(len(tasks))
        return prompts + tasks

    def _turns(self, kind: str, words: Sequence[str], wanted: int, novelty: Novelty, shown: bool = True) -> list[Row]:
        """User turns that begin with some of the words."""
        found: list[Row] = []
        for _ in range(PATIENCE * math.ceil(wanted / self.batch_size)):
            if len(found) >= wanted:
                break
            rows = self._batch(kind, lambda rng: self._user_turns(rng, words))
            new = [row for row in rows if novelty.accepts(row["text"])][: wanted - len(found)]
            found += new
            self._advance(len(new) if shown else 0)
        return found

    def _texts(self, kind: str, words: Sequence[str], wanted: int) -> list[Row]:
        """The model's answers to requests for texts."""
        found: list[Row] = []
        requests, novelty = Novelty(MIN_PROMPT_WORDS), Novelty(MIN_TEXT_WORDS)
        for _ in range(PATIENCE * math.ceil(wanted / self.batch_size)):
            if len(found) >= wanted:
                break
            asked = self._turns(f"request for {kind}", words, self.batch_size, requests, shown=False)
            if not asked:
                break
            starts = [self.encoder.prompt([{"role": "user", "content": row["text"]}], None, "a") for row in asked]
            rows = self._batch(
                kind, lambda rng, starts=starts: self._sampled(rng, starts, TEXT_TOKENS, self.ends, None)
            )
            found += [row for row in rows if novelty.accepts(row["text"])][: wanted - len(found)]
        return found

    def _user_turns(self, rng: np.random.Generator, words: Sequence[str]) -> list[str]:
        chosen = [words[i] for i in rng.integers(len(words), size=self.batch_size)]
        starts = [self.tokenizer(self.before + word, add_special_tokens=False).input_ids for word in chosen]
        found = self._sampled(rng, starts, PROMPT_TOKENS, self.turn_ends, self.stop, whole=True)
        return [(word + text).strip() if text.strip() else "" for word, text in zip(chosen, found, strict=True)]

    def _batch(self, kind: str, sample: Any) -> list[Row]:
        """One batch, sampled or read from an earlier run's file; rows without text are left out."""
        index, self.num_batches = self.num_batches, self.num_batches + 1
        file = self.folder / SHARDS.replace("*", f"{index:06d}")
        if not file.exists():
            with seeded(self.seed, index, self.model.device):
                texts = sample(np.random.default_rng((self.seed, index)))
            rows = [{"kind": kind, "text": text} for text in texts if text]
            write_atomically(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]

    def _sampled(
        self,
        rng: np.random.Generator,
        starts: Sequence[list[int]],
        max_new_tokens: int,
        ends: Sequence[int],
        stop: str | None,
        whole: bool = False,
    ) -> list[str]:
        """Continuations as text.

        Args:
            rng: Draws the temperature.
            starts: Token ids to continue.
            max_new_tokens: Longest continuation.
            ends: Tokens that end one.
            stop: Text that ends one, where no token does.
            whole: A continuation that did not end becomes empty; else, it is cut after its last full line or sentence.
        """
        padding = next((i for i in (self.tokenizer.pad_token_id, *ends) if i is not None), 0)
        width = max(map(len, starts))
        ids = torch.tensor([[padding] * (width - len(start)) + list(start) for start in starts])
        mask = torch.tensor([[0] * (width - len(start)) + [1] * len(start) for start in starts])
        extra = {"stop_strings": [stop], "tokenizer": self.tokenizer} if stop else {}
        started = time.perf_counter()
        output = self.model.generate(
            input_ids=ids.to(self.model.device), attention_mask=mask.to(self.model.device), pad_token_id=padding,
            eos_token_id=list(ends) or None, max_new_tokens=max_new_tokens, do_sample=True, top_k=0, top_p=TOP_P,
            temperature=float(rng.uniform(*TEMPERATURES)), **extra,
        )[:, width:].tolist()  # fmt: skip
        self.seconds += time.perf_counter() - started
        return [self._text(row, ends, stop, whole) for row in output]

    def _text(self, row: list[int], ends: Sequence[int], stop: str | None, whole: bool) -> str:
        size = next((i for i, token in enumerate(row) if token in ends), len(row))
        self.num_tokens += size
        text = self.tokenizer.decode(row[:size], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ended = size < len(row)
        if stop is not None and stop in text:
            text, ended = text[: text.index(stop)], True
        if "\ufffd" in text or (whole and not ended):
            return ""
        return text.rstrip() if whole or ended else _cut(text)

    def _advance(self, count: int) -> None:
        if self.progress is not None:
            speed = f"{self.num_tokens / self.seconds:.0f} tokens/s" if self.seconds else ""
            self.progress.update(self.task, advance=count, speed=speed)


def _cut(text: str) -> str:
    """The text up to its last full sentence or line."""
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)|[\u3002\uff01\uff1f]|\n", text)]
    return (text[: ends[-1]] if ends else text).strip()


def _shares(count: int, shares: dict[str, float]) -> dict[str, int]:
    """Divides a count; what rounding leaves goes to the first."""
    parts = {name: int(count * share) for name, share in shares.items()}
    parts[next(iter(parts))] += count - sum(parts.values())
    return parts


def _tasks(texts: Sequence[Row], count: int, rng: np.random.Generator) -> Iterator[Row]:
    """Tasks over the texts: each text with different kinds of instructions, before or after it."""
    left = count
    for use in range(kinds.TASKS_PER_TEXT):
        for number, row in enumerate(texts):
            if not left:
                return
            tasks = kinds.CODE_TASKS if row["kind"] == "code" else kinds.TEXT_TASKS
            names = list(tasks)
            kind = names[(number + use * (len(names) // 2)) % len(names)]
            instruction = str(rng.choice(tasks[kind]))
            parts = (instruction, row["text"]) if rng.random() < 0.7 else (row["text"], instruction)
            yield {"kind": kind, "text": "\n\n".join(parts)}
            left -= 1
