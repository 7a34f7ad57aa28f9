"""The kv cache holds, after every step, what plain decoding of the committed tokens would hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor

import specdec
from specdec import kv_cache
from specdec.budget import Budget
from specdec.compat import CACHE
from specdec.kv_cache import TreeCache, TreeLayer
from specdec.target import TreeTarget
from tests.conformance import RandomTreeDrafter, reference
from tests.tiny_models import WINDOW, prompts, tiny_model

NEW_TOKENS = 24


def plain_cache(model: Any, tokens: Sequence[int], padding: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values per layer of one left-padded row, every token kept, `[heads, length, head_dim]`."""
    ids = torch.tensor([tokens])
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = tf.DynamicCache()  # without the config its layers have no window and keep everything
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **{CACHE: cache})
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


class CacheChecker:
    """Compares the cache after each commit with that of plain decoding."""

    def __init__(self, model: Any, patch: pytest.MonkeyPatch, inputs: dict[str, Tensor]) -> None:
        self.model = model
        self.padding = (inputs["attention_mask"] == 0).sum(1).tolist()
        self.tokens = inputs["input_ids"].tolist()
        self.num_checks = 0
        self.num_moved = 0
        self.was_ragged = False
        self.widest: list[int] = []
        self.trees: list[Any] = []
        forward, commit = TreeTarget.forward, TreeTarget.commit

        def checked_forward(target: TreeTarget, tree: Any) -> Tensor:
            self.trees.append(tree)
            return forward(target, tree)

        def checked_commit(target: TreeTarget, paths: Sequence[Sequence[int]], *args: Any) -> None:
            commit(target, paths, *args)
            self.check(target, paths)

        patch.setattr(TreeTarget, "forward", checked_forward)
        patch.setattr(TreeTarget, "commit", checked_commit)

    def check(self, target: TreeTarget, paths: Sequence[Sequence[int]]) -> None:
        cache = target.cache
        tree = self.trees[-1]
        for i, row in enumerate(target.rows):
            self.tokens[row] += tree.tokens[i, list(paths[i])].tolist()
            assert cache.lengths[i] == len(self.tokens[row])
            self.num_moved += list(paths[i]) != list(range(len(paths[i])))
            expected = plain_cache(self.model, self.tokens[row], self.padding[row])
            for mine, theirs in zip(cache.row(i), expected, strict=True):
                assert mine is not None
                for got, right in zip(mine, theirs, strict=True):
                    # Places of padding are hidden; what they hold does not matter.
                    torch.testing.assert_close(
                        got[:, self.padding[row] :], right[:, self.padding[row] :], atol=1e-5, rtol=1e-4
                    )
        self.num_checks += 1
        self.was_ragged |= cache.is_ragged
        self.widest.append(cache.capacity)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("lengths", [(9,), (4, 9, 6)], ids=["single", "ragged"])
def test_after_every_step_the_cache_is_that_of_the_committed_tokens(
    name: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = tiny_model(name), prompts(*lengths)
    eos = [2, 5, 9] if len(lengths) > 1 else None
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "eos_token_id": eos}
    expected = reference(model, inputs, seed=4, **kwargs)
    drafter = RandomTreeDrafter(expected.answers)
    fast = specdec.accelerate(model, drafter, strict=True, budget=Budget(64, fixed=True))
    assert fast.capability.mode == "tree"
    checker = CacheChecker(model, monkeypatch, inputs)
    torch.manual_seed(4)
    assert fast.generate(**inputs, **kwargs).tolist() == expected.ids.tolist()
    assert checker.num_checks == fast.report.num_target_passes - 1
    assert checker.num_moved > 0
    assert checker.was_ragged == (len(lengths) > 1)


def test_growth_keeps_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "GROWTH", 4)
    original = TreeCache.__init__
    monkeypatch.setattr(TreeCache, "__init__", lambda self, types, capacity, *args: original(self, types, 8, *args))
    model, inputs = tiny_model(), prompts(4, 9, 6)
    expected = reference(model, inputs, max_new_tokens=NEW_TOKENS, eos_token_id=None)
    fast = specdec.accelerate(model, RandomTreeDrafter(expected.answers), budget=Budget(64, fixed=True), strict=True)
    assert fast.capability.mode == "tree"
    checker = CacheChecker(model, monkeypatch, inputs)
    assert fast.generate(**inputs, max_new_tokens=NEW_TOKENS, eos_token_id=None).tolist() == expected.ids.tolist()
    assert len(set(checker.widest)) > 3, "the cache has grown several times"


