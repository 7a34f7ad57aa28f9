"""What the tests share: tiny models, drafters of a known quality, and the check that output is that of `generate`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

import specdec
from specdec.budget import Budget
from specdec.drafters import (
    DraftContext,
    Drafter,
    DraftModelDrafter,
    Eagle3Drafter,
    LookaheadDrafter,
    MedusaDrafter,
    SpecReasonDrafter,
    Step,
)
from specdec.drafters.base import DraftSession
from specdec.drafters.medusa import HeadLists, MedusaSession
from specdec.heads import Eagle3Head, MedusaHeads
from specdec.passes.attention.choice import AttentionLike
from specdec.report import SpeculationReport
from specdec.tree import TokenTree
from tests.tiny_models import PAD, VOCAB, tiny_model, tiny_tokenizer

Answers = list[list[int]]
"""Per row of the batch the tokens that plain decoding generates, without the padding behind the end."""

# --- drafters ---------------------------------------------------------------------------------------------------------


def next_answers(answers: Answers, context: DraftContext) -> Answers:
    """Per active row what plain decoding generates next, at most as many tokens as can still be used."""
    out = []
    for i, row in enumerate(context.rows):
        num_generated = len(context.sequences[i]) - context.prompt_lengths[i]
        answer = answers[row] if row < len(answers) else []
        out.append(answer[num_generated:][: context.max_depth[i]])
    return out


@dataclass
class OracleDrafter(Drafter):
    """Is always right.

    Args:
        answers: What to propose. The last token comes from the target pass itself.
        decoys: Let the right path wind through a branching tree, where it is nowhere in place.
        max_nodes: Largest tree.
    """

    answers: Answers
    decoys: bool = True
    max_nodes: int = 16
    name = "oracle"

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        max_nodes = min(max_nodes, self.max_nodes)
        all_tokens, all_parents = [], []
        for i, answer in enumerate(next_answers([row[:-1] for row in self.answers], context)):
            tokens, parents, last = [int(context.sequences[i][-1])], [-1], 0
            for token in answer:
                decoys = 2 if self.decoys else 0
                if len(tokens) + decoys + 1 > max_nodes:
                    break
                if decoys:
                    tokens += [(token + 1) % VOCAB, token]  # the second one is right, but its parent is not
                    parents += [last, len(tokens) - 2]
                tokens.append(token)
                parents.append(last)
                last = len(tokens) - 1
            all_tokens.append(tokens)
            all_parents.append(parents)
        return TokenTree.from_rows(all_tokens, all_parents, [[0.95] * len(row) for row in all_tokens])


@dataclass
class AlwaysWrongDrafter(Drafter):
    """Is never right: at each depth it proposes everything near the right token, but not that."""

    answers: Answers
    max_nodes: int = 8
    name = "always-wrong"

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        all_tokens, all_parents = [], []
        for i, answer in enumerate(next_answers(self.answers, context)):
            tokens, parents = [int(context.sequences[i][-1])], [-1]
            for depth, token in enumerate(answer[: (min(max_nodes, self.max_nodes) - 1) // 2]):
                tokens += [(token + 1) % VOCAB, (token + 2) % VOCAB]
                parents += [max(0, 2 * depth - 1)] * 2
            all_tokens.append(tokens)
            all_parents.append(parents)
        return TokenTree.from_rows(all_tokens, all_parents, [[0.5] * len(row) for row in all_tokens])


@dataclass
class RandomTreeDrafter(Drafter):
    """Random branching trees, now and then right.

    Rows differ in size, some have their root only, siblings may be equal, and padding may stand between real nodes.
    """

    answers: Answers
    seed: int = 0
    max_nodes: int = 16
    name = "random-tree"
    random: np.random.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        rows = []
        for i, answer in enumerate(next_answers(self.answers, context)):
            root = int(context.sequences[i][-1])
            rows.append(self._row(root, answer, min(max_nodes, self.max_nodes), context.max_depth[i]))
        tokens, parents, scores = zip(*rows, strict=True)
        return TokenTree.from_rows(tokens, parents, scores)

    def _row(
        self, root: int, answer: list[int], max_nodes: int, max_depth: int
    ) -> tuple[list[int], list[int], list[float]]:
        tokens, parents, depths, right = [root], [-1], [0], [True]
        size = 1 if self.random.random() < 0.15 else int(self.random.integers(1, max_nodes + 1))
        while len(tokens) < size:
            possible = [node for node, depth in enumerate(depths) if 0 <= depth < max_depth]
            if not possible:
                break
            is_padding = self.random.random() < 0.1
            parent = int(self.random.choice(possible[-4:]))
            depth = depths[parent]
            knows = right[parent] and depth < len(answer) and self.random.random() < 0.7
            token = answer[depth] if knows else int(self.random.integers(VOCAB))
            tokens.append(token)
            parents.append(-1 if is_padding else parent)
            depths.append(-1 if is_padding else depth + 1)
            right.append(not is_padding and knows)
        return tokens, parents, self.random.random(len(tokens)).tolist()


@dataclass
class FailingDrafter(Drafter):
    """Proposes like another drafter and raises in one of its methods.

    Args:
        inner: Does the work before.
        method: Where to raise.
        at_step: At which call of that method, from 0.
        error: What to raise.
    """

    inner: Drafter
    method: str = "propose"
    at_step: int = 2
    error: BaseException = field(default_factory=lambda: RuntimeError("the drafter is broken"))
    name = "failing"
    calls: dict[str, int] = field(init=False, default_factory=dict)
    session: DraftSession | None = field(init=False, default=None)

    def _call(self, method: str, *args: Any) -> Any:
        count = self.calls.get(method, 0)
        self.calls[method] = count + 1
        if method == self.method and count == self.at_step:
            raise self.error
        return getattr(self.inner if method == "start" else self.session, method)(*args)

    def start(self, context: DraftContext) -> DraftSession:
        self.session = self._call("start", context)
        return self

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        return self._call("propose", context, max_nodes)

    def observe(self, context: DraftContext, step: Step) -> None:
        self._call("observe", context, step)

    def finish(self, context: DraftContext) -> None:
        self._call("finish", context)


def lookahead(answers: Answers) -> Drafter:
    """Retrieval that has seen every second row's output, as after an earlier call."""
    drafter = LookaheadDrafter(shared_bytes=2**20, corpus_bytes=2**20)
    for answer in answers[::2]:
        drafter.add(answer, scope="shared")
    return drafter


