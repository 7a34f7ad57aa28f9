"""The lookahead drafter: what it proposes, what it keeps, and what it never tells."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specdec.drafters.base import DraftContext
from specdec.drafters.lookahead import LookaheadDrafter
from specdec.drafters.ngrams.ngram_index import append_tokens
from specdec.drafters.ngrams.trie_growth import draft_row
from tests.drafters.lookahead_calls import WordTokenizer, call, context, paths, propose, proposed


def test_repeated_text_is_continued() -> None:
    text = list(range(100, 140))
    assert text[10:] in proposed(LookaheadDrafter(), [*text, 1, 2, *text[:10]])


def test_tree_is_well_formed() -> None:
    rng = np.random.default_rng(0)
    drafter = LookaheadDrafter()
    for nodes in (1, 2, 4, 16, 64):
        sequence = rng.integers(0, 6, 200)
        tree = propose(drafter, context(sequence), nodes)
        assert tree.tokens.shape == tree.parents.shape == (1, nodes)
        assert tree.scores is not None and tree.scores.shape == (1, nodes)
        assert (tree.tokens.dtype, tree.parents.dtype, tree.scores.dtype) == (torch.int64, torch.int64, torch.float32)
        assert tree.tokens[0, 0] == sequence[-1] and tree.parents[0, 0] == -1
        assert (tree.parents[0, 1:] < torch.arange(1, nodes)).all() and (tree.parents[0, 1:] >= 0).all()
        products = [1.0]
        for parent, score in zip(tree.parents[0, 1:].tolist(), tree.scores[0, 1:].tolist(), strict=True):
            assert 0 < score < 1
            products.append(products[parent] * score)
        assert all(a >= b - 1e-6 for a, b in itertools.pairwise(products))
        assert len({tuple(path) for path in paths(tree)}) == nodes - 1


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_small_budgets_are_beginnings_of_large_ones(nodes: int) -> None:
    sequence = np.random.default_rng(1).integers(0, 5, 150)
    large, small = (propose(LookaheadDrafter(), context(sequence), n) for n in (64, nodes))
    assert torch.equal(small.tokens, large.first(nodes).tokens)
    assert torch.equal(small.parents, large.first(nodes).parents)


def test_no_deeper_than_allowed() -> None:
    text = list(range(50)) * 2 + [0]
    for depth in (0, 1, 5):
        tree = propose(LookaheadDrafter(), context(text, depth=depth), 64)
        assert int(tree.depths.max()) == depth == tree.num_nodes - 1
    assert int(propose(LookaheadDrafter(max_depth=3), context(text), 64).depths.max()) == 3
    assert propose(LookaheadDrafter(max_nodes=10), context(text), 64).num_nodes == 10


def test_trees_wider_and_deeper_than_usual() -> None:
    text = list(range(300))
    drafter = LookaheadDrafter(max_nodes=256, max_depth=200)
    assert propose(drafter, context([*text, 999, *text[:20]], depth=999), 256).num_nodes == 201


def test_nothing_to_go_on() -> None:
    drafter = LookaheadDrafter()
    tree = propose(drafter, context([7], prompts=[0]), 64)
    assert tree.tokens.tolist() == [[7]] and tree.parents.tolist() == [[-1]]
    session = drafter.start(context([], prompts=[0]))
    assert session.propose(context([7], prompts=[0]), 64).num_nodes == 1
    session.finish(context([7], prompts=[0]))
    assert drafter.stats()["shared"]["tokens"] == 0


def test_rows_are_independent_and_padded() -> None:
    drafter = LookaheadDrafter(share_outputs=False)
    first, second, third = [1, 2, 3, 1], [10, 11, 12, 13, 14, 10], [20]
    session = drafter.start(context(first, second, third))
    tree = session.propose(context(first, second, third), 64)
    assert [paths(tree, row) for row in range(3)] == [
        [[2], [2, 3], [2, 3, 1]],
        [[11, 12, 13, 14, 10][:n] for n in range(1, 6)],
        [],
    ]
    assert tree.is_real.sum(1).tolist() == [4, 6, 1]
    # The second row alone goes on.
    going_on = DraftContext([1], [np.array([*second, 11], np.int32)], [len(second)], [100])
    assert paths(session.propose(going_on, 64))[0] == [12]


def test_rows_read_one_anothers_outputs_but_not_prompts() -> None:
    prompts = [[50, 1, 2, 3], [60, 4, 5, 6]]
    answers = [[70, 71, 72, 73], [70]]
    for share, expected in ((True, [71, 72, 73]), (False, None)):
        drafter = LookaheadDrafter(share_outputs=share)
        session = drafter.start(context(*prompts))
        both = context(*(p + a for p, a in zip(prompts, answers, strict=True)), prompts=[4, 4])
        found = paths(session.propose(both, 64), row=1)
        assert (expected in found) == share
        asked = context([*prompts[0], *answers[0]], [*prompts[1], 70, 2], prompts=[4, 4])
        assert paths(session.propose(asked, 64), row=1) == []  # 3 follows 2 in the other row's prompt only


def test_a_rows_own_output_counts_once() -> None:
    trees = []
    for share in (True, False):
        drafter = LookaheadDrafter(share_outputs=share)
        session = drafter.start(context([1, 2], [50]))
        trees.append(session.propose(context([1, 2, 7, 8, 7], [50, 60], prompts=[2, 1]), 64))
    assert trees[0].scores is not None and trees[1].scores is not None
    assert torch.equal(trees[0].tokens, trees[1].tokens) and torch.equal(trees[0].scores, trees[1].scores)


def test_equal_prompts_are_indexed_once_and_stay_apart() -> None:
    drafter = LookaheadDrafter(share_outputs=False)
    prompt = [1, 2, 3, 4, 5]
    session = drafter.start(context(prompt, prompt))
    tree = session.propose(context([*prompt, 8, 9, 8], [*prompt, 1], prompts=[5, 5]), 64)
    assert paths(tree, 0)[0] == [9]
    assert [2, 3, 4, 5] in paths(tree, 1) and all(9 not in path for path in paths(tree, 1))


def test_outputs_serve_later_calls() -> None:
    drafter = LookaheadDrafter()
    call(drafter, [1, 2], [30, 31, 32, 33])
    assert [32, 33] in proposed(drafter, [9, 30, 31])
    private = LookaheadDrafter(share_outputs=False)
    call(private, [1, 2], [30, 31, 32, 33])
    assert proposed(private, [9, 30, 31]) == []


@pytest.mark.parametrize("share_prompts", [False, True])
def test_a_secret_prompt_is_never_proposed_to_another_call(share_prompts: bool) -> None:
    secret = list(range(1000, 1040))
    drafter = LookaheadDrafter(share_prompts=share_prompts)
    call(drafter, secret, [5, 6, 7])
    session = drafter.start(context(secret, [1, *secret]))
    session.finish(context([*secret, 5, 6], [1, *secret, 5, 6], prompts=[40, 41]))
    seen = {
        token
        for at in range(1, 40)
        for path in proposed(drafter, [3, *secret[:at]]) + proposed(drafter, secret[at - 1 : at])
        for token in path
    }
    assert bool(seen & set(secret)) == share_prompts


def test_corpus_and_predicted_output() -> None:
    drafter = LookaheadDrafter()
    drafter.add([1, 2, 3])
    drafter.add(torch.tensor([[4, 5, 6], [7, 8, 9]]))
    drafter.add([np.array([10, 11]), [12, 13]], scope="shared")
    drafter.add([20, 21, 22], scope="request")
    assert proposed(drafter, [20])[0] == [21]
    assert proposed(drafter, [20]) == []  # for one call only
    assert [proposed(drafter, [t])[0][0] for t in (1, 4, 7, 10, 12)] == [2, 5, 8, 11, 13]
    assert proposed(drafter, [6]) == []
    assert drafter.stats()["corpus"]["tokens"] == 12 and drafter.stats()["shared"]["tokens"] == 6
    drafter.clear("corpus")
    assert proposed(drafter, [1]) == [] and proposed(drafter, [10]) == [[11]]
    drafter.add([20, 21, 22], scope="request")
    drafter.clear()
    assert proposed(drafter, [10]) == [] and proposed(drafter, [20]) == []


def test_text_needs_the_one_tokenizer() -> None:
    tokenizer, other = WordTokenizer("a b c d"), WordTokenizer("a c b d")
    drafter = LookaheadDrafter()
    drafter.add(["b c d", "d a"], tokenizer=tokenizer)
    assert proposed(drafter, [1]) == [[2], [2, 3]]
    with pytest.raises(ValueError, match="text needs a tokenizer"):
        drafter.add("b c")
    with pytest.raises(ValueError, match="one drafter per tokenizer"):
        drafter.add("b c", tokenizer=other)
    drafter.add("b c", tokenizer=WordTokenizer("a b c d"))
    drafter.clear()
    drafter.add("b c", tokenizer=other)


@pytest.mark.parametrize(
    ("documents", "error", "words"),
    [
        ([1, -1], ValueError, "got -1"),
        ([1, 2**31], ValueError, "got 2147483648"),
        ([2**80], ValueError, "2\\*\\*31"),
        (np.array([2**63], np.uint64), ValueError, "2\\*\\*31"),
        (torch.tensor([-100, 3]), ValueError, "-100"),
        ([1.5], TypeError, "integers"),
        ([True, False], TypeError, "integers"),
        (np.zeros((2, 2, 2), np.int64), ValueError, "\\[2, 2, 2\\]"),
        ({"input_ids": [1]}, TypeError, "dict"),
    ],
)
def test_wrong_documents(documents: Any, error: type[Exception], words: str) -> None:
    drafter = LookaheadDrafter()
    with pytest.raises(error, match=words):
        drafter.add(documents)
    assert drafter.stats()["corpus"]["tokens"] == 0


def test_wrong_settings_and_scopes() -> None:
    for setting, value in (("orders", (2, 1)), ("orders", ()), ("recency", 0), ("max_nodes", 0), ("shared_bytes", 10)):
        with pytest.raises(ValueError, match=setting):
            LookaheadDrafter(**{setting: value})
    with pytest.raises(ValueError, match="request, shared, corpus"):
        LookaheadDrafter().add([1], scope="prompts")
    with pytest.raises(ValueError, match="request, shared, corpus"):
        LookaheadDrafter().clear("all")


def test_settings_are_the_fields() -> None:
    settings = LookaheadDrafter(max_hits=5).settings()
    assert settings["max_hits"] == 5 and settings["share_prompts"] is False
    assert LookaheadDrafter(**settings).settings() == settings
    assert not any(name.startswith("_") for name in settings)


def test_budget_bounds_the_shared_scope() -> None:
    drafter = LookaheadDrafter(shared_bytes=8192)
    for document in range(50):
        call(drafter, [1], [document, *range(1000, 1030)])
        assert drafter.stats()["shared"]["bytes"] <= 8192
    assert drafter.stats()["shared"]["evicted_tokens"] > 0
    assert proposed(drafter, [49])[0] == [1000] and proposed(drafter, [0]) == []


def test_bytes_per_token() -> None:
    drafter = LookaheadDrafter()
    drafter.add(np.random.default_rng(0).integers(0, 30_000, 4_000_000, dtype=np.int32))
    stats = drafter.stats()["corpus"]
    assert stats["bytes"] / stats["tokens"] <= 25


def test_a_call_begins_anew_when_the_text_does() -> None:
    drafter = LookaheadDrafter()
    session = drafter.start(context([1, 2, 3, 1]))
    session.propose(context([1, 2, 3, 1]), 8)
    assert paths(session.propose(context([7, 8, 7]), 8)) == [[8], [8, 7]]


def test_threads_do_not_disturb_each_other() -> None:
    drafter = LookaheadDrafter(shared_bytes=20_000)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            own = list(range(1000 * seed, 1000 * seed + 40))
            for _ in range(30):
                sequence = [*own, 1, *own[:4]]
                session = drafter.start(context(sequence))
                for end in range(4, 30, 2):
                    tree = session.propose(context([*own, 1, *own[:end]], prompts=[len(sequence)]), 16)
                    assert own[end] == tree.tokens[0, 1]
                session.finish(context([*own, 1, *own], prompts=[len(sequence)]))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    text = drafter._indexes["shared"].links[0][: drafter._indexes["shared"].length]
    for document in np.split(text, np.flatnonzero(text == -1))[1:]:
        assert (np.diff(document[1:]) == 1).all()


def test_each_kernel_is_compiled_for_one_set_of_types(tmp_path: Path) -> None:
    drafter = LookaheadDrafter(recency=1, smoothing=1, shared_weight=2)
    drafter.add([1, 2, 3])
    drafter.save(tmp_path)
    drafter.load(tmp_path).add(torch.tensor([4, 5]), scope="shared")
    drafter.add([5], scope="request")
    frozen = np.array([1, 2, 3, 1, 2], np.int32)
    frozen.flags.writeable = False
    everything = DraftContext([0, 2], [frozen[::2], frozen], [1, 1], [9, 9])
    session = drafter.start(everything)
    session.propose(everything, 8)
    for compiled in (append_tokens, draft_row):
        assert len(getattr(compiled, "signatures", [1])) == 1


def test_an_output_costs_no_more_than_room_for_itself() -> None:
    """Tables of the largest size would be zeroed in the first call of every drafter."""
    drafter = LookaheadDrafter()
    drafter.add([1, 2, 3], scope="shared")
    assert drafter.stats()["shared"]["bytes"] < 2**19
    drafter.add(list(range(3, 40)) * 1000, scope="shared")
    assert drafter._indexes["shared"].links[2].shape[1] >= 37_000
