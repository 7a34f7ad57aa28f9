"""Generation with drawn drafts: the rules that promise the target's distribution, in the whole loop."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import specdec
from specdec.budget import Budget
from specdec.drafters import DraftContext, Drafter
from specdec.drafters.base import DraftSession
from specdec.rows.draws import NoiseQueue
from specdec.tree import TokenTree
from specdec.verifiers import VERIFIERS, BlockVerifier, TraversalVerifier, Verifier
from specdec.verifiers.draft_sampling import RandomDraws
from tests.conformance import DRAFTERS, assert_identical, reference
from tests.tiny_models import EOS, PAD, prompts, tiny_model, tiny_tokenizer

SHAPES = {"block": [-1, 0, 1, 2], "traversal": [-1, 0, 0, 1, 1, 2, 3]}
RULES = {"block": BlockVerifier, "traversal": TraversalVerifier}
NEW_TOKENS = 20


@dataclass
class DrawingDrafter(Drafter):
    """Draws trees of one shape from a flattened copy of the target, without replacement.

    Args:
        model: The target.
        parents: The shape.
        temperature: Flattens.
    """

    model: Any
    parents: list[int]
    temperature: float = 1.5
    name = "drawing"

    def start(self, context: DraftContext) -> DraftSession:
        self.generator = torch.Generator().manual_seed(int(torch.randint(2**62, (1,))))
        return self

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        rows = [self._row(torch.from_numpy(sequence.copy()).long()) for sequence in context.sequences]
        tokens, probs = (torch.stack(column) for column in zip(*rows, strict=True))
        return TokenTree(tokens, torch.tensor([self.parents] * len(rows)), draft_probs=probs)

    def _row(self, prefix: Tensor) -> tuple[Tensor, Tensor]:
        prefixes, left, probs = [prefix], [], []
        for node, parent in enumerate(self.parents):
            if node:
                token = torch.multinomial(left[parent], 1, generator=self.generator)
                left[parent][token] = 0.0
                prefixes.append(torch.cat([prefixes[parent], token]))
            has_children = node in self.parents
            logits = self.model(prefixes[node][None]).logits[0, -1].float() if has_children else torch.zeros(1)
            probs.append((logits / self.temperature).softmax(-1) if has_children else torch.zeros_like(probs[0]))
            left.append(probs[-1].clone())
        return torch.stack([prefixes[node][-1] for node in range(len(self.parents))]), torch.stack(probs)


def accelerated(rule: str | Verifier, drafter: Drafter | None = None, budget: Budget | None = None) -> Any:
    name = rule if isinstance(rule, str) else rule.name
    drafter = drafter or DrawingDrafter(tiny_model(), SHAPES[name])
    return specdec.accelerate(tiny_model(), drafter, rule, strict=True, budget=budget or Budget(64, fixed=True))


@pytest.mark.parametrize("rule", RULES)
def test_rules_are_known_by_name_and_promise_the_distribution(rule: str) -> None:
    assert VERIFIERS[rule] is RULES[rule]
    fast = accelerated(rule)
    fast.generate(**prompts(5), max_new_tokens=4, do_sample=True)
    assert (fast.report.verifier, fast.report.guarantee) == (rule, "distribution")
    assert "distribution" in str(fast.report)


@pytest.mark.parametrize("rule", RULES)
def test_a_seed_gives_the_same_text_again_and_another_call_gives_another(rule: str) -> None:
    fast, inputs = accelerated(rule), prompts(6, 9, 3)
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "eos_token_id": None, "top_k": 0}
    torch.manual_seed(5)
    first = fast.generate(**inputs, **kwargs)
    second = fast.generate(**inputs, **kwargs)
    torch.manual_seed(5)
    assert torch.equal(fast.generate(**inputs, **kwargs), first)
    assert not torch.equal(first, second)
    assert fast.report.num_accepted_tokens > 0
    assert fast.report.num_target_passes < NEW_TOKENS


@pytest.mark.parametrize("rule", RULES)
def test_no_draw_of_a_call_is_made_again_in_the_next(rule: str) -> None:
    class RecordedDraws(RandomDraws):
        seen: list[tuple[float, ...]] = []  # noqa: RUF012

        def flip(self, probs: Tensor) -> Tensor:
            uniform = torch.rand_like(probs)
            self.seen.append(tuple(uniform.flatten().tolist()))
            return uniform < probs

    fast = accelerated(RULES[rule](RecordedDraws()))
    torch.manual_seed(0)
    for _ in range(3):
        fast.generate(**prompts(6), max_new_tokens=NEW_TOKENS, do_sample=True, eos_token_id=None)
    assert len(RecordedDraws.seen) > 10
    assert len({value for draw in RecordedDraws.seen for value in draw}) == sum(map(len, RecordedDraws.seen))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7, "top_p": 0.9}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}]
)
def test_rows_end_where_they_should(rule: str, settings: dict[str, Any]) -> None:
    eos = [EOS, *range(20, 32)]
    inputs = prompts(3, 11, 5, 7)
    width = inputs["input_ids"].shape[1]
    fast = accelerated(rule)
    lengths = set()
    for seed in range(4):
        torch.manual_seed(seed)
        ids = fast.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=True, eos_token_id=eos, **settings)
        assert torch.equal(ids[:, :width], inputs["input_ids"])
        assert ids.shape[1] <= width + NEW_TOKENS
        generated = 0
        for row in ids[:, width:].tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in eos), len(row))
            assert end == NEW_TOKENS or row[end - 1] in eos
            assert set(row[end:]) <= {PAD}
            lengths.add(end)
            generated += end
            if "no_repeat_ngram_size" in settings:
                pairs = list(pairwise(row[:end]))
                assert len(pairs) == len(set(pairs))
        assert fast.report.num_generated_tokens == generated
    assert len(lengths) > 3


@pytest.mark.parametrize("rule", RULES)
def test_stop_strings_end_the_text(rule: str) -> None:
    fast, tokenizer, inputs = accelerated(rule), tiny_tokenizer(), prompts(8)
    stops = ["z", "9", "H", "J"]
    for seed in range(6):
        torch.manual_seed(seed)
        ids = fast.generate(**inputs, max_new_tokens=40, do_sample=True, stop_strings=stops, tokenizer=tokenizer)
        text = tokenizer.decode(ids[0, 8:])
        assert not any(stop in text[:-1] for stop in stops)


@pytest.mark.parametrize("rule", RULES)
def test_scores_are_those_of_the_tokens(rule: str) -> None:
    fast = accelerated(rule)
    out = fast.generate(
        **prompts(6),
        max_new_tokens=NEW_TOKENS,
        do_sample=True,
        eos_token_id=None,
        top_k=5,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert len(out.scores) == NEW_TOKENS
    for position, scores in enumerate(out.scores):
        assert int(scores.isfinite().sum()) == 5
        assert bool(scores[0, out.sequences[0, 6 + position]].isfinite())


@pytest.mark.parametrize("rule", RULES)
def test_no_noise_is_drawn_for_positions_that_a_rule_has_decided(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain steps in between take draws for their own position, and none for those before it."""
    kept: list[int] = []
    right = NoiseQueue.at

    def at(self: NoiseQueue, position: int, row: int, *dtype: Any) -> Tensor:
        noise = right(self, position, row, *dtype)
        kept.append(len(self._draws))
        return noise

    monkeypatch.setattr(NoiseQueue, "at", at)

    class NowAndThen(DrawingDrafter):
        steps = 0

        def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
            self.steps += 1
            if self.steps % 3:
                return super().propose(context, max_nodes)
            return TokenTree.root_only(torch.tensor([int(sequence[-1]) for sequence in context.sequences]))

    fast = accelerated(rule, NowAndThen(tiny_model(), SHAPES[rule]))
    torch.manual_seed(1)
    ids = fast.generate(**prompts(9), max_new_tokens=NEW_TOKENS, do_sample=True, eos_token_id=None)
    assert ids.shape == (1, 9 + NEW_TOKENS)
    assert len(kept) > 2 and max(kept) == 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("drafter", ["off", "lookahead", "oracle", "random-tree"])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_without_drawn_drafts_the_tokens_are_those_of_generate(rule: str, drafter: str, do_sample: bool) -> None:
    inputs, kwargs = prompts(4, 9, 12), {"max_new_tokens": NEW_TOKENS, "do_sample": do_sample}
    expected = reference(tiny_model(), inputs, seed=2, **kwargs)
    fast = specdec.accelerate(
        tiny_model(), DRAFTERS[drafter](expected.answers), rule, strict=True, budget=Budget(64, fixed=True)
    )
    torch.manual_seed(2)
    assert fast.generate(**inputs, **kwargs).tolist() == expected.ids.tolist()


@pytest.mark.parametrize("rule", RULES)
def test_greedy_with_drawn_drafts_gives_the_tokens_of_generate(rule: str) -> None:
    inputs, kwargs = prompts(4, 9), {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    expected = reference(tiny_model(), inputs, **kwargs)
    fast = accelerated(rule)
    assert fast.generate(**inputs, **kwargs).tolist() == expected.ids.tolist()


def test_drawn_drafts_are_as_lossless_under_the_exact_rule() -> None:
    drafter = DrawingDrafter(tiny_model(), SHAPES["traversal"])
    drafter.start = lambda context: setattr(drafter, "generator", torch.Generator().manual_seed(1)) or drafter  # type: ignore
    report = assert_identical(tiny_model(), drafter, prompts(4, 9), max_new_tokens=NEW_TOKENS, do_sample=True)
    assert report.num_draft_tokens > 0