@pytest.mark.parametrize("new_tokens", [NEW_TOKENS, 512])
def test_memory_is_that_of_plain_decoding_and_the_tree(new_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, max_nodes = tiny_model(), prompts(4, 9), 16
    caches: list[TreeCache] = []
    end_prefill = TreeCache.end_prefill

    def remember(cache: TreeCache, batch: int) -> None:
        caches.append(cache)
        end_prefill(cache, batch)

    drafter = RandomTreeDrafter([[5] * new_tokens] * 2)
    fast = specdec.accelerate(model, drafter, budget=Budget(max_nodes, fixed=True), strict=True)
    assert fast.capability.mode == "tree"
    monkeypatch.setattr(TreeCache, "end_prefill", remember)
    out = fast.generate(**inputs, max_new_tokens=new_tokens, eos_token_id=None, return_dict_in_generate=True)
    layers = out[CACHE].layers
    plain = sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))
    # The last token of the output is in no cache, but there is a slot for it.
    assert caches[0].nbytes <= plain + (max_nodes + 1) * plain // layers[0].keys.shape[2]


def new_cache(batch: int = 3, prompt: int = 4, capacity: int = 16) -> tuple[TreeCache, Tensor]:
    """A cache whose entries are numbered: prompt token `t` of row `b` has the key `100 * b + t`."""
    cache = TreeCache(["full_attention", "full_attention"], capacity)
    keys = numbered(batch, range(prompt))
    for layer in range(2):
        cache.update(keys, -keys, layer)
    cache.end_prefill(batch)
    return cache, keys


def numbered(batch: int, numbers: Sequence[int]) -> Tensor:
    values = torch.arange(batch)[:, None] * 100.0 + torch.tensor(numbers)
    return values[:, None, :, None].expand(-1, 2, -1, 3).contiguous()


def held(cache: TreeCache, row: int) -> list[int]:
    layers = cache.row(row)
    for entry in layers:
        assert entry is not None
        key, value = entry
        assert key.shape == (2, cache.lengths[row], 3)
        assert torch.equal(key, -value)
        assert torch.equal(key, key[:1, :, :1].expand_as(key))
    assert layers[0] is not None and layers[1] is not None
    assert torch.equal(layers[0][0], layers[1][0])
    return (layers[0][0][0, :, 0] - 100 * row).int().tolist()


def run_tree(cache: TreeCache, numbers: Sequence[int]) -> Tensor:
    keys = numbered(cache.batch_size, numbers)
    for layer in range(2):
        seen, _ = cache.update(keys, -keys, layer)
    return seen


def test_paths_of_any_form_are_moved_behind_the_committed_tokens() -> None:
    cache, _ = new_cache()
    seen = run_tree(cache, range(50, 58))
    assert seen.shape[2] == 12
    cache.commit([[0, 2, 5, 7], [0, 1, 2], [0]])
    assert cache.lengths == [8, 7, 5]
    assert cache.is_ragged and cache.width == 8
    assert held(cache, 0) == [0, 1, 2, 3, 50, 52, 55, 57]
    assert held(cache, 1) == [0, 1, 2, 3, 50, 51, 52]
    assert held(cache, 2) == [0, 1, 2, 3, 50]

    seen = run_tree(cache, range(60, 64))
    assert seen.shape[2] == 12, "the longest row and its tree"
    cache.commit([[0], [0, 3], []])
    assert held(cache, 0)[8:] == [60]
    assert held(cache, 1)[7:] == [60, 63]
    assert held(cache, 2) == [0, 1, 2, 3, 50], "an empty path keeps nothing"


def test_random_paths_against_lists() -> None:
    random = np.random.default_rng(0)
    for _ in range(30):
        batch = int(random.integers(1, 5))
        cache, _ = new_cache(batch, prompt=int(random.integers(1, 6)), capacity=int(random.integers(1, 40)))
        expected = [held(cache, row) for row in range(batch)]
        for step in range(6):
            nodes = int(random.integers(1, 9))
            numbers = list(range(10 * step + 10, 10 * step + 10 + nodes))
            run_tree(cache, numbers)
            paths = [
                [0, *sorted(random.choice(np.arange(1, nodes), int(random.integers(0, nodes)), replace=False).tolist())]
                for _ in range(batch)
            ]
            cache.commit(paths)
            for row, path in enumerate(paths):
                expected[row] += [numbers[node] for node in path]
                assert held(cache, row) == expected[row]


def test_rows_leave_in_any_order() -> None:
    cache, _ = new_cache()
    run_tree(cache, range(50, 54))
    cache.commit([[0, 3], [0], [0, 1, 2]])
    cache.keep_rows([0, 2])
    assert cache.batch_size == 2
    assert cache.lengths == [6, 7]
    keys = torch.stack([numbered(3, [60, 61])[row] for row in (0, 2)])
    for layer in range(2):
        cache.update(keys, -keys, layer)
    cache.commit([[0, 1], [0]])
    assert [int(value) for value in cache.row(1)[0][0][0, -3:, 0]] == [251, 252, 260]
    assert held(cache, 0) == [0, 1, 2, 3, 50, 53, 60, 61]


