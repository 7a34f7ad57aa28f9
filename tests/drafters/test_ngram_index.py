"""The n-gram index and the growth of trees, against slow references."""

from __future__ import annotations

import importlib.util
import sys
from collections import defaultdict
from types import FunctionType, ModuleType

import numba
import numpy as np
import pytest
from numpy.typing import NDArray

from specdec.drafters.ngrams.ngram_index import SEPARATOR, NgramIndex, PeerOutputs, find_matches, room_for_matches
from specdec.drafters.ngrams.trie_growth import grow_tree

ORDERS = (1, 2, 4, 8)
BY_LENGTH = np.stack([1.7 ** np.minimum(np.arange(33.0), 16), 0.75 * np.exp(-np.arange(33.0) / 8)])
SMOOTHING = 1.5

Place = tuple[int, int]


def array(*tokens: int) -> NDArray[np.int32]:
    return np.array(tokens, np.int32)


def found(index: NgramIndex | PeerOutputs, query: NDArray[np.int32], max_hits: int = 1000) -> list[Place]:
    """Position of the continuation and length of each match."""
    matches = room_for_matches(4 * max_hits)
    count = find_matches(index.links, query, 0, 0, max_hits, 0, 1.0, 0.92, 0, matches)
    return [(int(position), int(length)) for _, position, length in matches[0][:count]]


def all_matches(index: NgramIndex, query: NDArray[np.int32]) -> list[Place]:
    """What `found` must find without a limit: every place with a continuation whose last tokens are the query's."""
    text = [*index.links[0][: index.length].tolist(), SEPARATOR]
    wanted = query.tolist()
    places = []
    for position in range(1, index.length):
        length = 0
        while length < len(wanted) and text[position - length] == wanted[-1 - length]:
            length += 1
        if length and text[position + 1] != SEPARATOR:
            places.append((position + 1, length))
    return places


def grown(
    index: NgramIndex, query: NDArray[np.int32], nodes: int, max_depth: int = 63
) -> tuple[list[int], list[int], list[float]]:
    matches = room_for_matches(4000)
    count = find_matches(index.links, query, 0, 0, 1000, 2, 1.0, 0.92, 0, matches)
    tokens, parents = np.zeros(nodes, np.int64), np.full(nodes, -1)
    scores = np.zeros(nodes, np.float32)
    nothing = array(SEPARATOR, SEPARATOR)
    texts = (nothing, nothing, index.links[0], nothing, nothing)
    used = grow_tree(texts, matches, count, BY_LENGTH, SMOOTHING, max_depth, tokens, parents, scores)
    return tokens[:used].tolist(), parents[:used].tolist(), scores[:used].tolist()


def all_paths(
    index: NgramIndex, query: NDArray[np.int32], max_depth: int
) -> dict[tuple[int, ...], tuple[float, float]]:
    """Score and path product of every continuation, by the definition in `grow_tree`."""
    matches = room_for_matches(4000)
    count = find_matches(index.links, query, 0, 0, 1000, 2, 1.0, 0.92, 0, matches)
    text = index.links[0]
    paths: dict[tuple[int, ...], tuple[float, float]] = {}

    def visit(path: tuple[int, ...], product: float, members: list[int]) -> None:
        depth = len(path)
        groups = defaultdict(list)
        for match in members if depth < max_depth else []:
            _, position, length = matches[0][match]
            if text[position + depth] >= 0:
                reach = min(length + depth, 32)
                weight = matches[1][match] * BY_LENGTH[0, reach]
                groups[int(text[position + depth])].append((match, weight, weight * BY_LENGTH[1, reach]))
        total = SMOOTHING + sum(weight for group in groups.values() for _, weight, _ in group)
        for token, group in groups.items():
            score = (sum(weight for _, weight, _ in group) - max(pay for _, _, pay in group)) / total
            paths[(*path, token)] = (score, product * score)
            visit((*path, token), product * score, [match for match, _, _ in group])

    visit((), 1.0, list(range(count)))
    return paths


def node_paths(tokens: list[int], parents: list[int]) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        paths.append((*paths[parent], token))
    return paths


