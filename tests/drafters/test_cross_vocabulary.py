"""A draft model with another tokenizer drafts for the target, and the output stays that of the target alone."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor

import specdec
from specdec.budget import Budget
from specdec.compat import CACHE
from specdec.drafters import DraftContext, DraftModelDrafter
from specdec.drafters.base import DraftSession
from specdec.drafters.small_model import loading as draft_loading
from specdec.drafters.small_model.passes import TreePasses
from specdec.drafters.tokenizers.draft_vocabulary import LEAST_KNOWN_SHARE
from specdec.drafters.tokenizers.text_bridge import TextBridge
from specdec.drafters.tokenizers.vocabulary_map import vocabulary_map
from specdec.passes.capability import Capability
from specdec.tree import TokenTree
from specdec.verifiers import BlockVerifier, ExactVerifier, TraversalVerifier
from tests.conformance import Reference, assert_identical, reference
from tests.drafters.small_tokenizers import byte_level, reordered, sentencepiece
from tests.tiny_models import new_model

SIZE = 400
PAD_ID, EOS_ID = 1, 0
TEXTS = {
    "single": ["class Reader:\n    def __init__(self"],
    "ragged": ["def read(", "    with open(path, encoding=encoding) as file", "return", "        self.lines"],
}


@cache
def target() -> tuple[Any, Any]:
    """A model and its tokenizer; neither must be changed."""
    return model_of(SIZE), byte_level(SIZE)


def model_of(vocab_size: int, seed: int = 0, **changes: Any) -> Any:
    ends = {"pad_token_id": PAD_ID, "bos_token_id": EOS_ID, "eos_token_id": EOS_ID}
    return new_model("llama", seed, vocab_size=vocab_size, **ends, **changes)


def with_rows(order: list[int], noise: float = 0.0, **changes: Any) -> Any:
    """The target with its vocabulary in another order: row `i` of the new embeddings is the old one's `order[i]`."""
    model = copy.deepcopy(target()[0])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
        rows = torch.tensor(order)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        for layer in (embedding, head):
            layer.weight = torch.nn.Parameter(layer.weight[rows].clone())
    embedding.num_embeddings = head.out_features = model.config.vocab_size = len(order)
    return model


def order_of(kind: str) -> list[int]:
    """Old ids in the order of the new ones."""
    if kind == "subset":  # without the last merges
        return list(range(330))
    if kind == "padded":  # rows beyond the tokenizer's tokens
        return [*range(SIZE), *([7] * 300)]
    return torch.randperm(SIZE, generator=torch.Generator().manual_seed(3)).tolist()


@cache
def draft(kind: str, noise: float = 0.02) -> tuple[Any, Any]:
    """A draft model nearly of the target's mind, and its tokenizer; neither must be changed."""
    if kind == "other":
        tokenizer = sentencepiece()
        return new_model("llama", 5, vocab_size=len(tokenizer)), tokenizer
    if kind == "thin":  # single bytes are all that it has
        tokenizer = byte_level(258)
        return model_of(len(tokenizer), 6), tokenizer
    order = order_of(kind)
    tokenizer = byte_level(330 if kind == "subset" else SIZE)
    return with_rows(order, noise), reordered(tokenizer, order) if kind == "shuffled" else tokenizer


KINDS = ("subset", "padded", "shuffled", "other", "thin")


def drafter_of(kind: str, noise: float = 0.02, **settings: Any) -> DraftModelDrafter:
    model, tokenizer = draft(kind, noise)
    settings = {"tokenizer": tokenizer, "target_tokenizer": target()[1], "max_nodes": 16} | settings
    return DraftModelDrafter(model, **settings)


def inputs_of(batch: str) -> dict[str, Tensor]:
    tokenizer = byte_level(SIZE)
    tokenizer.padding_side = "left"
    return dict(tokenizer(TEXTS[batch], return_tensors="pt", padding=True, return_token_type_ids=False))


# --- the same tokens --------------------------------------------------------------------------------------------------