def random_heads(model: Any, num_heads: int = 3, spread: float = 0.3) -> MedusaHeads:
    """Heads some way from the identity, so that their lists differ."""
    heads = MedusaHeads.for_model(model, num_heads)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in heads.weights:
            weight.normal_(0.0, spread, generator=generator)
    return heads


class RandomMedusaDrafter(MedusaDrafter):
    """Untrained heads, made for the model that the drafter is bound to."""

    def _load(self, model: Any) -> MedusaHeads:
        return random_heads(model)


@dataclass(eq=False)
class TaughtMedusaDrafter(RandomMedusaDrafter):
    """Untrained heads with the right token put into some of the lists, at any rank."""

    answers: Answers = field(default_factory=list)
    random: np.random.Generator = field(init=False, repr=False, default_factory=lambda: np.random.default_rng(0))

    def start(self, context: DraftContext) -> DraftSession:
        session = super().start(context)
        assert isinstance(session, MedusaSession)
        return TaughtMedusaSession(self, session.heads_pass)


class TaughtMedusaSession(MedusaSession):
    """See `TaughtMedusaDrafter`."""

    drafter: TaughtMedusaDrafter

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        self.right = next_answers(self.drafter.answers, context)
        return super().propose(context, max_nodes)

    def _lists(self, hidden: Tensor) -> HeadLists:
        lists, random = super()._lists(hidden), self.drafter.random
        for row, answer in enumerate(self.right):
            for head, token in enumerate(answer[: lists.tokens.shape[1]]):
                if token not in lists.tokens[row, head] and random.random() < 0.7:
                    lists.tokens[row, head, random.integers(3)] = token
        return lists


def random_eagle3(model: Any, draft_tokens: Any = None) -> Eagle3Head:
    """An untrained EAGLE-3 head."""
    torch.manual_seed(0)
    return Eagle3Head.for_model(model, draft_tokens)