def random_index(seed: int, vocab: int = 4, documents: int = 5, length: int = 60) -> NgramIndex:
    rng = np.random.default_rng(seed)
    index = NgramIndex(ORDERS, capacity=16, slots=16)
    for _ in range(documents):
        index.add_document(rng.integers(0, vocab, rng.integers(1, length), dtype=np.int32))
    return index


@pytest.mark.parametrize("seed", range(6))
def test_every_match_is_found_once(seed: int) -> None:
    index = random_index(seed, vocab=2 + seed)
    rng = np.random.default_rng(seed + 100)
    for length in (1, 2, 3, 7, 32):
        query = rng.integers(0, 2 + seed, length, dtype=np.int32)
        assert sorted(found(index, query)) == all_matches(index, query)


def test_other_orders() -> None:
    index = NgramIndex((2, 5))
    index.add_document(np.random.default_rng(0).integers(0, 3, 300, dtype=np.int32))
    query = array(0, 1, 2, 0, 1, 1)
    assert sorted(found(index, query)) == [place for place in all_matches(index, query) if place[1] >= 2]


def test_limit_keeps_the_newest_matches_of_each_order() -> None:
    index = NgramIndex(ORDERS)
    for _ in range(20):
        index.add_document(array(7, 5, 6, 1))
        index.add_document(array(8, 6, 2))
    by_order = {order: [p for p, n in all_matches(index, array(5, 6)) if n == order] for order in (1, 2)}
    # A chain is followed over twice as many positions as matches are taken, the longer ones among them included.
    assert sorted(found(index, array(5, 6), max_hits=3)) == sorted(
        [(p, 1) for p in by_order[1][-3:]] + [(p, 2) for p in by_order[2][-3:]]
    )


def test_hash_collisions_are_not_matches() -> None:
    index = NgramIndex(ORDERS, slots=1, max_slots=1)
    index.add_document(np.arange(100, dtype=np.int32))
    assert found(index, array(40, 41)) == [(43, 2)]


def test_neither_matches_nor_continuations_cross_documents() -> None:
    index = NgramIndex(ORDERS)
    index.add_document(array(1, 2, 3))
    index.add_document(array(4, 5))
    assert found(index, array(3)) == []  # 4 does not follow 3
    assert found(index, array(3, 4)) == [(6, 1)]  # 3 does not stand before 4
    tokens, _, _ = grown(index, array(1), 64)
    assert tokens == [0, 2, 3]


def test_growing_arrays_and_tables_lose_nothing() -> None:
    small = NgramIndex(ORDERS, capacity=2, slots=1)
    large = NgramIndex(ORDERS, capacity=10_000, slots=4096)
    text = np.random.default_rng(0).integers(0, 50, 3000, dtype=np.int32)
    large.add_document(text)
    for start in range(0, 3000, 7):
        small.extend(text[start : start + 7].copy())
    assert small.length == large.length
    for at in range(10, 3000, 97):
        assert sorted(found(small, text[at - 8 : at])) == sorted(found(large, text[at - 8 : at]))
    assert 3000 < small.links[2].shape[1] <= 8192


def test_empty_documents_and_queries() -> None:
    index = NgramIndex(ORDERS)
    index.add_document(array())
    index.add_document(array())
    assert index.num_tokens == 0
    assert found(index, array(1)) == []
    index.add_document(array(1, 2))
    assert found(index, array()) == []
    assert grown(index, array(9), 8) == ([0], [-1], [0.0])


@pytest.mark.parametrize("max_tokens", [128, 200])
def test_oldest_documents_are_evicted(max_tokens: int) -> None:
    index = NgramIndex(ORDERS, capacity=8, slots=32, max_slots=32, max_tokens=max_tokens)
    for document in range(100):
        index.add_document(np.full(9, document, np.int32))
        assert index.length <= max_tokens
        assert sorted(found(index, np.full(4, document, np.int32))) == all_matches(
            index, np.full(4, document, np.int32)
        )
    kept = index.links[0][: index.length].tolist()
    first = kept[1]
    assert kept == [t for document in range(first, 100) for t in [SEPARATOR] + [document] * 9]
    assert index.length >= max_tokens // 2
    assert index.num_evicted + index.length == 100 * 10
    assert found(index, array(first - 1, first - 1)) == []


