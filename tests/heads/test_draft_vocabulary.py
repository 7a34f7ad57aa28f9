"""Heads that name a part of the vocabulary only: in memory, in files, in training, as a drafter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn

import specdec
from specdec.budget import Budget
from specdec.drafters import MedusaDrafter
from specdec.heads import MedusaHeads
from specdec.heads.output_embedding import OutputEmbedding
from specdec.training.data import most_frequent
from specdec.training.losses import IGNORED
from specdec.training.recipes import head_losses
from specdec.training.tree_tuning import measure_ranks
from specdec.tree import TokenTree
from tests.conformance import assert_identical
from tests.heads.checkpoint_files import HIDDEN, assert_same, new_heads, numbers, save_raw, wild_vllm
from tests.heads.test_medusa import states
from tests.tiny_models import VOCAB, prompts, tiny_model

KNOWN = [1, 3, 4, 9, 17, 30]


def some_heads(version: str = "2", tokens: list[int] | None = None, **settings: Any) -> MedusaHeads:
    return new_heads(version, draft_tokens=KNOWN if tokens is None else tokens, **settings)


@pytest.mark.parametrize("version", ["1", "2"])
def test_logits_are_those_of_the_known_tokens(version: str) -> None:
    model, hidden = tiny_model("llama"), states(tiny_model("llama"), 2, 3)
    heads = MedusaHeads.for_model(model, 3, version=version, draft_tokens=[30, 4, 4, 1])
    whole = MedusaHeads.for_model(model, 3, version=version)
    assert heads.config.draft_vocab_size == 3 and heads.config.vocab_size == VOCAB
    torch.testing.assert_close(heads(hidden), whole(hidden)[..., [1, 4, 30]])


def test_logits_of_an_output_embedding_that_is_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with quantised weights: all logits are computed, and those that are wanted taken."""
    expected = some_heads()(states(tiny_model("llama"), 4))

    def no_matrix(self: OutputEmbedding) -> Tensor:
        raise ValueError("it is quantised")

    monkeypatch.setattr(OutputEmbedding, "weight", no_matrix)
    torch.testing.assert_close(some_heads()(states(tiny_model("llama"), 4)), expected)


def test_places_and_tokens_are_each_others_inverse() -> None:
    heads, tokens = some_heads(), torch.tensor([[4, 0, 30], [63, IGNORED, 1]])
    places = heads.places(tokens, IGNORED)
    assert places.tolist() == [[2, IGNORED, 5], [IGNORED, IGNORED, 0]]
    assert heads.tokens(torch.arange(len(KNOWN))).tolist() == KNOWN
    assert torch.equal(new_heads().places(tokens, IGNORED), tokens)


@pytest.mark.parametrize("tokens", [[], [-1, 2], [3, VOCAB]])
def test_draft_tokens_out_of_range(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match=r"token_map must hold token ids|draft_vocab_size=0"):
        some_heads(tokens=tokens)


@pytest.mark.parametrize("layout", [None, "1", "vllm"])
@pytest.mark.parametrize("version", ["1", "2"])
def test_round_trip(version: str, layout: Any, tmp_path: Path) -> None:
    heads, hidden = some_heads(version), states(tiny_model("llama"), 5)
    heads.save_pretrained(tmp_path, layout=layout)
    again = MedusaHeads.from_pretrained(tmp_path)
    if layout == "1" and version == "2":
        assert again.projections is not None and again.projections.shape[1] == len(KNOWN)
    else:
        assert_same(heads, again)
    assert torch.equal(again.bind(tiny_model("llama"))(hidden), heads(hidden))


@pytest.mark.parametrize("whole", [False, True])
def test_a_vllm_map_in_any_order(whole: bool, tmp_path: Path) -> None:
    """Projections are of all tokens, or of those that the map lists, in its order: vLLM takes both."""
    tensors, order = wild_vllm(), torch.tensor([30, 1, 17, 9])
    if not whole:
        tensors |= {name: value[order].clone() for name, value in tensors.items() if name.startswith("lm_heads")}
    config = {"model_type": "medusa", "vocab_size": VOCAB, "truncated_vocab_size": len(order)}
    heads = MedusaHeads.from_pretrained(save_raw(tmp_path, tensors | {"token_map": order}, config, "model.safetensors"))
    assert heads.token_map is not None and heads.token_map.tolist() == [1, 9, 17, 30]
    hidden = x = numbers(4, HIDDEN, seed=7)
    for layer in range(2):
        x = x + nn.functional.silu(nn.functional.linear(x, tensors[f"blocks.1.layers.{layer}.weight"]))
    torch.testing.assert_close(heads(hidden)[1], x @ wild_vllm()["lm_heads.1.weight"][[1, 9, 17, 30]].T)


