"""A draft model proposes in step with the target, and reads no token twice."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from transformers.cache_utils import DynamicCache

import specdec
from specdec.budget import Budget
from specdec.compat import CACHE
from specdec.drafters import DraftContext, DraftModelDrafter
from specdec.drafters.base import DraftSession
from specdec.drafters.small_model import loading as draft_loading
from specdec.drafters.small_model.passes import TreePasses
from specdec.passes.capability import Capability
from specdec.tree import TokenTree
from specdec.verifiers import ExactVerifier
from tests.conformance import assert_identical, draft_of
from tests.tiny_models import VOCAB, new_model, prompts, tiny_model

MODES = ("chain", "static", "dynamic", "auto")
BATCHES = {"single": (prompts(12), {}), "padded": (prompts(3, 11, 5, 12, 7), {})}
EOS = [2, 20, 40]


def drafter_of(growth: str = "auto", model: Any = None, **settings: Any) -> DraftModelDrafter:
    return DraftModelDrafter(model if model is not None else draft_of("llama"), growth=growth, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("growth", MODES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("coupled", [True, False])
def test_same_tokens_in_every_growth(growth: str, batch: str, coupled: bool) -> None:
    inputs = BATCHES[batch][0]
    num_accepted = 0
    for do_sample in (False, True) if coupled else (True,):
        for eos in (None, EOS):
            kwargs = {"max_new_tokens": 24, "do_sample": do_sample, "eos_token_id": eos if eos else [2]}
            drafter = drafter_of(growth, coupled=coupled)
            report = assert_identical(tiny_model(), drafter, inputs, seed=2, **kwargs)
            assert report.fallback is None
            num_accepted += report.num_accepted_tokens
    assert num_accepted > 0


@pytest.mark.parametrize("growth", MODES)
def test_same_tokens_with_several_sequences_per_prompt_and_processors(growth: str) -> None:
    kwargs = {"max_new_tokens": 24, "do_sample": True, "num_return_sequences": 3, "temperature": 0.8, "top_p": 0.9}
    assert_identical(tiny_model(), drafter_of(growth), prompts(9), **kwargs)
    assert_identical(tiny_model(), drafter_of(growth), prompts(9), **kwargs, repetition_penalty=1.3)


@pytest.mark.parametrize("growth", ["chain", "auto"])
@pytest.mark.parametrize("name", ["gpt2", "mistral-window", "gemma3-mixed-windows", "llama4-chunks"])
def test_same_tokens_with_every_kind_of_attention_in_the_draft_model(name: str, growth: str) -> None:
    for inputs in (prompts(20), prompts(20, 3, 9)):
        report = assert_identical(tiny_model(name), drafter_of(growth, draft_of(name)), inputs, max_new_tokens=24)
        assert report.num_accepted_tokens > 0


def test_same_tokens_under_the_adaptive_budget() -> None:
    drafter = drafter_of()
    for seed in range(3):
        assert_identical(
            tiny_model(), drafter, prompts(5, 9), seed=seed, budget=Budget(16), max_new_tokens=32, do_sample=seed > 0
        )


@dataclass(eq=False)
class Checked(DraftModelDrafter):
    """Compares its cache with a fresh encoding, and its reading with what was new, at each step."""

    steps: int = 0
    taken_over: int = 0

    def start(self, context: DraftContext) -> DraftSession:
        session = super().start(context)
        call = self._thread.call
        assert call.passes.num_fed_tokens == sum(len(sequence) - 1 for sequence in context.sequences)
        return session

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        call = self._thread.call
        before = call.passes.num_fed_tokens
        expected = sum(self._num_unread(call, context))
        tree = super().propose(context, max_nodes)
        if call.nodes is None:
            return tree
        drafted = int((call.nodes.fed > 0).sum())
        assert call.passes.num_fed_tokens - before == expected + drafted, "only what is new is read"
        assert call.passes.lengths == [len(sequence) - 1 for sequence in context.sequences]
        if isinstance(call.passes, TreePasses):
            for i, sequence in enumerate(context.sequences):
                self._compare(call, i, sequence)
        self.steps += 1
        return tree

    def _num_unread(self, call: Any, context: DraftContext) -> list[int]:
        """Tokens whose keys and values are not in the cache, the root counted; found out step by step."""
        unread = []
        for row, sequence in zip(context.rows, context.sequences, strict=True):
            i = call.rows.index(row)
            if call.nodes is None:
                unread.append(len(sequence) - call.passes.lengths[i])
                continue
            node, read = 0, call.drafted_at[i]
            while read < len(sequence) - 1:
                children = np.nonzero(
                    (call.nodes.parents[i] == node)
                    & (np.arange(call.nodes.parents.shape[1]) < call.nodes.counts[i])
                    & (call.nodes.tokens[i] == sequence[read])
                    & (call.nodes.fed[i] >= 0)
                )[0]
                if len(children) == 0:
                    break
                node, read = int(children[0]), read + 1
                self.taken_over += 1
            unread.append(len(sequence) - read)
        return unread

    def _compare(self, call: Any, i: int, sequence: Any) -> None:
        """The committed tokens, and the path to the deepest node that was fed."""
        nodes = call.nodes
        fed = [node for node in range(nodes.counts[i]) if nodes.fed[i, node] >= 0]
        path = [max(fed, key=lambda node: nodes.depths[i, node])]
        while path[0] > 0:
            path.insert(0, int(nodes.parents[i, path[0]]))
        ids = [*sequence[:-1].tolist(), *(int(nodes.tokens[i, node]) for node in path)]
        cache = DynamicCache(config=self._model.config)
        # Position ids of the padding-free row, whatever the batch looks like.
        self._model(input_ids=torch.tensor([ids]), use_cache=True, **{CACHE: cache})
        length = len(sequence) - 1
        slots = [*range(length), *(length + int(nodes.fed[i, node]) for node in path)]
        for mine, other in zip(call.passes.cache.tree_layers(), cache.layers, strict=True):
            torch.testing.assert_close(mine.keys[i][:, slots], other.keys[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(mine.values[i][:, slots], other.values[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("growth", MODES)
@pytest.mark.parametrize("batch", BATCHES)
def test_cache_is_that_of_a_fresh_encoding_and_no_token_is_read_twice(growth: str, batch: str) -> None:
    taken_over = 0
    for do_sample in (False, True):
        drafter = Checked(draft_of("llama"), growth=growth)  # type: ignore[arg-type]
        assert_identical(
            tiny_model(), drafter, BATCHES[batch][0], seed=2, max_new_tokens=24, do_sample=do_sample, eos_token_id=EOS
        )
        assert drafter.steps > 0
        taken_over += drafter.taken_over
    assert taken_over > 0


def test_tokens_that_enter_the_model_are_those_counted() -> None:
    draft = copy.deepcopy(draft_of("llama"))
    drafter = drafter_of("dynamic", draft)
    fast = specdec.accelerate(tiny_model(), drafter, strict=True, budget=Budget(64, fixed=True))
    seen: list[int] = []
    counted: list[int] = []
    finish = drafter.finish
    drafter.finish = lambda context: (counted.append(drafter._thread.call.passes.num_fed_tokens), finish(context))  # type: ignore
    hook = draft.get_input_embeddings().register_forward_pre_hook(lambda module, ids: seen.append(ids[0].numel()))
    fast.generate(**prompts(12), max_new_tokens=24)
    hook.remove()
    assert sum(seen) == counted[0]


def test_a_model_that_forgets_nothing_but_cannot_see_trees_drafts_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_loading, "probe", lambda model: Capability("chain", "for a test"))
    num_accepted = 0
    for name in ("llama", "mistral-window"):
        for growth in MODES:
            for inputs in (prompts(12), prompts(3, 11, 5)):
                drafter = Checked(draft_of(name), growth=growth)  # type: ignore[arg-type]
                kwargs = {"max_new_tokens": 24, "do_sample": True, "eos_token_id": EOS}
                report = assert_identical(tiny_model(name), drafter, inputs, seed=2, **kwargs)
                assert drafter.steps > 0
                num_accepted += report.num_accepted_tokens
    assert num_accepted > 50


def test_a_draft_model_without_positions_of_its_own() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)
        draft = tf.BloomForCausalLM(config).eval()
    for inputs in (prompts(12), prompts(3, 9)):
        assert_identical(tiny_model(), drafter_of("auto", draft), inputs, max_new_tokens=16, do_sample=True)


# --- what is drafted --------------------------------------------------------------------------------------------------


def test_a_draft_model_like_the_target_is_accepted_whole_when_coupled() -> None:
    twin = copy.deepcopy(tiny_model())
    kwargs = {"max_new_tokens": 32, "do_sample": True, "eos_token_id": None}
    coupled = assert_identical(tiny_model(), drafter_of("chain", twin, min_confidence=0.0), prompts(8), **kwargs)
    assert coupled.num_accepted_tokens == coupled.num_draft_tokens
    uncoupled = assert_identical(
        tiny_model(), drafter_of("chain", twin, min_confidence=0.0, coupled=False), prompts(8), **kwargs
    )
    assert uncoupled.num_target_passes > 1.5 * coupled.num_target_passes


def recorded(drafter: DraftModelDrafter, inputs: Any, distribution: bool = False, **kwargs: Any) -> list[TokenTree]:
    """The trees that reach the verifier."""
    trees = []

    class Recorder(ExactVerifier):
        guarantee = "distribution" if distribution else "token-identical"

        def verify(self, tree: TokenTree, *args: Any) -> Any:
            trees.append(tree)
            return super().verify(tree, *args)

    fast = specdec.accelerate(tiny_model(), drafter, Recorder(), strict=True, budget=Budget(64, fixed=True))
    torch.manual_seed(0)
    fast.generate(**inputs, **kwargs)
    return [tree for tree in trees if tree.num_nodes > 1]


@pytest.mark.parametrize("growth", MODES)
def test_drawn_drafts_come_with_the_distributions_they_were_drawn_from(growth: str) -> None:
    kwargs = {"max_new_tokens": 24, "do_sample": True, "distribution": True}
    trees = recorded(drafter_of(growth, max_nodes=16), prompts(6, 9), **kwargs)
    again = recorded(drafter_of(growth, max_nodes=16), prompts(6, 9), **kwargs)
    assert [tree.tokens.tolist() for tree in trees] == [tree.tokens.tolist() for tree in again]
    for tree in trees:
        assert tree.num_nodes <= 16
        assert tree.scores is None, "nothing may be cut off by how likely it is"
        probs = tree.draft_probs
        assert probs is not None
        assert probs.dtype == torch.float32
        assert tuple(probs.shape) == (*tree.tokens.shape, VOCAB)
        torch.testing.assert_close(probs.sum(-1), torch.ones(tree.tokens.shape))
        for row in range(len(tree.tokens)):
            children = [(int(p), int(t)) for p, t in zip(tree.parents[row], tree.tokens[row], strict=True) if p >= 0]
            assert len(set(children)) == len(children), "without replacement"
            assert all(probs[row, parent, token] > 0 for parent, token in children)


def test_recorded_distributions_are_those_of_the_draft_model() -> None:
    tree = recorded(
        drafter_of("chain"), prompts(7), max_new_tokens=8, do_sample=True, temperature=0.7, top_k=0, distribution=True
    )[0]
    inputs = prompts(7)["input_ids"]
    chain = tree.tokens[0, : tree.num_nodes - 1]
    logits = draft_of("llama")(torch.cat([inputs[0], chain])[None]).logits[0, inputs.shape[1] :]
    assert tree.draft_probs is not None
    torch.testing.assert_close(tree.draft_probs[0, :-1], (logits / 0.7).softmax(-1), atol=1e-5, rtol=1e-4)


def test_draws_follow_the_distribution() -> None:
    from specdec.drafters.small_model.lists import DraftLists, own_generator
    from specdec.drafters.tokenizers.draft_vocabulary import SharedVocabulary

    lists = DraftLists(None, True, True, SharedVocabulary(4), 4)
    lists.kind = "drawn"
    lists._generator = own_generator(torch.device("cpu"))
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    state = torch.get_rng_state()
    tokens, _ = lists.make(probs.log().expand(1, 40000, 4), 2, [0], np.zeros((1, 40000), np.int64))
    assert torch.equal(torch.get_rng_state(), state)
    first, second = tokens[0].T
    np.testing.assert_allclose(np.bincount(first, minlength=4) / 40000, probs, atol=0.01)
    after_zero = np.bincount(second[first == 0], minlength=4) / (first == 0).sum()
    np.testing.assert_allclose(after_zero, [0, 0.6, 0.3, 0.1], atol=0.015)


def test_a_chain_ends_where_its_whole_path_is_doubtful() -> None:
    trees = recorded(drafter_of("chain", min_confidence=0.3, prior_weight=1e6), prompts(9), max_new_tokens=32)
    stopped = 0
    for tree in trees:
        assert tree.is_chain
        paths = tree.scores[0, 1:].cumprod(0).tolist()  # type: ignore[index]
        assert all(path >= 0.3 for path in paths[:-1])
        stopped += paths[-1] < 0.3
    assert stopped > 0


def test_a_static_tree_has_the_best_shape_for_its_acceptances() -> None:
    drafter = drafter_of("static", acceptances=(0.5, 0.3, 0.11), max_nodes=16, max_depth=3)
    tree = recorded(drafter, prompts(9), max_new_tokens=32)[0]
    products = {(): 1.0}
    for path in [p for depth in range(1, 4) for p in np.ndindex(*([3] * depth))]:
        products[path] = products[path[:-1]] * (0.5, 0.3, 0.11)[path[-1]]
    best = sorted(products.values(), reverse=True)[1:16]
    ranks: dict[int, int] = {}
    mine = [1.0]
    for parent in tree.parents[0, 1:].tolist():
        ranks[parent] = ranks.get(parent, -1) + 1
        mine.append(mine[parent] * (0.5, 0.3, 0.11)[ranks[parent]])
    np.testing.assert_allclose(mine[1:], best)


def test_trees_come_best_first() -> None:
    for tree in recorded(drafter_of("dynamic"), prompts(9), max_new_tokens=16):
        paths = [1.0]
        for parent, score in zip(tree.parents[0, 1:].tolist(), tree.scores[0, 1:].tolist(), strict=True):  # type: ignore[index]
            paths.append(paths[parent] * score)
        assert all(a >= b - 1e-6 for a, b in itertools.pairwise(paths))


def test_hits_are_counted_and_change_the_scores() -> None:
    drafter = drafter_of("dynamic")
    assert_identical(tiny_model(), drafter, prompts(9, 5), max_new_tokens=32)
    tried, hit = drafter._learned.counts["likeliest"]
    assert tried.sum() > 0
    assert 0 < hit.sum() < tried.sum()
    assert (hit <= tried).all()


# --- vocabularies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [VOCAB - 7, VOCAB + 7])
@pytest.mark.parametrize("growth", ["chain", "auto"])
@pytest.mark.parametrize("distribution", [False, True])
def test_padded_vocabularies(size: int, growth: str, distribution: bool) -> None:
    draft = new_model("llama", vocab_size=size)
    for inputs in (prompts(12), prompts(3, 9)):
        assert_identical(tiny_model(), drafter_of(growth, draft), inputs, max_new_tokens=16, do_sample=True)
    kwargs = {"max_new_tokens": 16, "do_sample": True, "distribution": distribution}
    for tree in recorded(drafter_of(growth, draft), prompts(9), **kwargs):
        assert tree.tokens.max() < VOCAB
        assert tree.draft_probs is None or tree.draft_probs.shape[-1] == VOCAB


def test_what_one_drafter_has_learned_the_next_one_knows() -> None:
    target, draft = new_model("llama"), draft_of("llama")
    first, same, other = (drafter_of("auto", draft, top_k=k) for k in (6, 6, 5))
    assert_identical(target, first, prompts(12), max_new_tokens=16)
    for drafter in (same, other):
        drafter.bind(target)
    assert same._learned is first._learned is not other._learned
    assert {is_sampled for _, is_sampled in first._learned.paces} == {False}
    assert_identical(target, same, prompts(12), max_new_tokens=16, do_sample=True)
    assert {is_sampled for _, is_sampled in first._learned.paces} == {False, True}