def test_a_document_larger_than_the_budget_keeps_its_end() -> None:
    index = NgramIndex(ORDERS, slots=16, max_slots=16, max_tokens=100)
    index.add_document(np.arange(1000, dtype=np.int32))
    assert index.length <= 100
    assert found(index, array(997, 998)) == [(index.length - 1, 2)]
    index.add_document(array(1, 2, 3))
    assert found(index, array(997, 998)) == all_matches(index, array(997, 998)) != []


@pytest.mark.parametrize("nodes", [1, 2, 4, 8, 64, 200])
@pytest.mark.parametrize("max_depth", [1, 3, 6])
def test_tree_is_the_best_of_its_size(nodes: int, max_depth: int) -> None:
    for seed in range(5):
        index = random_index(seed, vocab=3 + 2 * seed)
        query = index.links[0][index.length - 4 : index.length]
        paths = all_paths(index, query, max_depth)
        tokens, parents, scores = grown(index, query, nodes, max_depth)
        assert len(tokens) == min(nodes, 1 + len(paths))
        listed = node_paths(tokens, parents)[1:]
        assert len(set(listed)) == len(listed)
        assert all(parent < node for node, parent in enumerate(parents))
        assert np.allclose([paths[path][0] for path in listed], scores[1:])
        products = [paths[path][1] for path in listed]
        best = sorted((product for _, product in paths.values()), reverse=True)[: len(listed)]
        assert np.allclose(products, best)  # best first, and no tree of this size is better


def test_first_nodes_of_a_larger_tree_are_the_smaller_tree() -> None:
    index = random_index(3, vocab=6, documents=20)
    query = index.links[0][index.length - 3 : index.length]
    large = grown(index, query, 64)
    for nodes in (1, 2, 4, 8, 16, 32):
        assert grown(index, query, nodes) == tuple(column[:nodes] for column in large)


def test_long_agreement_scores_high_and_a_lone_short_match_low() -> None:
    index = NgramIndex(ORDERS)
    for _ in range(5):
        index.add_document(np.arange(40, dtype=np.int32))
    index.add_document(array(100, 101))
    _, _, sure = grown(index, np.arange(20, dtype=np.int32), 2)
    _, _, unsure = grown(index, array(100), 2)
    assert sure[1] > 0.9
    assert unsure[1] < 0.4


def test_peers_grow_side_by_side_and_skip_their_own_region() -> None:
    peers = PeerOutputs(ORDERS, rows=3, room=4)
    for start in range(0, 60, 3):
        for row in range(3):
            peers.extend(row, np.arange(start, start + 3, dtype=np.int32) + 100 * row)
    text = peers.links[0]
    for row in range(3):
        first, end = peers.region(row)
        assert text[first] == SEPARATOR
        assert text[first + 1 : first + 61].tolist() == list(range(100 * row, 100 * row + 60))
        query = array(100 * row + 30, 100 * row + 31)
        assert found(peers, query) == [(first + 33, 2)]
        matches = room_for_matches(8)
        assert find_matches(peers.links, query, first, end, 2, 0, 1.0, 1.0, 0, matches) == 0


def uncompiled(name: str) -> ModuleType:
    """A second copy of a module of `specdec.drafters.ngrams`, made while compilation is off."""
    spec = importlib.util.find_spec(f"specdec.drafters.ngrams.{name}")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_uncompiled_kernels_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = [both(random_index(seed, vocab=3 + seed)) for seed in range(3)]
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
    plain_index, plain_growth = uncompiled("ngram_index"), uncompiled("trie_growth")
    assert isinstance(plain_index.find_matches, FunctionType) and isinstance(plain_growth.grow_tree, FunctionType)
    here = sys.modules[__name__]
    for name in ("NgramIndex", "find_matches"):
        monkeypatch.setattr(here, name, getattr(plain_index, name))
    monkeypatch.setattr(here, "grow_tree", plain_growth.grow_tree)
    assert [both(random_index(seed, vocab=3 + seed)) for seed in range(3)] == compiled


def both(index: NgramIndex) -> tuple[object, object]:
    query = index.links[0][index.length - 3 : index.length]
    return found(index, query), grown(index, query, 32)
