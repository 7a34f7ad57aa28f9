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
from specdec.capability import Capability
from specdec.drafters import DraftContext, DraftModelDrafter, draft_loading
from specdec.drafters.draft_passes import TreePasses
from specdec.drafters.text_bridge import TextBridge
from specdec.drafters.vocabularies import vocabulary_map
from specdec.tree import TokenTree
from specdec.verifiers import BlockVerifier, ExactVerifier, TraversalVerifier
from tests.conformance import Reference, assert_identical, reference
from tests.drafters.small_tokenizers import byte_level, reordered, sentencepiece, words
from tests.tiny_models import new_model, tiny_model

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


USES = {"subset": "text", "padded": "shared", "shuffled": "intersection", "other": "text", "thin": "text"}
"""What `"auto"` makes of them."""


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


@pytest.mark.parametrize("kind", USES)
@pytest.mark.parametrize(("batch", "growth"), [("single", "chain"), ("ragged", "auto")])
def test_same_tokens_whatever_the_vocabularies(kind: str, batch: str, growth: str) -> None:
    drafter = drafter_of(kind, growth=growth)
    for seed in range(3):
        right, kwargs = expected(batch, seed)
        report = assert_identical(target()[0], drafter, inputs_of(batch), seed=seed, expected=right, **kwargs)
        assert report.fallback is None
        assert report.num_draft_tokens > 0
        figures = report.drafter_figures
        assert figures["vocabulary"] == USES[kind]
        if figures["vocabulary"] != "shared":
            assert figures["overlap_tokens"] == len(vocabulary_map(target()[1], draft(kind)[1]))
            assert 0 < figures["overlap_mass"] <= 1.0001
            assert 0 <= figures["known_prompt_share"] <= 1


WAYS = [("subset", "intersection"), ("other", "intersection"), ("shuffled", "text"), ("thin", "text")]


@pytest.mark.parametrize(("kind", "use"), WAYS)
def test_same_tokens_with_either_way_in_every_growth(kind: str, use: str) -> None:
    for seed, growth in enumerate(("chain", "static", "dynamic", "auto", "paced")):
        drafter = drafter_of(kind, vocabulary=use, growth=growth, coupled=growth in ("static", "auto"))
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


def test_chains_through_text_are_what_the_draft_model_goes_on_with() -> None:
    model, tokenizer = draft("other")
    trees = []

    class Recorder(ExactVerifier):
        def verify(self, tree: TokenTree, *args: Any) -> Any:
            trees.append(tree)
            return super().verify(tree, *args)

    drafter = drafter_of("other", growth="chain", min_confidence=0.0, max_depth=5)
    fast = specdec.accelerate(target()[0], drafter, Recorder(), strict=True, budget=Budget(16, fixed=True))
    ids = fast.generate(**inputs_of("single"), max_new_tokens=24, do_sample=False)[0].tolist()
    pairs, compared = vocabulary_map(target()[1], tokenizer), 0
    for tree in trees:
        if tree.num_nodes == 1:
            continue
        at = next(at for at in range(len(ids)) if ids[at] == tree.tokens[0, 0] and at >= compared)
        compared = at + 1
        text = TextBridge(pairs).update(ids[: at + 1]).tokens
        prompt = torch.from_numpy(text.astype(np.int64))[None]
        own = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)[0, len(text) :]
        drafted = pairs.target.join(tree.tokens[0, 1:].tolist())
        assert drafted
        assert pairs.draft.join(own.tolist()).startswith(drafted)
    assert compared > 0


class Checked(DraftModelDrafter):
    """Compares the draft model's cache with a fresh reading of the row's text at each step."""

    steps = 0

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        tree = super().propose(context, max_nodes)
        call = self._thread.call
        if call.nodes is None or not isinstance(call.passes, TreePasses):
            return tree
        for i, tokens in enumerate(call.texts.tokens):
            assert call.passes.lengths[i] == len(tokens) - 1
            cache = tf.DynamicCache(config=self._model.config)
            self._model(input_ids=torch.from_numpy(tokens.astype(np.int64))[None], past_key_values=cache)
            for mine, other in zip(call.passes.cache.tree_layers(), cache.layers, strict=True):
                torch.testing.assert_close(mine.keys[i][:, : len(tokens)], other.keys[0], atol=1e-4, rtol=1e-4)
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
def test_distribution_of_the_first_tokens(verifier: Any) -> None:
    """Many rows of one prompt: what follows the first token is distributed as the target has it."""
    growth = "chain" if verifier is BlockVerifier else "dynamic"
    drafter = drafter_of("shuffled", 0.1, growth=growth, max_nodes=5, vocabulary="intersection")
    model, inputs = target()[0], inputs_of("single")
    fast = specdec.accelerate(model, drafter, verifier(), strict=True, budget=Budget(8, fixed=True))
    torch.manual_seed(0)
    kwargs = {"do_sample": True, "top_k": 3, "temperature": 2.0, "num_return_sequences": 1000, "eos_token_id": None}
    ids = fast.generate(**inputs, max_new_tokens=3, **kwargs)[:, inputs["input_ids"].shape[1] :]
    assert fast.report.num_accepted_tokens > 0
    prompt, distance, seen = inputs["input_ids"][0], 0.0, 0
    for first in ids[:, 0].unique():
        own = ids[ids[:, 0] == first, 1]
        logits = model(torch.cat([prompt, first[None]])[None]).logits[0, -1] / 2.0
        top = logits.topk(3)
        expected = torch.zeros(SIZE).index_copy(0, top.indices, top.values.softmax(-1))
        if len(own) > 200:
            found = torch.bincount(own, minlength=SIZE) / len(own)
            distance = max(distance, float((found - expected).abs().sum() / 2))
            seen += 1
    assert seen > 0
    assert distance < 0.06


