"""Prompts that the model writes itself (Magpie, arXiv 2406.08464), and tasks over texts that it wrote."""

from __future__ import annotations

import math
import re
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from specdec.drafters.ngrams.documents import tokenizer_fingerprint
from specdec.training import prompt_kinds as kinds
from specdec.training.chat import ChatEncoder
from specdec.training.progress import progress_bar
from specdec.training.prompts import DistillationPrompt, new_prompt
from specdec.training.shards import (
    OWN_PROMPTS,
    begin,
    complete,
    end_tokens,
    read_shard,
    seeded,
    shard_file,
    write_shard,
)

FORMAT = 2
TEMPERATURES = (0.8, 1.0)
TOP_P = 0.95
PROMPT_TOKENS = 96
"""Drop user turns that do not end within this number of tokens."""
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
REQUESTS_PER_TEXT = 1.5
"""Requests written per text; answers that are degenerate or not new are dropped."""

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
    writer = _Writer(model, tokenizer, encoder, Path(folder).expanduser() / OWN_PROMPTS, batch_size, seed)
    manifest = {
        "format": FORMAT,
        "model": str(model.config.name_or_path),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": [writer.before, writer.after],
        "num_prompts": count,
        "batch_size": batch_size,
        "seed": seed,
    }
    begin(writer.folder, manifest)
    with progress_bar(console) as progress:
        task = progress.add_task("writing prompts", total=count, note="")
        rows: list[Row] = []
        for row in writer.write(count):
            rows.append(row)
            progress.update(task, advance=1, note=writer.speed)
    if not rows:
        raise ValueError("the model wrote no usable prompt; give prompts of your own, in place of own_prompts")
    if len(rows) < count:
        warnings.warn(f"{len(rows)} of {count} prompts were written: the model repeats itself", stacklevel=2)
    return [
        new_prompt(f"own:{row['kind']}:{i}", encoder.prompt(_turn(row), None, "a prompt"), tokenizer)
        for i, row in enumerate(rows)
    ]


