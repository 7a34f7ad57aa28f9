"""The tokenizer of the test bed, and chains of steps as training examples."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from task import (
    BREAK,
    HIGHEST,
    JUDGE_PROMPT,
    LOWEST,
    OPENERS,
    SIGNS,
    STEP,
    STEPS,
    Operation,
    Problem,
    corrupt,
    draw_operation,
    draw_problem,
    label,
    score,
    without_numbers,
    write_step,
)
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

END, PAD, USER, ASSISTANT = "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
THINK, UNTHINK = "<think>", "</think>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# Words take a sign or space along, digits stand alone, a full stop and the blank line after it are one piece.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
VOCAB_SIZE = 512
HELD_OUT = 1000
"""Problems with these numbers are never trained on."""

RESULT_WEIGHT = 4.0
"""A phrase may be said in many ways, a result and a score in one: they teach more than their share of tokens."""
NONE = -1
"""Stands in a batch where a token has no score, or none that ought to be in its place."""


def held_out_problem(number: int) -> Problem:
    return draw_problem(random.Random(f"held-out {number}"))


@cache
def _held_out() -> frozenset[str]:
    return frozenset(str(held_out_problem(number)) for number in range(HELD_OUT))


def training_problem(rng: random.Random) -> Problem:
    while True:
        problem = draw_problem(rng)
        if str(problem) not in _held_out():
            return problem


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE on examples of the task and saves it with the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END, PAD, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random("tokenizer")
    texts = [f"{problem} {_solution(problem, rng)}{BREAK}{JUDGE_PROMPT}" for problem in map(draw_problem, [rng] * 2000)]
    tokenizer.train_from_iterator(texts, trainer)
    # transformers' reasoning models hold these two as tokens that are no special tokens: decoding shows them
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in (THINK, UNTHINK)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def _solution(problem: Problem, rng: random.Random) -> str:
    values = problem.values
    steps = [
        write_step(i, operation, values[i], values[i + 1], rng, short=rng.random() < 0.2)
        for i, operation in enumerate(problem.operations)
    ]
    return "".join(map(str, steps)) + f"{UNTHINK}{BREAK}The result is {problem.answer}."


@dataclass
class Example:
    """Token ids of one chain, how much each weighs in the loss, and judgements as branches of it.

    Args:
        ids: Prompt and chain.
        weights: One per id; 0 where nothing is to be learned.
        judged: For each judged step the length of the chain up to its end, and its score.
        rights: One per id: the token that ought to stand there, for digits and signs where that can be said; else NONE.
    """

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    judged: list[tuple[int, int]] = field(default_factory=list)
    rights: list[int] = field(default_factory=list)

    def add(self, ids: list[int], weight: float, rights: Sequence[int] | None = None) -> None:
        self.ids += ids
        self.weights += [weight] * len(ids)
        self.rights += [NONE] * len(ids) if rights is None else rights


@dataclass(frozen=True)
class Mixture:
    """What the target's examples are made of.

    Args:
        by_draft: Share of chains that the draft wrote.
        wrong_chains: Share of the others that hold wrong steps.
        wrong: Share of the steps in these that are wrong.
        judged: Whether scores are asked for; where they are not there is room for longer chains.
        short: Share of the steps that are in short.
    """

    by_draft: float = 0.3
    wrong_chains: float = 0.6
    wrong: float = 0.4
    judged: bool = True
    short: float = 0.3


class Writer:
    """Writes training examples of either model.

    Args:
        tokenizer: That of `make_tokenizer`.
        draft_chains: Chains that the draft wrote, for the target to judge; see `make.py chains`.
        mixture: What the target's examples are made of.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        draft_chains: list[dict[str, Any]] | None = None,
        mixture: Mixture | None = None,
    ) -> None:
        self.mixture = mixture or Mixture()
        self.tokenizer = tokenizer
        self._encode_text = cache(tokenizer.backend_tokenizer.encode)
        self.draft_chains = draft_chains or []
        self.end = tokenizer.eos_token_id
        self.pad = tokenizer.pad_token_id
        self.judge_ids = self.encode(JUDGE_PROMPT)
        self.digit_ids = [self.encode(str(digit))[0] for digit in range(10)]

    def encode(self, text: str) -> list[int]:
        return list(self._encode_text(text).ids)

    def prompt(self, problem: Problem) -> list[int]:
        return self.encode(f"{USER}{problem}{ASSISTANT}{THINK}\n")

    def _finish(self, example: Example, answer: int) -> Example:
        example.add(self.encode(f"{UNTHINK}{BREAK}The result is "), 1.0)
        example.add(self.encode(str(answer)), RESULT_WEIGHT)
        example.add([*self.encode("."), self.end], 1.0)
        return example

    def for_draft(self, rng: random.Random) -> Example:
        """A right solution, easy steps in short; some of them in full, as the target writes them, to go on from."""
        problem = training_problem(rng)
        example = Example()
        example.add(self.prompt(problem), 0.0)
        for i, operation in enumerate(problem.operations):
            values = problem.values
            given = operation.easy and rng.random() < 0.25
            step = write_step(i, operation, values[i], values[i + 1], rng, short=operation.easy and not given)
            weight = 0.0 if given else 1.0
            example.add(self.encode(f"({step.label}) {step.opener}{step.sum}"), weight)
            example.add(self.encode(str(step.result)), RESULT_WEIGHT)
            example.add(self.encode(f".{step.closer}{BREAK}"), weight)
        return self._finish(example, problem.answer)

    def for_target(self, rng: random.Random) -> Example:
        """A solution to learn by, every step of it judged; or a chain of the draft's, only to be judged."""
        if self.draft_chains and rng.random() < self.mixture.by_draft:
            return self.of_chain(rng.choice(self.draft_chains))
        wrong = self.mixture.wrong if rng.random() < self.mixture.wrong_chains else 0.0
        value = start = rng.randint(LOWEST, HIGHEST)
        operations: list[Operation] = []
        steps: list[tuple[str, Operation, int, float]] = []
        planned = rng.randint(*STEPS)
        upcoming = draw_operation(value, rng)
        for i in range(planned):
            operation = upcoming
            operations.append(operation)
            right = operation.apply(value)
            assert right is not None
            done, read, result = operation, value, right
            if rng.random() < wrong:
                others = tuple(draw_operation(value, rng) for _ in range(3)) + tuple(operations[:-1])
                done, read, result = corrupt(operation, value, others, rng)
            short = rng.random() < self.mixture.short
            step = str(write_step(i, done, read, result, rng, short))
            is_model = not short and (done, read) == (operation, value)
            steps.append((step, operation, value, 1.0 if is_model else 0.0))
            value = result
            upcoming = draw_operation(value, rng)
        problem = Problem(start, tuple(operations))
        if str(problem) in _held_out():
            return self.for_target(rng)
        example = Example()
        example.add(self.prompt(problem), 0.0)
        for i, step_so in enumerate(steps):
            self._add_judged(example, i, *step_so)
        if not self.mixture.judged:
            example.judged.clear()
        return self._finish(example, value)

    def of_chain(self, chain: dict[str, Any]) -> Example:
        """A chain of the draft's, every step of it judged."""
        problem = problem_of(chain)
        example = Example()
        example.add(self.prompt(problem), 0.0)
        value = problem.start
        for i, (operation, text) in enumerate(zip(problem.operations, chain["steps"], strict=False)):
            if operation.apply(value) is None:
                break  # a wrong value leads on to what the rubric knows nothing of
            self._add_judged(example, i, text, operation, value, 0.0)
            match = STEP.fullmatch(text.strip())
            value = int(match["result"]) if match else 0
        return example

    def _add_judged(
        self, example: Example, index: int, text: str, operation: Operation, value: int, weight: float
    ) -> None:
        """Adds a step that is to be judged; `weight` is that of its words; right digits are learned from any step."""
        points, match = score(text, index, operation, value), STEP.match(text)
        if match is None:
            example.add(self.encode(text), 0.0)
        else:
            total, result = text[match.start("value") : match.start("result")], match["result"]
            wanted = f"{value}{SIGNS[operation.kind]}{operation.number}="
            right = str(operation.apply(value))
            head = self.encode(text[: match.start("value")])
            example.add(head, weight, self._rights_of_opener(head, match["opener"], operation, value, index))
            rights = [
                token if total[:n] == wanted[:n] else NONE
                for n, token in enumerate([*self.encode(wanted), *[NONE] * len(total)][: len(total)])
            ]
            # once begun in short, a step goes on in short: all but its first digit is as good as in full
            follows = 1.0 if not match["opener"] and total == wanted else weight
            example.add(self.encode(total[0]), weight, rights[:1])
            example.add(self.encode(total[1:]), follows, rights[1:])
            is_comparable = total == wanted and len(result) == len(right)
            result_weight = RESULT_WEIGHT if points == 9 else 0.0
            example.add(self.encode(result), result_weight, self.encode(right) if is_comparable else None)
            example.add(self.encode(text[match.end("result") :]), weight)
        example.judged.append((len(example.ids), points))

    def _rights_of_opener(
        self, ids: list[int], opener: str, operation: Operation, value: int, index: int
    ) -> list[int] | None:
        """What the digits in the words before a sum ought to be, if the words are those of the operation."""
        for words in OPENERS[operation.kind]:
            if opener and without_numbers(words) == without_numbers(opener):
                proper = self.encode(f"({label(index)}) {words.format(n=operation.number, v=value)}")
                if len(proper) == len(ids):
                    return [token if token in self.digit_ids else NONE for token in proper]
        return None

    def size(self, example: Example) -> int:
        """Tokens of the example with its judgements."""
        return len(example.ids) + len(self.judge_ids) * len(example.judged)

    def batch(self, examples: list[Example], length: int) -> dict[str, Tensor]:
        """Examples as rows of one length, each judgement a branch that sees the chain up to its step.

        Returns:
            `ids` and `position_ids`: [batch, length]; `mask`: additive, [batch, 1, length, length]; `targets`, the next
            ids, and `weights`, of chains alone; `rights`; `scores`, where a question ends, and `totals`, the same where
            the step does; `is_chain`: [batch, length].
        """
        rows = [self._row(example, length) for example in examples]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, example: Example, length: int) -> dict[str, Tensor]:
        chain = len(example.ids)
        branch = len(self.judge_ids)
        if self.size(example) > length:
            raise ValueError(f"an example of {self.size(example)} tokens does not fit into rows of {length}")
        ids = torch.full((length,), self.pad)
        targets, weights = torch.zeros(length, dtype=torch.long), torch.zeros(length)
        positions = torch.arange(length)
        allowed = torch.ones(length, length, dtype=torch.bool).tril()
        ids[:chain] = torch.tensor(example.ids)
        targets[: chain - 1] = ids[1:chain]
        weights[: chain - 1] = torch.tensor(example.weights[1:])
        rights, scores, totals = (torch.full((length,), NONE) for _ in range(3))
        rights[:chain] = torch.tensor(example.rights, dtype=torch.long)
        start = chain
        for anchor, points in example.judged:
            stop = start + branch
            ids[start:stop] = torch.tensor(self.judge_ids)
            positions[start:stop] = torch.arange(anchor, anchor + branch)
            allowed[start:stop, anchor:start] = False
            scores[stop - 1] = totals[anchor - 1] = points
            start = stop
        mask = torch.zeros(length, length).masked_fill(~allowed, torch.finfo(torch.float32).min)
        learned = {"targets": targets, "weights": weights, "rights": rights, "scores": scores, "totals": totals}
        learned["is_chain"] = torch.arange(length) < chain
        return {"ids": ids, "position_ids": positions, "mask": mask[None], **learned}


def problem_of(chain: dict[str, Any]) -> Problem:
    return Problem(chain["start"], tuple(Operation(kind, number) for kind, number in chain["operations"]))


def read_chains(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def problems(count: int, first: int = 0) -> Iterator[Problem]:
    """Held-out problems, from number `first` on."""
    return map(held_out_problem, range(first, first + count))