def test_a_vllm_map_of_the_shared_output_embedding(tmp_path: Path) -> None:
    tensors = {name: value for name, value in wild_vllm().items() if not name.startswith("lm_heads")}
    tensors |= {"lm_heads.0.weight": numbers(3, HIDDEN, seed=1), "token_map": torch.tensor([2, 0, 5])}
    config = {"model_type": "medusa", "vocab_size": VOCAB, "original_lm_head": True, "truncated_vocab_size": 3}
    heads = MedusaHeads.from_pretrained(save_raw(tmp_path, tensors, config, "model.safetensors"))
    assert heads.config.version == "2" and heads.token_map is not None and heads.token_map.tolist() == [0, 2, 5]


def test_a_part_of_the_vocabulary_without_a_map(tmp_path: Path) -> None:
    config = {"model_type": "medusa", "vocab_size": 2 * VOCAB, "truncated_vocab_size": VOCAB}
    save_raw(tmp_path, wild_vllm(), config, "model.safetensors")
    with pytest.raises(ValueError, match=rf"projections cover {VOCAB} tokens.* says {2 * VOCAB}.*no token_map"):
        MedusaHeads.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("token_map", "message"),
    [
        (torch.tensor([1, 1, 2]), "each once"),
        (torch.tensor([-1, 1, 2]), "each once"),
        (torch.tensor([1, 2, VOCAB]), rf"below {VOCAB}"),
        (torch.tensor([1.0, 2.0]), "token ids"),
        (torch.tensor([1, 2]), rf"lists 2 tokens, but projections cover {len(KNOWN)}"),
    ],
)
def test_bad_maps(token_map: Tensor, message: str, tmp_path: Path) -> None:
    tensors = wild_vllm()
    tensors |= {n: value[KNOWN].clone() for n, value in tensors.items() if n.startswith("lm_heads")}
    save_raw(tmp_path, tensors | {"token_map": token_map}, {"vocab_size": VOCAB}, "model.safetensors")
    with pytest.raises(ValueError, match=message):
        MedusaHeads.from_pretrained(tmp_path)


class Watched(MedusaDrafter):
    """Keeps what it proposed."""

    def grow(self, *args: Any) -> TokenTree:
        tree = super().grow(*args)
        self.proposed = getattr(self, "proposed", []) + tree.tokens[:, 1:][tree.parents[:, 1:] >= 0].tolist()
        return tree


@pytest.mark.parametrize("sampled", [False, True])
def test_drafts_are_of_known_tokens_and_the_output_is_the_same(sampled: bool) -> None:
    drafter = Watched(some_heads(), max_nodes=16)
    inputs = prompts(3, 8, 5)
    assert_identical(tiny_model(), drafter, inputs, budget=Budget(16, fixed=True), max_new_tokens=20, do_sample=sampled)
    assert set(drafter.proposed) == set(KNOWN)


def test_drafts_hit_what_the_target_says() -> None:
    """Heads that start with the model's own logits draft what it says twice in a row."""
    model, inputs = tiny_model(), prompts(6)
    answer = model.generate(**inputs, max_new_tokens=24, do_sample=False, eos_token_id=None)[0, 6:].tolist()
    heads = MedusaHeads.for_model(model, 1, draft_tokens=sorted(set(answer)))
    whole = MedusaHeads.for_model(model, 1)
    accepted = []
    for each in (heads, whole):
        fast = specdec.accelerate(model, MedusaDrafter(each, max_nodes=8), budget=Budget(8, fixed=True))
        fast.generate(**inputs, max_new_tokens=24, do_sample=False, eos_token_id=None)
        accepted.append(fast.report.num_accepted_tokens)
    assert accepted[0] >= accepted[1] > 0


def test_other_tokens_are_misses_that_nothing_is_learned_of() -> None:
    heads, hidden = some_heads(num_heads=2), states(tiny_model("llama"), 1, 3)
    targets = torch.tensor([[[4, 5, IGNORED]], [[2, IGNORED, 30]]])
    only_known = torch.tensor([[[4, IGNORED, IGNORED]], [[IGNORED, IGNORED, 30]]])
    sums = head_losses(heads, hidden, targets, torch.ones(2), None)
    expected = head_losses(heads, hidden, only_known, torch.ones(2), None)
    assert sums.loss > 0 and torch.equal(sums.loss, expected.loss)
    assert sums.ranks.sum() <= 2


def test_ranks_are_counted_among_the_known_tokens() -> None:
    model, heads = tiny_model("llama"), some_heads()
    example = {"input_ids": list(range(20)), "supervised": [0] * 4 + [1] * 16}
    ranks = measure_ranks(model, heads, [example], num_ranks=len(KNOWN))
    first = 4  # the first answered token; head k at position t is to say token t + 1 + k
    for row, found in enumerate(ranks):
        for head, rank in enumerate(found):
            assert (rank >= 0) == (first + row + 1 + head in KNOWN)


def test_the_most_frequent_tokens_of_the_data() -> None:
    ids, supervised = np.array([[5, 5, 7, 2], [5, 2, 9, 9]]), np.array([[1, 1, 1, 0], [0, 1, 0, 1]])
    windows = Dataset.from_dict({"input_ids": ids, "supervised": supervised}).with_format("numpy")
    assert most_frequent(windows, 2) == [2, 5]
    assert most_frequent(windows, 100) == [2, 5, 7, 9]