def test_it_is_a_cache_of_transformers() -> None:
    cache, _ = new_cache(batch=1)
    assert isinstance(cache, tf.Cache)
    assert cache.get_seq_length() == 4
    run_tree(cache, range(50, 54))
    assert cache.get_seq_length() == 4, "a tree is not committed by being run"
    assert cache.get_mask_sizes(3, 0) == (7, 0)
    assert not any(cache.is_sliding)


def test_layers_of_one_shape_share_one_allocation() -> None:
    cache, _ = new_cache()
    first, second = cache.tree_layers()
    assert first.keys.untyped_storage().data_ptr() == second.keys.untyped_storage().data_ptr()
    apart = TreeCache(["full_attention"] * 2, 16, one_device=False)
    keys = numbered(1, [0])
    for layer in range(2):
        apart.update(keys, keys, layer)
    first, second = apart.tree_layers()
    assert first.keys.untyped_storage().data_ptr() != second.keys.untyped_storage().data_ptr()
    assert apart.nbytes == cache.nbytes / 3


def test_layers_of_different_shapes() -> None:
    cache = TreeCache(["full_attention", "sliding_attention", "full_attention"], 8)
    shapes = [(2, 3), (1, 5), (2, 3)]
    keys = [torch.randn(2, heads, 4, width) for heads, width in shapes]
    for layer, key in enumerate(keys):
        cache.update(key, -key, layer)
    cache.end_prefill(2)
    tree = [torch.randn(2, heads, 6, width) for heads, width in shapes]  # makes it grow
    for layer, key in enumerate(tree):
        cache.update(key, -key, layer)
    cache.commit([[0, 4], [0, 1, 5]])
    for layer in range(3):
        for row, path in enumerate(([0, 4], [0, 1, 5])):
            key, value = cache.row(row)[layer]
            torch.testing.assert_close(key, torch.cat([keys[layer][row], tree[layer][row][:, path]], dim=1))
            torch.testing.assert_close(value, -key)


@pytest.mark.parametrize("windowed", [False, True])
def test_reading_and_writing_caches_of_transformers(windowed: bool) -> None:
    config = tf.MistralConfig(num_hidden_layers=2, sliding_window=WINDOW if windowed else None)
    past = tf.DynamicCache(config=config)
    keys = numbered(2, range(WINDOW + 3))
    for layer in range(2):
        past.update(keys, -keys, layer)
    types = ["sliding_attention" if windowed else "full_attention"] * 2
    cache = TreeCache(types, 4)
    cache.load(past)
    cache.end_prefill(2)
    assert cache.lengths == [WINDOW + 3] * 2
    visible = WINDOW - 1 if windowed else WINDOW + 3
    assert held(cache, 1)[-visible:] == list(range(WINDOW + 3))[-visible:]

    run_tree(cache, [50, 51, 52])
    cache.commit([[0, 2], [0, 1, 2]])
    back = tf.DynamicCache(config=config)
    kv_cache.store([cache.row(row) for row in range(2)], back)
    expected = tf.DynamicCache(config=config)
    for start in range(WINDOW + 3):
        for layer in range(2):
            expected.update(keys[:, :, start : start + 1], -keys[:, :, start : start + 1], layer)
    last = torch.stack([numbered(2, [50, 52])[0], numbered(2, [50, 51])[1]])
    for step in range(2):
        for layer in range(2):
            expected.update(last[:, :, step : step + 1], -last[:, :, step : step + 1], layer)
    assert back.get_seq_length() == WINDOW + 3 + 3
    width = expected.layers[0].keys.shape[2]
    if windowed:
        assert back.layers[0].keys.shape[2] == width
    assert back.layers[0].keys[1, 0, -3:, 0].tolist() == [150, 151, 152]
    assert type(back.layers[0]) is type(expected.layers[0])


def test_caches_that_cannot_be_read() -> None:
    assert kv_cache.supports(None)
    assert kv_cache.supports(tf.DynamicCache())
    assert not kv_cache.supports(tf.DynamicCache(offloading=True))
    assert not kv_cache.supports(tf.StaticCache(config=tiny_model().config, max_cache_len=8))


def test_dummy_layers_hold_nothing() -> None:
    cache = TreeCache(["dummy", "full_attention"], 4)
    keys = numbered(1, [0, 1])
    cache.update(keys, -keys, 1)
    cache.end_prefill(1)
    assert cache.row(0)[0] is None
    assert cache.lengths == [2]
    assert [isinstance(layer, TreeLayer) for layer in cache.layers] == [False, True]
