"""The exact rule on a target small enough to be written down."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from specdec.rows.draws import NoiseQueue
from specdec.rows.sequences import Sequences
from specdec.sampling import Sampler
from specdec.tree import TokenTree
from specdec.verifiers import Acceptance, ExactVerifier
from specdec.verifiers.exact import follow_on_host

VOCAB, LENGTH = 3, 6
Prefix = tuple[int, ...]

# The target: a distribution over three tokens behind every prefix of generated tokens.
_random = np.random.default_rng(0)
TARGET: dict[Prefix, list[float]] = {
    prefix: _random.dirichlet([1.0] * VOCAB).tolist()
    for length in range(LENGTH + 4)
    for prefix in itertools.product(range(VOCAB), repeat=length)
}

# With processors that look at the scores alone, and with one that is given the prefix of each node.
PROCESSORS = {
    "none": LogitsProcessorList(),
    "of scores": LogitsProcessorList([TemperatureLogitsWarper(1.0), TopKLogitsWarper(VOCAB)]),
    "of prefixes": LogitsProcessorList([SequenceBiasLogitsProcessor([[[VOCAB - 1, VOCAB - 1], 0.0]])]),
}
WALKS = {name: (name, False) for name in PROCESSORS} | {
    f"{name}, all nodes": (name, True) for name in ("none", "of scores")
}
"""Processors, and whether all nodes are looked at at once, as on a GPU, or those of the target's own path."""

FULL_TREE = TokenTree.from_rows(
    [[0, *range(VOCAB), *list(range(VOCAB)) * VOCAB]],
    [[-1, *[0] * VOCAB, *(1 + node for node in range(VOCAB) for _ in range(VOCAB))]],
)
TREES = {
    "root only": TokenTree.from_rows([[0]], [[-1]]),
    "chain": TokenTree.from_rows([[0, 1, 2, 0]], [[-1, 0, 1, 2]]),
    "two branches": TokenTree.from_rows([[0, 2, 1, 0, 1]], [[-1, 0, 0, 1, 2]]),
    "equal siblings": TokenTree.from_rows([[0, 1, 1, 2, 2]], [[-1, 0, 0, 1, 2]]),
    "padding between": TokenTree.from_rows([[0, 1, 2, 2, 0]], [[-1, 0, -1, 0, 3]]),
    "all of depth two": FULL_TREE,
}


def paths_of(tree: TokenTree) -> dict[int, Prefix]:
    """The tokens from the root's child down to each real node."""
    paths: dict[int, Prefix] = {0: ()}
    for node, parent in enumerate(tree.parents[0].tolist()):
        if node and parent >= 0:
            paths[node] = (*paths[parent], int(tree.tokens[0, node]))
    return paths


def logits_of(tree: TokenTree, prefix: Prefix) -> Tensor:
    """`[1, nodes, vocab]`; what stands at padding must not matter."""
    logits = torch.full((1, tree.num_nodes, VOCAB), 50.0)
    for node, path in paths_of(tree).items():
        logits[0, node] = torch.tensor(TARGET[prefix + path], dtype=torch.float64).log().float()
    return logits


def new_sampler(walk: str, sequences: Sequences, noise: NoiseQueue | None) -> Sampler:
    processors, is_flat = WALKS[walk]
    sampler = Sampler(PROCESSORS[processors], noise is not None, sequences, noise)
    sampler.is_flat = is_flat
    return sampler


def verify(tree: TokenTree, prefix: Prefix, seed: int | None, walk: str = "none") -> Acceptance:
    """One verification behind a prefix; greedy when there is no seed."""
    sequences = Sequences(torch.tensor([[0]]), None, LENGTH + 10)
    sequences.append(0, prefix)
    noise = None
    if seed is not None:
        torch.manual_seed(seed)
        noise = NoiseQueue(1, torch.device("cpu"))
    sampler = new_sampler(walk, sequences, noise)
    return ExactVerifier().verify(tree, logits_of(tree, prefix), sampler, [0])


