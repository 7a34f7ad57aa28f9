"""Medusa: the tree of the heads' lists, what it learns, and heads that were trained to be right."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

import specdec
from specdec.benchmark.offline_replay import replay
from specdec.budget import Budget
from specdec.commands.demo import _drafters
from specdec.drafters import DraftContext, MedusaDrafter, Step
from specdec.drafters.medusa import HeadLists, default_accuracies
from specdec.drafters.trees.rank_tree import count_ranks, draft_rows
from specdec.heads import HeadCalibration, MedusaHeads
from specdec.tree import TokenTree
from tests.conformance import TaughtMedusaDrafter, assert_identical, random_heads, reference
from tests.tiny_models import new_model, prompts, tiny_model

HEADS, HIDDEN = 3, 32


def context(rows: int = 1, max_depth: int | list[int] = 100, seed: int = 0, **changes: Any) -> DraftContext:
    hidden = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(seed))
    values = {
        "rows": list(range(rows)),
        "sequences": [np.arange(5 + row, 9 + row, dtype=np.int32) for row in range(rows)],
        "prompt_lengths": [2] * rows,
        "max_depth": max_depth if isinstance(max_depth, list) else [max_depth] * rows,
        "hidden_states": hidden,
    }
    return DraftContext(**values | changes)


def bound(**settings: Any) -> MedusaDrafter:
    drafter = MedusaDrafter(random_heads(tiny_model(), HEADS), **settings)
    drafter.bind(tiny_model())
    return drafter


def propose(drafter: MedusaDrafter, now: DraftContext, nodes: int) -> TokenTree:
    """The first proposal of a call."""
    return drafter.start(now).propose(now, nodes)


def paths_of(tree: TokenTree, row: int = 0) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, tree.num_nodes):
        parent = int(tree.parents[row, node])
        paths.append((*paths[parent], int(tree.tokens[row, node])) if parent >= 0 else ())
    return paths


# --- the tree ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5, 16, 40])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_tree_is_the_best_of_its_size(size: int, depth: int) -> None:
    random = np.random.default_rng(size)
    heads, ranks = 3, 3
    listed = np.stack([random.permutation(50)[:ranks] for _ in range(heads)])[None]
    rates = random.random((heads, ranks))
    tokens, parents, scores = np.zeros((1, size), int), np.full((1, size), -1), np.zeros((1, size), np.float32)
    probs = np.zeros((1, heads, ranks), np.float32)
    count = draft_rows(listed, probs, rates, False, np.array([depth]), tokens, parents, scores)
    products = {
        path: np.prod([rates[head, rank] for head, rank in enumerate(path)])
        for length in range(1, depth + 1)
        for path in itertools.product(range(ranks), repeat=length)
    }
    best = sorted(products.values(), reverse=True)[: size - 1]
    assert count == len(best) + 1
    tree = TokenTree(torch.tensor(tokens[:, :count]), torch.tensor(parents[:, :count]))
    paths = paths_of(tree)[1:]
    assert len(set(paths)) == len(paths)
    by_rank = [
        tuple(int(np.flatnonzero(listed[0, head] == token)[0]) for head, token in enumerate(path)) for path in paths
    ]
    assert [products[path] for path in by_rank] == pytest.approx(best), "best first"
    assert scores[0, 1:count] == pytest.approx([rates[len(path) - 1, path[-1]] for path in by_rank])


def test_paths_run_through_the_heads_lists() -> None:
    drafter = bound(max_nodes=32, top_k=4)
    now = context(rows=3)
    tree = propose(drafter, now, 64)
    logits = drafter.heads(now.hidden_states)
    lists = logits.topk(4, -1).indices
    assert tree.num_nodes == 32
    for row in range(3):
        assert int(tree.tokens[row, 0]) == now.sequences[row][-1]
        for path in paths_of(tree, row):
            for head, token in enumerate(path):
                assert token in lists[head, row].tolist()
    tree.validate(97)


def test_where_the_heads_are_sure_the_tree_is_deep_and_where_not_it_is_wide() -> None:
    drafter = bound(max_nodes=8, top_k=8)
    drafter.bind(tiny_model())

    def first_level(scale: float) -> int:
        probs = np.tile(torch.softmax(scale * -torch.arange(8.0), 0).numpy(), (1, HEADS, 1)).astype(np.float32)
        lists = HeadLists(np.tile(np.arange(8), (1, HEADS, 1)), probs)
        tree = drafter.grow([5], np.array([100]), lists, 8)
        return int((tree.parents[0] == 0).sum())

    assert first_level(3.0) < first_level(0.05)


def test_each_row_keeps_to_its_own_depth() -> None:
    for settings in ({}, {"dynamic": False}):
        tree = propose(bound(**settings), context(3, max_depth=[0, 2, 100]), 32)
        depths = (tree.depths * tree.is_real).max(1).values.tolist()
        assert depths[0] == 0
        assert depths[1] <= 2
        assert depths[2] == HEADS


def test_without_hidden_states_there_is_nothing_to_propose() -> None:
    tree = propose(bound(), context(2, hidden_states=None), 32)
    assert tree.tokens.shape == (2, 1)


def test_hidden_states_that_are_not_finite_do_no_harm() -> None:
    now = context(2)
    now.hidden_states[1] = torch.nan
    tree = propose(bound(), now, 32)
    tree.validate(97)


def test_bounds_on_the_number_of_nodes() -> None:
    assert propose(bound(max_nodes=8), context(), 64).num_nodes == 8
    assert propose(bound(), context(), 5).num_nodes == 5
    assert propose(bound(), context(), 1).num_nodes == 1
    assert propose(bound(top_k=2), context(), 64).num_nodes == 1 + 2 + 4 + 8


# --- what it learns ---------------------------------------------------------------------------------------------------


def observed(drafter: MedusaDrafter, new: list[list[int]], seed: int = 0) -> DraftContext:
    """Proposes, and tells the drafter which tokens each row got."""
    before = context(len(new), seed=seed)
    session = drafter.start(before)
    tree = session.propose(before, 16)
    sequences = [np.concatenate([s, np.array(t, np.int32)]) for s, t in zip(before.sequences, new, strict=True)]
    after = context(len(new), seed=seed, sequences=sequences)
    new_tokens = [np.array(tokens, np.int32) for tokens in new]
    session.observe(after, Step(after.rows, tree, [len(t) - 1 for t in new], new_tokens=new_tokens))
    return before


def test_ranks_of_the_targets_tokens_are_counted_up_to_the_first_rejected() -> None:
    drafter = bound(dynamic=False, memory=1e9)
    lists = drafter.heads(context(2).hidden_states).topk(10, -1).indices  # [heads, rows, ranks]
    first = [int(lists[0, 0, 2]), int(lists[1, 0, 0])]
    second = [int(lists[0, 1, 1])]
    observed(drafter, [first, second])
    assert drafter._counts.tried[:, 0].tolist() == pytest.approx([2, 1, 0])
    assert drafter._counts.hit[0].nonzero()[0].tolist() == [1, 2]
    assert drafter._counts.hit[1].nonzero()[0].tolist() == [0]
    assert not drafter._counts.hit[2].any()


def test_the_rate_of_a_class_becomes_what_was_counted() -> None:
    random = np.random.default_rng(0)
    tried, hit = np.zeros((1, 16)), np.zeros((1, 16))
    for _ in range(4000):
        probs = np.full((1, 1, 2), 0.25, np.float32)
        token = 7 if random.random() < 0.1 else 9  # the head says a quarter, and is right one time in ten
        count_ranks(np.array([[[7, 8]]]), probs, True, np.array([[token]]), np.array([1]), tried, hit, 1.0)
    place = np.flatnonzero(tried[0])
    assert len(place) <= 2, "a probability lies between two classes"
    assert (hit[0, place].sum() / tried[0, place].sum()) == pytest.approx(0.05, abs=0.01), "token 8 is never right"


def test_old_counts_fade() -> None:
    tried, hit = np.zeros((1, 4)), np.zeros((1, 4))
    listed, probs = np.array([[[7, 8]]]), np.zeros((1, 1, 2), np.float32)
    for _ in range(500):
        count_ranks(listed, probs, False, np.array([[7]]), np.array([1]), tried, hit, 0.9)
    assert tried[0, 0] == pytest.approx(1 / (1 - 0.9), rel=0.01)


def test_scores_follow_what_is_accepted() -> None:
    for dynamic in (True, False):
        drafter = bound(dynamic=dynamic)
        before = propose(drafter, context(), 4).scores[0, 1]
        for _ in range(100):
            observed(drafter, [[96]])  # a token that is in no list
        assert float(propose(drafter, context(), 4).scores[0, 1]) < float(before) / 2
        drafter.bind(tiny_model())  # again, as each call does: what was learned stays
        assert float(propose(drafter, context(), 4).scores[0, 1]) < float(before) / 2


# --- heads and calibration --------------------------------------------------------------------------------------------


def test_a_tuned_tree_is_taken_as_it_is() -> None:
    heads = random_heads(tiny_model(), HEADS)
    tree = [[0], [11], [0, 0], [11, 2], [0, 0, 0]]
    heads.calibration = HeadCalibration([[0.05] * 12] * HEADS, tree)
    drafter = MedusaDrafter(heads, dynamic=False, top_k=10)
    drafter.bind(tiny_model())
    now = context(2, max_depth=[100, 2])
    proposed = propose(drafter, now, 64)
    lists = heads(now.hidden_states).topk(12, -1).indices
    assert proposed.num_nodes == 6
    for row, count in ((0, 5), (1, 4)):
        expected = [tuple(int(lists[head, row, rank]) for head, rank in enumerate(path)) for path in tree[:count]]
        assert paths_of(proposed, row)[1 : count + 1] == expected
    assert proposed.is_real[1].tolist() == [True] * 5 + [False]
    assert propose(drafter, now, 3).num_nodes == 3


def test_a_calibration_of_other_heads_is_refused() -> None:
    heads = random_heads(tiny_model(), HEADS)
    heads.calibration = HeadCalibration([[0.5]])
    with pytest.raises(ValueError, match="tune-tree"):
        MedusaDrafter(heads).bind(tiny_model())


def test_default_accuracies_are_possible() -> None:
    for ranks, after in itertools.pairwise(default_accuracies(5)):
        assert sum(ranks) < 1
        assert ranks == sorted(ranks, reverse=True)
        assert all(later < now for now, later in zip(ranks, after, strict=True))


def test_heads_of_another_size_are_refused_before_any_work() -> None:
    other = new_model("llama", hidden_size=16, num_attention_heads=2)
    with pytest.raises(ValueError, match="hidden size"):
        specdec.accelerate(tiny_model(), MedusaDrafter(MedusaHeads.for_model(other)))


@pytest.mark.parametrize("setting", [{"max_nodes": 0}, {"top_k": 0}, {"memory": 0}, {"prior_weight": 0}])
def test_bad_settings_are_named(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        MedusaDrafter(**setting)


def test_heads_are_found_in_the_models_own_folder(tmp_path: Path) -> None:
    model = new_model("llama")
    with pytest.raises(ValueError, match="train-medusa"):
        specdec.accelerate(model, "medusa")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with pytest.raises(ValueError, match="medusa"):
        specdec.accelerate(loaded, "medusa")
    random_heads(model).save_pretrained(tmp_path / "medusa")
    report = assert_identical(loaded, "medusa", prompts(5), max_new_tokens=12)
    assert report.drafter == "medusa"
    assert report.num_draft_tokens > 0
    shutil.copytree(tmp_path / "medusa", tmp_path / "elsewhere")
    report = assert_identical(model, MedusaDrafter(str(tmp_path / "elsewhere")), prompts(5), max_new_tokens=12)
    assert report.num_draft_tokens > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_of_a_folder_come_in_the_targets_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = new_model("llama")
    random_heads(model).save_pretrained(tmp_path)
    drafter = MedusaDrafter(str(tmp_path))
    drafter.bind(model.to(dtype))
    assert drafter._heads is not None and drafter._heads.dtype == dtype


def test_the_demonstration_shows_medusa_where_the_model_has_heads(tmp_path: Path) -> None:
    def shown(target: Any) -> list[str]:
        return _drafters(Console(quiet=True), target, None)

    model = new_model("llama")
    assert shown(model) == ["lookahead", "auto"]
    model.save_pretrained(tmp_path)
    random_heads(model).save_pretrained(tmp_path / "medusa")
    assert "medusa" in shown(type(model).from_pretrained(tmp_path).eval())


def test_settings_are_ready_for_json() -> None:
    drafter = MedusaDrafter()
    assert drafter.settings()["heads"] is None
    assert bound().settings()["heads"]["num_heads"] == HEADS


# --- in a generation --------------------------------------------------------------------------------------------------


def trained_heads(model: Any, ids: torch.Tensor, num_heads: int = HEADS, layers: int = 2) -> MedusaHeads:
    """Heads that know these texts by heart."""
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state[:, : -1 - num_heads]
    heads = MedusaHeads.for_model(model, num_heads, layers)
    wanted = torch.stack([ids[:, 1 + k : ids.shape[1] - num_heads + k] for k in range(1, num_heads + 1)])
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.01)
    for _ in range(300):
        loss = F.cross_entropy(heads(hidden).flatten(0, -2), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
    return heads


@pytest.mark.parametrize("dynamic", [True, False])
def test_heads_that_know_the_text_are_accepted_whole(dynamic: bool) -> None:
    model, inputs = tiny_model(), prompts(6)
    kwargs = {"max_new_tokens": 60, "eos_token_id": None}
    expected = reference(model, inputs, **kwargs)
    drafter = MedusaDrafter(trained_heads(model, expected.ids), dynamic=dynamic)
    report = assert_identical(model, drafter, inputs, expected=expected, budget=Budget(16, fixed=True), **kwargs)
    assert report.tokens_per_pass > HEADS, "of at most one more"
    assert report.num_target_passes < 60 / HEADS + 2
    per_pos = report.num_accepted_tokens_per_pos
    assert len(per_pos) == HEADS, "head k is depth k"
    assert per_pos[-1] > 0.8 * report.num_drafts


def test_rows_that_end_early_and_batches() -> None:
    model, inputs = tiny_model(), prompts(4, 9, 6)
    kwargs = {"max_new_tokens": 40, "eos_token_id": [2, 10, 20]}
    for seed in range(3):
        expected = reference(model, inputs, seed, do_sample=True, **kwargs)
        drafter = TaughtMedusaDrafter(answers=expected.answers)
        report = assert_identical(model, drafter, inputs, seed=seed, expected=expected, do_sample=True, **kwargs)
        assert report.num_accepted_tokens > 0


def test_prompts_as_embeddings() -> None:
    model, ids = tiny_model(), prompts(7)["input_ids"]
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids).detach()}
    drafter = MedusaDrafter(random_heads(model))
    assert_identical(model, drafter, inputs, max_new_tokens=12)


def test_recorded_answers_cannot_be_replayed() -> None:
    with pytest.raises(ValueError, match="hidden states"):
        replay(MedusaDrafter(), [{"prompt": [1, 2], "answer": [3, 4]}])


def test_the_model_keeps_no_trace() -> None:
    model = tiny_model()
    hooks = len(model.get_output_embeddings()._forward_pre_hooks)
    names = {name for name, _ in model.named_modules()}
    assert_identical(model, MedusaDrafter(random_heads(model)), prompts(5), max_new_tokens=8)
    assert len(model.get_output_embeddings()._forward_pre_hooks) == hooks
    assert {name for name, _ in model.named_modules()} == names