@cache
def expected(batch: str, seed: int) -> tuple[Reference, dict[str, Any]]:
    """What the target says without drafts, and the arguments of the call; greedy with seed 0."""
    kwargs = {"max_new_tokens": 24, "do_sample": seed > 0, "temperature": 0.9, "top_k": 40, "eos_token_id": [0, 200]}
    kwargs = kwargs if seed else {"max_new_tokens": 24, "do_sample": False, "eos_token_id": [0, 200]}
    return reference(target()[0], inputs_of(batch), seed, **kwargs), kwargs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "growth"), [("single", "chain"), ("ragged", "dynamic")])
def test_same_tokens_whatever_the_vocabularies(kind: str, batch: str, growth: str) -> None:
    drafter = drafter_of(kind, growth=growth)
    for seed in range(3):
        right, kwargs = expected(batch, seed)
        report = assert_identical(target()[0], drafter, inputs_of(batch), seed=seed, expected=right, **kwargs)
        assert report.fallback is None
        assert report.num_draft_tokens > 0
        figures = report.drafter_figures
        if kind == "padded":
            assert figures == {"vocabulary": "shared"}
        else:
            is_text = figures["known_prompt_share"] < LEAST_KNOWN_SHARE
            assert figures["vocabulary"] == ("text" if is_text else "intersection")
            assert is_text == {"thin": True, "shuffled": False}.get(kind, is_text)
            assert figures["overlap_tokens"] == len(vocabulary_map(target()[1], draft(kind)[1]))
            assert 0 < figures["overlap_mass"] <= 1.0001


WAYS = [("subset", "intersection"), ("other", "intersection"), ("shuffled", "text"), ("thin", "text")]


@pytest.mark.parametrize(("kind", "use"), WAYS)
def test_same_tokens_with_either_way_in_every_growth(kind: str, use: str) -> None:
    for seed, growth in enumerate(("chain", "dynamic", "paced")):
        drafter = drafter_of(kind, vocabulary=use, growth=growth, coupled=growth == "dynamic")
        right, kwargs = expected("ragged", seed % 3)
        report = assert_identical(target()[0], drafter, inputs_of("ragged"), seed=seed % 3, expected=right, **kwargs)
        assert report.num_draft_tokens > 0


@pytest.mark.parametrize("kind", ["shuffled", "thin"])
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_same_tokens_with_a_draft_model_that_sees_no_trees(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft_loading, "probe", lambda model: Capability("chain", "for a test"))
    tokenizer = draft(kind)[1]
    model = draft(kind)[0] if name == "llama" else new_model(name, vocab_size=len(tokenizer))
    drafter = DraftModelDrafter(model, tokenizer=tokenizer, target_tokenizer=target()[1])
    for do_sample in (False, True):
        assert_identical(target()[0], drafter, inputs_of("ragged"), max_new_tokens=24, do_sample=do_sample)


# --- the draft model is understood ------------------------------------------------------------------------------------


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("batch", TEXTS)
def test_the_target_with_its_vocabulary_shuffled_is_always_right(batch: str, do_sample: bool) -> None:
    drafter = drafter_of("shuffled", 0.0, growth="chain", min_confidence=0.0, vocabulary="intersection", max_depth=6)
    kwargs = {"max_new_tokens": 32, "do_sample": do_sample, "suppress_tokens": unpaired(), "eos_token_id": None}
    report = assert_identical(target()[0], drafter, inputs_of(batch), **kwargs)
    assert report.num_accepted_tokens == report.num_draft_tokens > 0
    assert report.drafter_figures["overlap_mass"] > 0.9


def unpaired() -> list[int]:
    """Target tokens that no draft can hold: padding."""
    return [PAD_ID]


def test_the_target_with_its_vocabulary_shuffled_is_right_through_text() -> None:
    """Where the target's own text is encoded as it was written, what it would say next is known."""
    drafter = drafter_of("shuffled", 0.0, growth="chain", min_confidence=0.0, vocabulary="text", max_depth=4)
    report = assert_identical(target()[0], drafter, inputs_of("single"), max_new_tokens=1 + 5, eos_token_id=None)
    other = drafter_of("other", growth="chain", min_confidence=0.0, max_depth=4)
    chance = assert_identical(target()[0], other, inputs_of("single"), max_new_tokens=1 + 5, eos_token_id=None)
    assert report.num_accepted_tokens > chance.num_accepted_tokens