class RandomEagle3Drafter(Eagle3Drafter):
    """An untrained head, made for the model that the drafter is bound to."""

    def bind(self, model: Any) -> None:
        if self._head is None:
            self.head = random_eagle3(model)
        super().bind(model)


@dataclass(eq=False)
class TaughtEagle3Drafter(RandomEagle3Drafter):
    """An untrained head whose trees have the right token put in at some nodes."""

    answers: Answers = field(default_factory=list)

    def start(self, context: DraftContext) -> DraftSession:
        return _Taught(super().start(context), self.answers)


class _Taught(DraftSession):
    def __init__(self, inner: DraftSession, answers: Answers) -> None:
        self.inner, self.answers, self.random = inner, answers, np.random.default_rng(0)

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        tree = self.inner.propose(context, max_nodes)
        tokens = tree.tokens.clone()
        for row, answer in enumerate(next_answers(self.answers, context)):
            taken = {-1}
            for node in range(1, tree.num_nodes):
                parent, depth = int(tree.parents[row, node]), int(tree.depths[row, node])
                if parent not in taken and 0 < depth <= len(answer) and self.random.random() < 0.7:
                    tokens[row, node] = answer[depth - 1]
                    taken.add(parent)
        return TokenTree(tokens, tree.parents, tree.scores)

    def observe(self, context: DraftContext, step: Step) -> None:
        self.inner.observe(context, step)


@cache
def draft_of(name: str, noise: float = 0.1) -> Any:
    """A draft model that is right now and then: the tiny model with noise on its weights. It must not be changed."""
    draft = copy.deepcopy(tiny_model(name))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in draft.parameters():
            weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    return draft


def draft_model(**settings: Any) -> Callable[[Answers], Drafter]:
    """A row of `DRAFTERS`: a draft model that grows small trees in some way."""
    return lambda answers: DraftModelDrafter(**{"draft_model": draft_of("llama"), "max_nodes": 16} | settings)


def spec_reason(**settings: Any) -> Drafter:
    """Steps of a draft model, short ones, with whatever drafts the target's own."""
    tokenizers = {"tokenizer": tiny_tokenizer(), "target_tokenizer": tiny_tokenizer()}
    bounds = {"step_end": "e", "max_step_tokens": 9, "thinking_end": "Z"}
    return SpecReasonDrafter(**{"draft_model": draft_of("llama"), **tokenizers, **bounds} | settings)


DRAFT_MODELS: dict[str, Callable[[Answers], Drafter | None]] = {
    "draft-model": draft_model(),
    "draft-chain": draft_model(growth="chain", max_nodes=8),
    "draft-paced": draft_model(growth="paced", max_depth=4),
    "draft-self": draft_model(draft_model="self", layers=1, max_depth=4),
    "draft-model-uncoupled": draft_model(coupled=False),
    "draft-chain-uncoupled": draft_model(growth="chain", max_nodes=8, coupled=False),
    "draft-paced-uncoupled": draft_model(growth="paced", max_depth=4, coupled=False),
    "spec-reason": lambda answers: spec_reason(),
    "spec-reason-lookahead": lambda answers: spec_reason(drafter=lookahead(answers)),
}
"""Every growth; without the target's noise too, which greedy decoding has none of. Then steps."""


DRAFTERS: dict[str, Callable[[Answers], Drafter | None]] = {
    "off": lambda answers: None,
    **DRAFT_MODELS,
    "lookahead": lookahead,
    "medusa": lambda answers: RandomMedusaDrafter(max_nodes=16),
    "medusa-taught": lambda answers: TaughtMedusaDrafter(max_nodes=16, answers=answers),
    "medusa-ranks": lambda answers: TaughtMedusaDrafter(max_nodes=16, dynamic=False, answers=answers),
    "eagle3": lambda answers: RandomEagle3Drafter(max_nodes=16, top_k=3, max_depth=4),
    "eagle3-taught": lambda answers: TaughtEagle3Drafter(
        max_nodes=16, top_k=3, max_depth=4, least_probability=0.0, answers=answers
    ),
    "oracle": OracleDrafter,
    "always-wrong": AlwaysWrongDrafter,
    "random-tree": RandomTreeDrafter,
}
"""One row per drafter, made for rows whose right answers are known. Every row goes through tests/test_identity.py."""