# --- finding tokenizers, errors, and what is left behind --------------------------------------------------------------


def test_tokenizers_are_found_beside_the_weights(tmp_path: Any) -> None:
    for name, (model, tokenizer) in {"target": target(), "draft": draft("shuffled")}.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    drafter = DraftModelDrafter(str(tmp_path / "draft"))
    report = assert_identical(model, drafter, inputs_of("single"), max_new_tokens=12)
    assert report.drafter_figures["vocabulary"] == "intersection"
    assert report.num_accepted_tokens > 0
    same = DraftModelDrafter(draft("padded")[0], tokenizer=str(tmp_path / "target"))
    report = assert_identical(model, same, inputs_of("single"), max_new_tokens=12)
    assert report.drafter_figures == {"vocabulary": "shared"}


def test_a_folder_without_a_tokenizer_is_told_by_its_sizes(tmp_path: Any) -> None:
    model = new_model("gpt2")
    model.save_pretrained(tmp_path / "gpt2")
    named = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    report = assert_identical(tiny_model("gpt2"), DraftModelDrafter(named), inputs, max_new_tokens=8)
    assert report.drafter_figures == {"vocabulary": "shared"}


def test_the_draft_model_is_as_it_was() -> None:
    for kind in ("shuffled", "other"):
        model, tokenizer = copy.deepcopy(draft(kind)[0]), copy.deepcopy(draft(kind)[1])
        ids = torch.arange(3, 20)[None]
        before = model.generate(ids, max_new_tokens=8), model(ids).logits, model.config.to_dict()
        state = {key: value.clone() for key, value in model.state_dict().items()}
        content = tokenizer.get_vocab(), tokenizer.backend_tokenizer.to_str()
        for use in ("intersection", "text"):
            drafter = DraftModelDrafter(model, tokenizer=tokenizer, target_tokenizer=target()[1], vocabulary=use)  # type: ignore[arg-type]
            assert_identical(target()[0], drafter, inputs_of("ragged"), max_new_tokens=12, do_sample=True)
        assert torch.equal(model.generate(ids, max_new_tokens=8), before[0])
        assert torch.equal(model(ids).logits, before[1])
        assert model.config.to_dict() == before[2]
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert (tokenizer.get_vocab(), tokenizer.backend_tokenizer.to_str()) == content


def test_nothing_is_drafted_beyond_the_draft_models_positions() -> None:
    tokenizer = draft("thin")[1]
    length = len(tokenizer(TEXTS["single"][0])["input_ids"])
    for positions in (length - 2, length + 4):
        model = model_of(len(tokenizer), max_position_embeddings=positions)
        drafter = DraftModelDrafter(model, tokenizer=tokenizer, target_tokenizer=target()[1])
        report = assert_identical(target()[0], drafter, inputs_of("single"), max_new_tokens=16)
        assert (report.num_draft_tokens > 0) == (positions > length)


def endless() -> Any:
    """A tokenizer of a few words, without a token that ends a text."""
    tokenizer = words()
    tokenizer.eos_token = None
    return tokenizer


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"vocabulary": "both"}, "vocabulary='both' is not known; use one of 'auto'"),
    "no target tokenizer": ({"target_tokenizer": None}, r"comparing tokenizers needs both .* pass target_tokenizer="),
    "no tokenizer": ({"tokenizer": None, "vocabulary": "text"}, r"vocabulary='text' needs both .* pass tokenizer="),
    "nothing in common": (
        {"tokenizer": endless(), "vocabulary": "intersection"},
        "have no token in common; use 'text'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_told_apart_is_refused_before_any_work(case: str) -> None:
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        specdec.accelerate(target()[0], drafter_of("other", **settings))


def test_sizes_decide_without_tokenizers() -> None:
    without = {"tokenizer": None, "target_tokenizer": None}
    with pytest.raises(ValueError, match=r"of 700 tokens .* one of 400.* or tokenizer=\.\.\. \(the draft model's\)"):
        specdec.accelerate(target()[0], drafter_of("padded", **without))
    report = assert_identical(target()[0], drafter_of("shuffled", **without), inputs_of("single"), max_new_tokens=8)
    assert report.drafter_figures == {"vocabulary": "shared"}


def test_what_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(TypeError, match="a tokenizer of transformers is needed, got dict"):
        specdec.accelerate(target()[0], drafter_of("other", tokenizer={}))


def test_text_has_no_distribution() -> None:
    fast = specdec.accelerate(target()[0], drafter_of("other", vocabulary="text"), BlockVerifier(), strict=True)
    with pytest.raises(ValueError, match="vocabulary='text' cannot be used with a verifier that compares"):
        fast.generate(**inputs_of("single"), max_new_tokens=8, do_sample=True)


def test_settings_can_be_written_down() -> None:
    settings = drafter_of("other").settings()
    assert settings["tokenizer"] and isinstance(settings["tokenizer"], str)
    assert settings["vocabulary"] == "auto"