class Recording(DraftModelDrafter):
    """Keeps what it proposes, and after what."""

    def start(self, context: DraftContext) -> DraftSession:
        session: Any = super().start(context)
        propose = session.propose
        self.proposals: list[Any] = []

        def recorded(context: DraftContext, max_nodes: int) -> TokenTree:
            tree: TokenTree = propose(context, max_nodes)
            if tree.num_nodes > 1:
                self.proposals.append((context.sequences[0].tolist(), tree))
            return tree

        session.propose = recorded
        return session  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["other", "thin"])
def test_chains_through_text_are_what_the_draft_model_goes_on_with(kind: str) -> None:
    model, tokenizer = draft(kind)
    settings = {"tokenizer": tokenizer, "target_tokenizer": target()[1], "growth": "chain", "vocabulary": "text"}
    drafter = Recording(model, **settings, min_confidence=0.0, max_depth=5)
    assert_identical(target()[0], drafter, inputs_of("single"), max_new_tokens=24)
    pairs = vocabulary_map(target()[1], tokenizer)
    assert len(drafter.proposals) > 3
    for sequence, tree in drafter.proposals:
        text = TextBridge(pairs).update(sequence).tokens.tolist()
        for _ in range(5):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        drafted = pairs.target.join(tree.tokens[0, 1:].tolist())
        assert drafted
        assert pairs.draft.join(text[-5:]).startswith(drafted)
        scores = tree.scores[0, 1:]  # type: ignore[index]
        assert ((scores > 0) & (scores <= 1)).all()