def _turn(row: Row) -> list[Row]:
    return [{"role": "user", "content": row["text"]}]


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
        self.before, self.after = self.encoder.user_turn()
        self.num_batches, self.num_tokens, self.seconds = 0, 0, 0.0
        self.ends = end_tokens(self.model, self.tokenizer)
        # A user turn ends at the token after it, or at the next line of the template where that is text.
        lines = [line for line in self.after.strip().splitlines() if line.strip()] or ["\n"]
        first = self.tokenizer(self.after.lstrip(), add_special_tokens=False).input_ids[:1]
        is_special = bool(first) and first[0] in self.tokenizer.added_tokens_decoder
        self.turn_ends = [*self.ends, *first] if is_special else self.ends
        self.stop = None if is_special else lines[0]

    @property
    def speed(self) -> str:
        """Tokens per second so far, for the progress bar."""
        return f"{self.num_tokens / self.seconds:.0f} tokens/s" if self.seconds else ""

    def write(self, count: int) -> Iterator[Row]:
        """The prompts, each with `kind` and `text`."""
        num_tasks = round(count * kinds.TASK_SHARE)
        turns = Novelty(MIN_PROMPT_WORDS)
        for kind, wanted in _shares(count - num_tasks, kinds.FREE_SHARES).items():
            yield from self._turns(kind, kinds.FIRST_WORDS[kind], wanted, turns)
        num_texts = math.ceil(num_tasks / kinds.TASKS_PER_TEXT)
        num_code = round(num_texts * kinds.CODE_SHARE)
        texts = self._texts("text", kinds.TEXT_REQUESTS, num_texts - num_code)
        texts += self._texts("code", kinds.CODE_REQUESTS, num_code)
        yield from _tasks(texts, num_tasks, np.random.default_rng(self.seed))

    def _turns(self, kind: str, words: Sequence[str], wanted: int, novelty: Novelty) -> Iterator[Row]:
        """User turns that begin with some of the words."""
        for _ in range(PATIENCE * math.ceil(wanted / self.batch_size)):
            new = self._batch(kind, novelty, lambda rng: self._user_turns(rng, words))[:wanted]
            wanted -= len(new)
            yield from new
            if not wanted:
                break

    def _texts(self, kind: str, words: Sequence[str], wanted: int) -> list[Row]:
        """The model's answers to requests for texts."""
        wanted_requests = math.ceil(wanted * REQUESTS_PER_TEXT)
        requests = list(self._turns(f"request for {kind}", words, wanted_requests, Novelty(MIN_PROMPT_WORDS)))
        starts = [self.encoder.prompt(_turn(row), None, "a request") for row in requests]
        found: list[Row] = []
        novelty = Novelty(MIN_TEXT_WORDS)

        def sample(batch: list[Any], rng: np.random.Generator) -> list[str]:
            return self._sampled(rng, batch, TEXT_TOKENS, self.ends)

        for first in range(0, len(starts), self.batch_size):
            if len(found) < wanted:
                batch = starts[first : first + self.batch_size]
                found += self._batch(kind, novelty, partial(sample, batch))
        return found[:wanted]

    def _batch(self, kind: str, novelty: Novelty, sample: Callable[[np.random.Generator], list[str]]) -> list[Row]:
        """The novel texts of a batch, which is sampled or read from an earlier run's file."""
        index, self.num_batches = self.num_batches, self.num_batches + 1
        file = shard_file(self.folder, index)
        if not file.exists():
            with seeded(self.seed, index, self.model.device):
                texts = sample(np.random.default_rng((self.seed, index)))
            write_shard(file, [{"kind": kind, "text": text} for text in texts if text])
        return [row for row in read_shard(file) if novelty.accepts(row["text"])]

    def _user_turns(self, rng: np.random.Generator, words: Sequence[str]) -> list[str]:
        chosen = [words[i] for i in rng.integers(len(words), size=self.batch_size)]
        starts = [self.tokenizer(self.before + word, add_special_tokens=False).input_ids for word in chosen]
        found = self._sampled(rng, starts, PROMPT_TOKENS, self.turn_ends, self.stop, whole=True)
        return [(word + text).strip() if text.strip() else "" for word, text in zip(chosen, found, strict=True)]

    def _sampled(
        self,
        rng: np.random.Generator,
        starts: Sequence[list[int]],
        max_new_tokens: int,
        ends: Sequence[int],
        stop: str | None = None,
        whole: bool = False,
    ) -> list[str]:
        """Continuations as text.

        Args:
            rng: Draws the temperature.
            starts: Token ids to continue.
            max_new_tokens: Longest continuation.
            ends: Tokens that end one.
            stop: Text that ends one, if no token does.
            whole: A continuation that did not end becomes empty; else, it is cut after its last full line or sentence.
        """
        kwargs: dict[str, Any] = {"stop_strings": [stop], "tokenizer": self.tokenizer} if stop else {}
        started = time.perf_counter()
        rows = complete(
            self.model, self.tokenizer, starts, ends, max_new_tokens=max_new_tokens, do_sample=True, top_k=0,
            top_p=TOP_P, temperature=float(rng.uniform(*TEMPERATURES)), **kwargs,
        )  # fmt: skip
        self.seconds += time.perf_counter() - started
        self.num_tokens += sum(map(len, rows))
        return [self._text(row, ends, stop, whole) for row in rows]

    def _text(self, row: list[int], ends: Sequence[int], stop: str | None, whole: bool) -> str:
        ended = any(token in ends for token in row[-1:])
        ids = row[:-1] if ended else row
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if stop is not None and stop in text:
            text, ended = text[: text.index(stop)], True
        if "\ufffd" in text or (whole and not ended):
            return ""
        return text.rstrip() if whole or ended else _cut(text)


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
    uses = [(use, number, row) for use in range(kinds.TASKS_PER_TEXT) for number, row in enumerate(texts)]
    for use, number, row in uses[:count]:
        tasks = kinds.CODE_TASKS if row["kind"] == "code" else kinds.TEXT_TASKS
        names = list(tasks)
        kind = names[(number + use * (len(names) // 2)) % len(names)]
        instruction = str(rng.choice(tasks[kind]))
        parts = (instruction, row["text"]) if rng.random() < 0.7 else (row["text"], instruction)
        yield {"kind": kind, "text": "\n\n".join(parts)}