def generate(tree: TokenTree, seed: int, walk: str) -> tuple[Prefix, Tensor]:
    """The whole loop: the same tree at every step, until `LENGTH` tokens are there."""
    torch.manual_seed(seed)
    sequences = Sequences(torch.tensor([[0]]), None, LENGTH + 10)
    noise = NoiseQueue(1, torch.device("cpu"))
    sampler = new_sampler(walk, sequences, noise)
    while sequences.num_generated(0) < LENGTH:
        prefix = tuple(sequences.generated(0).tolist())
        acceptance = ExactVerifier().verify(tree, logits_of(tree, prefix), sampler, [0])
        count = int(acceptance.num_accepted)
        sequences.append(0, acceptance.tokens[0, : count + 1].tolist()[: LENGTH - len(prefix)])
        noise.forget(sequences.num_generated(0))
    noise.restore(LENGTH)
    return tuple(sequences.generated(0).tolist()), torch.get_rng_state()


def multinomial(seed: int) -> tuple[Prefix, Tensor]:
    torch.manual_seed(seed)
    tokens: Prefix = ()
    while len(tokens) < LENGTH:
        probs = torch.softmax(torch.tensor(TARGET[tokens], dtype=torch.float64).log().float()[None], dim=-1)
        tokens = (*tokens, int(torch.multinomial(probs, 1)))
    return tokens, torch.get_rng_state()


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("name", TREES)
def test_sampled_text_is_that_of_multinomial_sampling(name: str, walk: str) -> None:
    for seed in range(60):
        expected, state = multinomial(seed)
        got, got_state = generate(TREES[name], seed, walk)
        assert got == expected
        assert torch.equal(got_state, state)


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("name", TREES)
def test_greedy_path_is_followed_as_far_as_the_tree_goes(name: str, walk: str) -> None:
    tree = TREES[name]
    known = set(paths_of(tree).values())
    for prefix in itertools.product(range(VOCAB), repeat=3):
        path: Prefix = ()
        while path in known:
            path = (*path, int(np.argmax(TARGET[prefix + path])))
        acceptance = verify(tree, prefix, None, walk)
        count = int(acceptance.num_accepted)
        assert count == len(path) - 1
        assert tuple(acceptance.tokens[0, : count + 1].tolist()) == path
        nodes = acceptance.nodes[0, :count].tolist()
        assert tuple(tree.tokens[0, nodes].tolist()) == path[:-1]
        assert tree.parents[0, nodes].tolist() == [0, *nodes][:count]
        assert (acceptance.nodes[0, count:] == -1).all()


@pytest.mark.parametrize("name", ["chain", "two branches", "all of depth two"])
def test_as_many_drafts_are_accepted_as_the_target_gives_them_probability(name: str) -> None:
    """E[accepted] is the sum of the nodes' path probabilities: no rule can do better."""
    tree, samples = TREES[name], 4000
    paths = [path for path in paths_of(tree).values() if path]
    expected = sum(math.prod(TARGET[path[:i]][path[i]] for i in range(len(path))) for path in paths)
    logits = logits_of(tree, ()).expand(samples, -1, -1)
    batch = TokenTree(tree.tokens.expand(samples, -1), tree.parents.expand(samples, -1))
    torch.manual_seed(0)
    sequences = Sequences(torch.zeros(samples, 1).long(), None, 10)
    sampler = Sampler(LogitsProcessorList(), True, sequences, NoiseQueue(samples, torch.device("cpu")))
    acceptance = ExactVerifier().verify(batch, logits, sampler, range(samples))
    accepted = acceptance.num_accepted.double()
    error = float(accepted.std()) / math.sqrt(samples)
    assert float(accepted.mean()) == pytest.approx(expected, abs=4 * error + 1e-9)

    # And each full continuation comes as often as the target says.
    if name == "all of depth two":
        tokens = acceptance.tokens[:, :2]
        for path in itertools.product(range(VOCAB), repeat=2):
            share = float((tokens == torch.tensor(path)).all(1).double().mean())
            probability = TARGET[()][path[0]] * TARGET[path[:1]][path[1]]
            assert share == pytest.approx(probability, abs=4 * math.sqrt(probability / samples))


