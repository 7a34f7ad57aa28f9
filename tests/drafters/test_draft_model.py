"""A draft model proposes in step with the target, and reads no token twice."""

from __future__ import annotations

import copy
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
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
from specdec.drafters.small_model.calibration import LevelTimes, is_worth_a_level
from specdec.drafters.small_model.growth import DraftNodes, child_of
from specdec.drafters.small_model.lists import DraftLists, own_generator
from specdec.drafters.small_model.passes import TreePasses
from specdec.drafters.small_model.session import DraftModelSession
from specdec.drafters.tokenizers.draft_vocabulary import SharedVocabulary
from specdec.passes.capability import Capability
from specdec.tree import TokenTree
from specdec.verifiers import ExactVerifier
from tests.conformance import assert_identical, draft_of
from tests.tiny_models import VOCAB, new_model, prompts, tiny_model

MODES = ("chain", "dynamic")
BATCHES = {"single": (prompts(12), {}), "padded": (prompts(3, 11, 5, 12, 7), {})}
EOS = [2, 20, 40]


def drafter_of(growth: str = "dynamic", model: Any = None, **settings: Any) -> DraftModelDrafter:
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


@pytest.mark.parametrize("growth", ["chain", "dynamic"])
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
    """Compares the cache with a fresh encoding, and what is read with what is new, at each step of each call."""

    steps: int = 0
    taken_over: int = 0

    def start(self, context: DraftContext) -> DraftSession:
        session = super().start(context)
        assert isinstance(session, DraftModelSession)
        assert session.passes.num_fed_tokens == sum(len(sequence) - 1 for sequence in context.sequences)
        propose = session.propose
        drafted_at: dict[int, int] = {}
        session.propose = lambda *args: self.checked(session, propose, drafted_at, *args)  # type: ignore[method-assign]
        return session

    def checked(self, session: Any, propose: Any, drafted_at: dict[int, int], context: Any, size: int) -> TokenTree:
        before = session.passes.num_fed_tokens
        expected = sum(self._num_unread(session, drafted_at, context))
        tree: TokenTree = propose(context, size)
        drafted_at |= {row: len(ids) for row, ids in zip(context.rows, context.sequences, strict=True)}
        if session.nodes is None:
            return tree
        drafted = int((session.nodes.fed > 0).sum())
        assert session.passes.num_fed_tokens - before == expected + drafted, "only what is new is read"
        self.compare(session, context)
        self.steps += 1
        return tree

    def _num_unread(self, session: Any, drafted_at: dict[int, int], context: DraftContext) -> list[int]:
        """Tokens whose keys and values are not in the cache, the root counted; found out step by step."""
        unread = []
        for row, sequence in zip(context.rows, context.sequences, strict=True):
            i = session.rows.index(row)
            if session.nodes is None:
                unread.append(len(sequence) - session.passes.lengths[i])
                continue
            node, read = 0, drafted_at[row]
            while read < len(sequence) - 1:
                node = child_of(session.nodes, i, node, sequence[read])
                if node < 0 or session.nodes.fed[i, node] < 0:
                    break
                read += 1
                self.taken_over += 1
            unread.append(len(sequence) - read)
        return unread

    def compare(self, session: Any, context: DraftContext) -> None:
        """The committed tokens of each row, and the path to the deepest node that was fed."""
        assert session.passes.lengths == [len(sequence) - 1 for sequence in context.sequences]
        if isinstance(session.passes, TreePasses):
            for i, sequence in enumerate(context.sequences):
                self._compare_row(session, i, sequence)

    def _compare_row(self, session: Any, i: int, sequence: Any) -> None:
        nodes = session.nodes
        fed = [node for node in range(nodes.counts[i]) if nodes.fed[i, node] >= 0]
        path = [max(fed, key=lambda node: nodes.depths[i, node])]
        while path[0] > 0:
            path.insert(0, int(nodes.parents[i, path[0]]))
        ids = [*sequence[:-1].tolist(), *(int(nodes.tokens[i, node]) for node in path)]
        model = session.bound.model
        cache = DynamicCache(config=model.config)
        # Position ids of the padding-free row, whatever the batch looks like.
        model(input_ids=torch.tensor([ids]), use_cache=True, **{CACHE: cache})
        length = len(sequence) - 1
        slots = [*range(length), *(length + int(nodes.fed[i, node]) for node in path)]
        for mine, other in zip(session.passes.cache.tree_layers(), cache.layers, strict=True):
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
    start = drafter.start

    def started(context: DraftContext) -> DraftSession:
        session: Any = start(context)
        finish = session.finish
        session.finish = lambda context: (counted.append(session.passes.num_fed_tokens), finish(context))
        return session  # type: ignore[no-any-return]

    drafter.start = started  # type: ignore[method-assign]
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
        assert_identical(tiny_model(), drafter_of("dynamic", draft), inputs, max_new_tokens=16, do_sample=True)


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


