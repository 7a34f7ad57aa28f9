"""Typical acceptance by its thresholds, on targets small enough to be written down."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

import specdec
from specdec.budget import Budget
from specdec.rows.draws import NoiseQueue
from specdec.rows.sequences import Sequences
from specdec.sampling import Sampler
from specdec.tree import TokenTree
from specdec.verifiers import VERIFIERS, Acceptance, TypicalVerifier
from tests.conformance import DRAFTERS, assert_identical, random_tree, reference
from tests.tiny_models import prompts, tiny_model

EPSILON, DELTA = 0.09, 0.3


def verify(
    tree: TokenTree,
    logits: Tensor,
    processors: Any = (),
    verifier: TypicalVerifier | None = None,
    do_sample: bool = True,
    rows: list[int] | None = None,
    prompt: Tensor | None = None,
) -> Acceptance:
    batch = len(tree.tokens)
    rows = list(range(batch)) if rows is None else rows
    prompt = torch.zeros(max(rows) + 1, 1).long() if prompt is None else prompt
    noise = NoiseQueue(len(prompt), torch.device("cpu")) if do_sample else None
    sampler = Sampler(LogitsProcessorList(processors), do_sample, Sequences(prompt, None, 50), noise)
    return (verifier or TypicalVerifier()).verify(tree, logits, sampler, rows)


def one_level(probs: list[float], token: int) -> int:
    """How many drafts are accepted of a root with one child."""
    tree = TokenTree.from_rows([[0, token]], [[-1, 0]])
    logits = torch.tensor([probs, [1.0] * len(probs)]).log()[None]
    return int(verify(tree, logits).num_accepted)


def test_a_likely_token_is_accepted_and_an_unlikely_one_is_not() -> None:
    # Entropy 0.64 nats: delta * exp(-H) is 0.158, so epsilon decides.
    probs = [0.8, 0.1, 0.08, 0.02]
    assert min(EPSILON, DELTA * math.exp(-sum(-p * math.log(p) for p in probs))) == EPSILON
    assert [one_level(probs, token) for token in range(4)] == [1, 1, 0, 0]


def test_the_less_sure_the_target_is_the_less_is_asked_for() -> None:
    # Sixteen equal tokens: exp(-H) is 1/16, so 0.3 / 16 is asked for, and each has 1/16 < epsilon.
    assert one_level([1 / 16] * 16, 5) == 1
    # One token of 0.03 among fifteen: still above 0.3 * exp(-H); one of 0.01 is below.
    rest = [(1 - 0.03) / 15] * 15
    assert one_level([*rest, 0.03], 15) == 1
    rest = [(1 - 0.01) / 15] * 15
    assert one_level([*rest, 0.01], 15) == 0


@pytest.mark.parametrize("token", range(6))
def test_thresholds_are_those_of_the_definition(token: int) -> None:
    random = torch.Generator().manual_seed(token)
    for _ in range(50):
        probs = torch.distributions.Dirichlet(torch.full((6,), 0.5)).sample()
        probs = torch.softmax(torch.randn(6, generator=random) * 2, 0)
        entropy = float(-(probs * probs.log()).sum())
        wanted = float(probs[token]) > min(EPSILON, DELTA * math.exp(-entropy))
        assert one_level(probs.tolist(), token) == int(wanted)


def test_an_accepted_node_under_a_rejected_one_does_not_count() -> None:
    tree = TokenTree.from_rows([[0, 1, 2, 2]], [[-1, 0, 1, 0]])
    logits = torch.tensor([[0.9, 0.001, 0.099], [0.001, 0.001, 0.998], [0.3, 0.3, 0.4], [0.3, 0.3, 0.4]]).log()[None]
    acceptance = verify(tree, logits)
    assert acceptance.num_accepted.tolist() == [1]
    assert acceptance.nodes[0, :1].tolist() == [3]


def test_the_longest_path_is_taken_and_the_likelier_one_among_equals() -> None:
    # Two paths of length two: 1-3 with 0.5 * 0.3 and 2-4 with 0.3 * 0.6; 5 is likelier than 2 but shorter.
    tree = TokenTree.from_rows([[0, 0, 1, 1, 2, 2]], [[-1, 0, 0, 1, 2, 0]])
    probs = [[0.4, 0.25, 0.35], [0.1, 0.3, 0.6], [0.2, 0.2, 0.6], *[[0.2, 0.3, 0.5]] * 3]
    acceptance = verify(tree, torch.tensor(probs).log()[None])
    assert acceptance.nodes[0, :2].tolist() == [2, 4], "0.25 * 0.6 is more than 0.4 * 0.3"
    assert acceptance.tokens[0, :2].tolist() == [1, 2]
    shorter = tree.first(5)
    assert verify(shorter.first(4), torch.tensor(probs[:4]).log()[None]).nodes[0, :2].tolist() == [1, 3]


def test_the_next_token_is_the_samplers_pick_at_the_last_accepted_node() -> None:
    tree = TokenTree.from_rows([[0, 1]], [[-1, 0]])
    logits = torch.tensor([[0.5, 0.5, 1e-9], [1e-9, 1e-9, 1.0]]).log()[None]
    for seed in range(5):
        torch.manual_seed(seed)
        assert verify(tree, logits).tokens[0, :2].tolist() == [1, 2]


def test_padding_is_never_accepted() -> None:
    for seed in range(20):
        tree = random_tree(seed, padding=0.5)
        acceptance = verify(tree, torch.zeros(*tree.tokens.shape, 50))  # every token is typical
        for row, count in enumerate(acceptance.num_accepted.tolist()):
            nodes = acceptance.nodes[row, :count].tolist()
            assert tree.parents[row, nodes].tolist() == [0, *nodes][:count]
            real = tree.depths[row][tree.is_real[row]]
            assert count == int(real.max())


@pytest.mark.parametrize("processors", [[], [TopKLogitsWarper(3)], [NoRepeatNGramLogitsProcessor(2)]])
def test_without_sampling_only_the_targets_own_picks_are_accepted(processors: Any) -> None:
    tree = TokenTree.from_rows([[0, 0, 1]], [[-1, 0, 0]])
    logits = torch.tensor([[0.4, 0.6, 0.0], [0.3, 0.3, 0.4], [0.2, 0.2, 0.6]]).log()[None]
    acceptance = verify(tree, logits, processors, do_sample=False)
    assert acceptance.nodes[0, :1].tolist() == [2]
    assert acceptance.tokens[0, :2].tolist() == [1, 2]


def test_processors_see_each_nodes_own_prefix() -> None:
    """After the bigram (1, 2), a second 2 behind a 1 is impossible, on the branch where it stands only."""
    prompt = torch.tensor([[1, 2, 0]])
    tree = TokenTree.from_rows([[0, 1, 2, 2, 2]], [[-1, 0, 0, 1, 2]])  # 0 > 1 > 2 and 0 > 2 > 2
    logits = torch.zeros(1, 5, 3)
    without = verify(tree, logits, prompt=prompt)
    assert without.nodes[0, :2].tolist() == [1, 3], "equally likely: the first"
    acceptance = verify(tree, logits, [NoRepeatNGramLogitsProcessor(2)], prompt=prompt)
    assert acceptance.nodes[0, :2].tolist() == [2, 4]


def test_all_nodes_are_processed_as_plain_decoding_would_process_each() -> None:
    batch, vocab = 3, 50
    prompt = torch.randint(0, vocab, (5, 7), generator=torch.Generator().manual_seed(0))
    processors = [
        RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=None),
        NoRepeatNGramLogitsProcessor(2),
        TemperatureLogitsWarper(0.6),
    ]
    rows = [0, 2, 4]
    for seed in range(5):
        tree = random_tree(seed, batch)
        logits = torch.randn(batch, tree.num_nodes, vocab, generator=torch.Generator().manual_seed(seed))
        sampler = Sampler(
            LogitsProcessorList(processors), True, Sequences(prompt, None, 50), NoiseQueue(5, torch.device("cpu"))
        )
        scores = sampler.process(tree, logits, rows)
        for i, row in enumerate(rows):
            for node in tree.is_real[i].nonzero()[:, 0].tolist():
                path = [n for n in tree.ancestor_mask[i, node].nonzero()[:, 0].tolist() if n]
                ids = torch.cat([prompt[row], tree.tokens[i, path]])[None]
                expected = LogitsProcessorList(processors)(ids, logits[i, node][None].clone())[0]
                assert torch.equal(scores[i, node], expected)


def test_rows_are_verified_apart() -> None:
    tree = random_tree(1, batch=4)
    logits = 0.5 * torch.randn(4, tree.num_nodes, 50, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    together = verify(tree, logits)
    assert int(together.num_accepted.max()) > 0
    for row in range(4):
        alone = TokenTree(tree.tokens[row : row + 1], tree.parents[row : row + 1])
        torch.manual_seed(0)
        one = verify(alone, logits[row : row + 1], rows=[row], prompt=torch.zeros(4, 1).long())
        count = int(one.num_accepted)
        assert int(together.num_accepted[row]) == count
        assert together.tokens[row, : count + 1].tolist() == one.tokens[0, : count + 1].tolist()


@pytest.mark.parametrize("setting", [{"epsilon": 0.0}, {"epsilon": 1.5}, {"delta": -1.0}])
def test_bad_thresholds_are_named(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        TypicalVerifier(**setting)


# --- in a generation --------------------------------------------------------------------------------------------------


def test_it_is_reached_by_its_name_only_and_says_that_it_is_approximate() -> None:
    assert [name for name, kind in VERIFIERS.items() if kind is TypicalVerifier] == ["typical"]
    assert specdec.accelerate(tiny_model(), None).verifier.guarantee == "token-identical"
    fast = specdec.accelerate(tiny_model(), "lookahead", verifier="typical")
    fast.generate(**prompts(5), max_new_tokens=4, do_sample=True)
    assert (fast.report.verifier, fast.report.guarantee) == ("typical", "approximate")
    assert "approximate" in str(fast.report)


@pytest.mark.parametrize("processor", [{}, {"no_repeat_ngram_size": 2, "top_p": 0.9}, {"repetition_penalty": 1.3}])
def test_more_is_accepted_than_by_the_exact_rule(processor: dict[str, Any]) -> None:
    model, inputs = tiny_model(), prompts(6, 9)
    kwargs = {"max_new_tokens": 32, "do_sample": True, "temperature": 3.0, "eos_token_id": None, "top_k": 8} | processor
    expected = reference(model, inputs, 0, **kwargs)
    accepted = {}
    for verifier in ("exact", TypicalVerifier(epsilon=0.02, delta=0.1)):
        # The drafter knows the answers for one seed and the text is drawn under another.
        drafter = DRAFTERS["random-tree"](expected.answers)
        # Every proposal is verified whole: how many pay is a matter of time, and with it of chance.
        fast = specdec.accelerate(model, drafter, verifier, strict=True, budget=Budget(64, fixed=True))
        torch.manual_seed(1)
        ids = fast.generate(**inputs, **kwargs)
        assert ids.shape == expected.ids.shape
        accepted[fast.verifier.name] = fast.report.acceptance_rate
    assert accepted["typical"] > accepted["exact"]


def test_greedy_output_is_identical() -> None:
    model, inputs = tiny_model(), prompts(6, 9)
    fast = specdec.accelerate(model, "lookahead", "typical", strict=True)
    expected = reference(model, inputs, max_new_tokens=24, do_sample=False)
    assert fast.generate(**inputs, max_new_tokens=24, do_sample=False).tolist() == expected.ids.tolist()
    assert_identical(model, DRAFTERS["lookahead"], inputs, expected=expected, max_new_tokens=24, do_sample=False)