class Checked(DraftModelDrafter):
    """Compares the draft model's cache with a fresh reading of the row's text at each step."""

    steps = 0

    def start(self, context: DraftContext) -> DraftSession:
        session: Any = super().start(context)
        propose = session.propose
        session.propose = lambda *args: self.checked(session, propose, *args)
        return session  # type: ignore[no-any-return]

    def checked(self, session: Any, propose: Any, context: DraftContext, max_nodes: int) -> TokenTree:
        tree: TokenTree = propose(context, max_nodes)
        if session.nodes is None or not isinstance(session.passes, TreePasses):
            return tree
        model = session.bound.model
        for i, tokens in enumerate(session.texts.tokens):
            assert session.passes.lengths[i] == len(tokens) - 1
            cache = tf.DynamicCache(config=model.config)
            model(input_ids=torch.from_numpy(tokens.astype(np.int64))[None], **{CACHE: cache})
            for mine, other in zip(session.passes.cache.tree_layers(), cache.layers, strict=True):
                torch.testing.assert_close(mine.keys[i][:, : len(tokens)], other.keys[0], atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(mine.values[i][:, : len(tokens)], other.values[0], atol=1e-4, rtol=1e-4)
        self.steps += 1
        return tree


@pytest.mark.parametrize("use", ["intersection", "text"])
@pytest.mark.parametrize("kind", ["subset", "other"])
def test_the_draft_model_reads_all_of_the_text_once(kind: str, use: str) -> None:
    model, tokenizer = draft(kind)
    drafter = Checked(model, tokenizer=tokenizer, target_tokenizer=target()[1], vocabulary=use, growth="dynamic")  # type: ignore[arg-type]
    for do_sample in (False, True):
        report = assert_identical(
            target()[0], drafter, inputs_of("ragged"), max_new_tokens=24, do_sample=do_sample, eos_token_id=[0, 200]
        )
        assert report.num_draft_tokens > 0
    assert drafter.steps > 10


# --- distributions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["subset", "shuffled", "other", "thin"])
@pytest.mark.parametrize("growth", ["chain", "dynamic"])
def test_drawn_drafts_are_of_the_overlap_and_come_with_their_distribution(kind: str, growth: str) -> None:
    trees = []

    class Recorder(ExactVerifier):
        guarantee = "distribution"

        def verify(self, tree: TokenTree, *args: Any) -> Any:
            trees.append(tree)
            return super().verify(tree, *args)

    drafter = drafter_of(kind, growth=growth)
    fast = specdec.accelerate(target()[0], drafter, Recorder(), strict=True, budget=Budget(16, fixed=True))
    fast.generate(**inputs_of("ragged"), max_new_tokens=8, do_sample=True, temperature=0.7, top_k=0)
    pairs = vocabulary_map(target()[1], draft(kind)[1], SIZE)
    outside = torch.ones(SIZE, dtype=torch.bool).index_fill(0, pairs.target_ids, False)
    drafted = [tree for tree in trees if tree.num_nodes > 1]
    assert drafted
    for tree in drafted:
        assert tree.draft_probs is not None
        torch.testing.assert_close(tree.draft_probs.sum(-1), torch.ones(tree.tokens.shape))
        assert not tree.draft_probs[..., outside].any()
        for row, parents in enumerate(tree.parents.tolist()):
            assert all(
                tree.draft_probs[row, parent, token] > 0
                for parent, token in zip(parents, tree.tokens[row].tolist(), strict=True)
                if parent >= 0
            )


def test_recorded_distribution_is_the_draft_models_on_the_overlap() -> None:
    drafter = drafter_of("shuffled", growth="chain")
    model, tokenizer = draft("shuffled")
    pairs = vocabulary_map(target()[1], tokenizer, SIZE)
    trees = []

    class Recorder(BlockVerifier):
        def verify(self, tree: TokenTree, *args: Any) -> Any:
            trees.append(tree)
            return super().verify(tree, *args)

    fast = specdec.accelerate(target()[0], drafter, Recorder(), strict=True, budget=Budget(16, fixed=True))
    inputs = inputs_of("single")
    ids = fast.generate(**inputs, max_new_tokens=4, do_sample=True, temperature=0.7, top_k=0)
    tree = next(tree for tree in trees if tree.num_nodes > 1)
    assert tree.draft_probs is not None
    text = pairs.draft_tokens(torch.cat([ids[0, : inputs["input_ids"].shape[1]], tree.tokens[0, : tree.num_nodes - 1]]))
    logits = model(text[None]).logits[0, inputs["input_ids"].shape[1] :, pairs.draft_ids]
    expected = torch.zeros(tree.num_nodes - 1, SIZE).index_copy(1, pairs.target_ids, (logits / 0.7).softmax(-1))
    torch.testing.assert_close(tree.draft_probs[0, :-1], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("verifier", [BlockVerifier, TraversalVerifier])
def test_what_follows_a_token_is_distributed_as_the_target_has_it(verifier: Any) -> None:
    growth = "chain" if verifier is BlockVerifier else "dynamic"
    drafter = drafter_of("shuffled", 0.1, growth=growth, max_nodes=5, vocabulary="intersection")
    model, inputs = target()[0], inputs_of("single")
    fast = specdec.accelerate(model, drafter, verifier(), strict=True, budget=Budget(8, fixed=True))
    torch.manual_seed(0)
    kwargs = {"do_sample": True, "top_k": 3, "temperature": 2.0, "num_return_sequences": 3000, "eos_token_id": None}
    ids = fast.generate(**inputs, max_new_tokens=3, **kwargs)[:, inputs["input_ids"].shape[1] :]
    assert fast.report.num_accepted_tokens > 0
    first = int(ids[:, 0].mode().values)
    after = ids[ids[:, 0] == first, 1]
    prompt = torch.cat([inputs["input_ids"][0], torch.tensor([first])])
    pairs = vocabulary_map(target()[1], draft("shuffled")[1], SIZE)
    draft_logits = draft("shuffled", 0.1)[0](pairs.draft_tokens(prompt)[None]).logits[0, -1]
    found = torch.bincount(after, minlength=SIZE) / len(after)
    right = top_three(model(prompt[None]).logits[0, -1])
    drafted = top_three(pairs.to_target(draft_logits, SIZE))
    assert (drafted - right).abs().sum() / 2 > 0.1, "the draft model has another distribution"
    assert (found - right).abs().sum() / 2 < 0.05


def top_three(logits: Tensor) -> Tensor:
    """The distribution with `top_k=3, temperature=2`."""
    top = (logits / 2.0).topk(3)
    return torch.zeros(SIZE).index_copy(0, top.indices, top.values.softmax(-1))