def test_trees_come_best_first() -> None:
    for tree in recorded(drafter_of("dynamic"), prompts(9), max_new_tokens=16):
        paths = [1.0]
        for parent, score in zip(tree.parents[0, 1:].tolist(), tree.scores[0, 1:].tolist(), strict=True):  # type: ignore[index]
            paths.append(paths[parent] * score)
        assert all(a >= b - 1e-6 for a, b in itertools.pairwise(paths))


def test_hits_are_counted_and_change_the_scores() -> None:
    drafter = drafter_of("dynamic")
    assert_identical(tiny_model(), drafter, prompts(9, 5), max_new_tokens=32)
    tried, hit, by_depth = drafter._calibration.of_kind("likeliest")
    assert 0 < hit.sum() < tried.sum()
    assert (hit <= tried).all()
    assert 0 < by_depth[1].sum() < by_depth[0].sum()
    assert (np.diff(by_depth[0]) <= 0).all(), "a list counts only if its parent was right"
    assert drafter._calibration.rates("likeliest").tolist() != drafter.fresh()._calibration.rates("likeliest").tolist()


@pytest.mark.parametrize(
    ("path", "hit_rate", "level", "target", "pays"),
    [
        (0.9, 0.8, 1.0, 10.0, True),  # 0.72 tokens in 1 second, 1.9 in the 11 so far
        (0.9, 0.1, 1.0, 10.0, False),  # 0.09 tokens in 1 second
        (0.9, 0.8, 7.0, 10.0, False),  # 0.72 tokens in 7 seconds, 1.9 in the 17 so far
        (0.1, 0.8, 1.0, 10.0, False),
        (0.1, 0.8, 0.1, 10.0, True),
    ],
)
def test_one_more_level_pays_if_it_raises_tokens_per_second(
    path: float, hit_rate: float, level: float, target: float, pays: bool
) -> None:
    nodes = DraftNodes.of_roots(np.zeros(1, np.int64), 8)
    nodes.counts[0], nodes.parents[0, 1], nodes.depths[0, 1], nodes.paths[0, 1] = 2, 0, 1, path
    rates = np.array([0.0, hit_rate])  # by the depth of the parent
    times = LevelTimes()
    times.observe(level)
    seconds = np.array([1, 64]), np.array([target, target])
    assert is_worth_a_level(nodes, np.array([[1, -1]]), 8, rates, times, seconds) == pays


@torch.no_grad()
@pytest.mark.parametrize("growth", MODES)
def test_an_expensive_draft_model_drafts_one_level(growth: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = prompts(9)["input_ids"][0].numpy().astype(np.int32)
    depths = {}
    for target_seconds in (None, 1e-3, 1e12):
        monkeypatch.setattr(LevelTimes, "observe", lambda times, _: vars(times).update(typical=1.0))
        step_seconds = (np.array([1, 64]), np.full(2, target_seconds)) if target_seconds else None
        context = DraftContext([0], [ids], [9], [20], step_seconds=step_seconds)
        drafter = drafter_of(growth, min_confidence=0.0)
        drafter.bind(tiny_model())
        depths[target_seconds] = int(drafter.start(context).propose(context, 64).depths.max())
    assert depths[1e-3] == 1
    assert depths[1e12] == depths[None] > 1


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("do_sample", [False, True])
def test_one_wrapper_serves_several_threads(do_sample: bool) -> None:
    fast = specdec.accelerate(tiny_model(), drafter_of(), strict=True)
    inputs = [prompts(12), prompts(3, 9), prompts(7)]
    kwargs = {"max_new_tokens": 48, "eos_token_id": None}
    if do_sample:  # the global generator is shared by threads: noise that is the same whatever it holds
        kwargs |= {"do_sample": True, "top_k": 1}
    expected = [tiny_model().generate(**each, **kwargs).tolist() for each in inputs]
    barrier = threading.Barrier(len(inputs))

    def generate(each: Any) -> list[Any]:
        barrier.wait()
        return [fast.generate(**each, **kwargs).tolist() for _ in range(3)]

    with ThreadPoolExecutor(len(inputs)) as pool:
        outputs = list(pool.map(generate, inputs))
    assert outputs == [[ids] * 3 for ids in expected]


# --- vocabularies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [VOCAB - 7, VOCAB + 7])
@pytest.mark.parametrize("growth", ["chain", "dynamic"])
@pytest.mark.parametrize("distribution", [False, True])
def test_padded_vocabularies(size: int, growth: str, distribution: bool) -> None:
    draft = new_model("llama", vocab_size=size)
    for inputs in (prompts(12), prompts(3, 9)):
        assert_identical(tiny_model(), drafter_of(growth, draft), inputs, max_new_tokens=16, do_sample=True)
    kwargs = {"max_new_tokens": 16, "do_sample": True, "distribution": distribution}
    for tree in recorded(drafter_of(growth, draft), prompts(9), **kwargs):
        assert tree.tokens.max() < VOCAB
        assert tree.draft_probs is None or tree.draft_probs.shape[-1] == VOCAB