# --- the check --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What plain decoding gives: tokens, and the global generator's state afterwards."""

    ids: Tensor
    answers: Answers
    rng_state: Tensor


def eos_ids(model: Any, kwargs: Mapping[str, Any]) -> set[int]:
    """The end-of-sequence ids of a call."""
    eos = kwargs.get("eos_token_id", model.generation_config.eos_token_id)
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


def answers_of(ids: Tensor, prompt: int, eos: set[int], trim: bool = False) -> Answers:
    """Generated tokens of each row up to its end; with `trim`, padding at the end is no token."""
    answers = []
    for row in ids[:, prompt:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in eos), len(row))
        while trim and end and row[end - 1] == PAD:
            end -= 1
        answers.append(row[:end])
    return answers


def reference(model: Any, inputs: Mapping[str, Any], seed: int = 0, **kwargs: Any) -> Reference:
    """Plain decoding under a seed."""
    torch.manual_seed(seed)
    ids = model.generate(**inputs, **kwargs)
    state = torch.get_rng_state()
    prompt = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return Reference(ids, answers_of(ids, prompt, eos_ids(model, kwargs), "stop_strings" in kwargs), state)


def assert_identical(
    model: Any,
    drafter: Callable[[Answers], Drafter | None] | Drafter | str | None,
    inputs: Mapping[str, Any],
    *,
    seed: int = 0,
    budget: Budget | None = None,
    expected: Reference | None = None,
    capability: str = "auto",
    attention: AttentionLike = "auto",
    cuda_graphs: Any = "auto",
    compiled: bool = False,
    **kwargs: Any,
) -> SpeculationReport:
    """Asserts that speculation gives the tokens of plain decoding, and leaves the same generator state.

    Args:
        model: The target.
        drafter: A drafter, or a function that makes one from the right answers (a row of `DRAFTERS`).
        inputs: The prompts, as keyword arguments of `generate`.
        seed: Set before each of the two calls.
        budget: By default every proposal is verified as it is.
        expected: Plain decoding's result, when it is known already.
        capability: How to run the target.
        attention: What computes attention over trees.
        cuda_graphs: As for `accelerate`.
        compiled: As for `accelerate`.
        kwargs: Other arguments of `generate`.

    Returns:
        The report of the speculative call.
    """
    expected = expected or reference(model, inputs, seed, **kwargs)
    if callable(drafter):
        drafter = drafter(expected.answers)
    budget = budget or Budget(64, fixed=True)
    fast = specdec.accelerate(
        model,
        drafter,
        strict=True,
        budget=budget,
        capability=capability,
        attention=attention,
        cuda_graphs=cuda_graphs,
        compiled=compiled,
    )
    torch.manual_seed(seed)
    ids = fast.generate(**inputs, **kwargs)
    assert ids.tolist() == expected.ids.tolist(), f"tokens differ from plain decoding's (seed {seed})"
    assert ids.dtype == expected.ids.dtype
    assert torch.equal(torch.get_rng_state(), expected.rng_state), f"the generator's state differs (seed {seed})"
    return fast.report


# --- trees ------------------------------------------------------------------------------------------------------------


def random_tree(seed: int, batch: int = 3, nodes: int = 12, padding: float = 0.15) -> TokenTree:
    """A random branching tree per row, with padding anywhere."""
    random = np.random.default_rng(seed)
    parents = np.full((batch, nodes), -1)
    for row in range(batch):
        real = [0]
        for node in range(1, nodes):
            if random.random() >= padding:
                parents[row, node] = random.choice(real)
                real.append(node)
    tokens = random.integers(0, 50, (batch, nodes))
    scores = random.random((batch, nodes)).astype(np.float32)
    return TokenTree(torch.tensor(tokens), torch.tensor(parents), torch.tensor(scores))


def ancestors(parents: list[int], node: int) -> list[int]:
    """The node and its ancestors, from the root down."""
    path = [node]
    while path[0] > 0:
        path.insert(0, max(parents[path[0]], 0))
    return path