def test_rows_are_verified_apart() -> None:
    trees = [TREES["two branches"], TREES["equal siblings"], TREES["padding between"]]
    batch = TokenTree(torch.cat([t.tokens for t in trees]), torch.cat([t.parents for t in trees]))
    prefixes: list[Prefix] = [(0,), (1, 2), (2, 2, 1)]
    sequences = Sequences(torch.zeros(3, 1).long(), None, 20)
    for row, prefix in enumerate(prefixes):
        sequences.append(row, prefix)
    logits = torch.cat([logits_of(tree, prefix) for tree, prefix in zip(trees, prefixes, strict=True)])
    for walk in WALKS:
        together = ExactVerifier().verify(batch, logits, new_sampler(walk, sequences, None), [0, 1, 2])
        for row, (tree, prefix) in enumerate(zip(trees, prefixes, strict=True)):
            alone = verify(tree, prefix, None, walk)
            count = int(alone.num_accepted)
            assert int(together.num_accepted[row]) == count
            assert together.nodes[row, :count].tolist() == alone.nodes[0, :count].tolist()
            assert together.tokens[row, : count + 1].tolist() == alone.tokens[0, : count + 1].tolist()


def test_the_path_is_the_same_on_the_host_and_on_a_device() -> None:
    random = np.random.default_rng(1)
    for nodes in (1, 2, 5, 17):
        tokens = torch.from_numpy(random.integers(0, VOCAB, (40, nodes)))
        picks = torch.from_numpy(random.integers(-1, VOCAB, (40, nodes)))
        parents = torch.tensor([[-1, *(random.integers(-1, node) for node in range(1, nodes))] for _ in range(40)])
        # Equal siblings would be two answers.
        parents[(parents[:, :, None] == parents[:, None]).triu(1).any(1)] = -1
        tree = TokenTree(tokens, parents)
        ours, theirs = follow_on_host(tree, picks), ExactVerifier.follow(tree, picks)
        assert torch.equal(ours.num_accepted, theirs.num_accepted)
        for row, count in enumerate(ours.num_accepted.tolist()):
            assert torch.equal(ours.tokens[row, : count + 1], theirs.tokens[row, : count + 1])
            assert torch.equal(ours.nodes[row, :count], theirs.nodes[row, :count])
            assert (ours.nodes[row, count:] == -1).all()


def test_among_equal_values_the_first_is_picked_and_nothing_beats_what_is_no_number() -> None:
    logits = torch.tensor([0.0, 2.0, 2.0, 1.0])
    sequences = Sequences(torch.tensor([[0]]), None, 10)
    root = TokenTree.root_only(torch.tensor([0]))
    for values in (logits, logits.masked_fill(logits == 1, torch.nan), -0.0 * logits):
        pick = Sampler(LogitsProcessorList(), False, sequences).pick(root, values[None, None], [0])
        assert pick.tolist() == [[int(values.argmax())]]


def test_shapes() -> None:
    acceptance = verify(FULL_TREE, (), 0)
    assert acceptance.nodes.ndim == 2
    assert acceptance.tokens.shape == (1, acceptance.nodes.shape[1] + 1)
    assert acceptance.num_accepted.shape == (1,)
    assert {t.dtype for t in (acceptance.nodes, acceptance.tokens, acceptance.num_accepted)} == {torch.int64}
    root = verify(TREES["root only"], (), 0)
    assert root.tokens.shape == (1, root.nodes.shape[1] + 1)
    assert root.num_accepted.tolist() == [0]
