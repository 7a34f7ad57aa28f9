"""Drafts are paced by confidence, and go on while an offloaded target loads its weights, and only then."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor

import specdec
from specdec.budget import Budget
from specdec.drafters import DraftModelDrafter
from specdec.drafters.base import DraftContext, DraftSession, Step
from specdec.drafters.small_model import pipelined
from specdec.drafters.small_model.growth import DraftNodes
from specdec.drafters.small_model.pipelined import (
    LARGEST_THRESHOLD,
    LEAST_THRESHOLD,
    adjusted,
    choose_branches,
    offload_hooks,
    outcome,
    subtrees_after,
)
from specdec.passes.capability import probe
from specdec.tree import TokenTree
from tests.conformance import assert_identical, draft_of
from tests.drafters.test_draft_model import Checked
from tests.tiny_models import new_model, prompts, tiny_model

EOS = [2, 20, 40]


@pytest.fixture
def every_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny loads count as long ones."""
    monkeypatch.setattr(pipelined, "LEAST_SHARE", 1e-9)


@pytest.fixture(scope="module")
def offloaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return on_disk("llama", tmp_path_factory.mktemp("weights"))


def on_disk(name: str, folder: Path) -> Any:
    return disk_offload(new_model(name), str(folder), execution_device="cpu")


def accelerated(target: Any, draft_model: Any = None, **settings: Any) -> Any:
    drafter = DraftModelDrafter(draft_model or draft_of("llama"), pipelined=True, **settings)
    return specdec.accelerate(target, drafter, strict=True, budget=Budget(64, fixed=True))


def pre_forwards(target: Any) -> list[Any]:
    return [vars(hook).get("pre_forward") for hook in offload_hooks(target)]


# --- offloaded targets ------------------------------------------------------------------------------------------------


def offload(model: Any, how: str, folder: Path) -> Any:
    if how == "disk":
        return disk_offload(model, str(folder), execution_device="cpu")
    if how == "cpu":
        return cpu_offload(model, execution_device="cpu")
    layers = next(name for name, part in model.named_modules() if isinstance(part, torch.nn.ModuleList))
    places: dict[str, str] = {}
    for name, _ in model.named_parameters():
        is_layer = name.startswith(layers)
        place = ".".join(name.split(".")[: layers.count(".") + 2]) if is_layer else name.rpartition(".")[0]
        places[place] = "disk" if is_layer else "cpu"
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize(("how", "name"), [("disk", "llama"), ("cpu", "llama"), ("map", "llama"), ("disk", "gpt2")])
def test_same_tokens_with_an_offloaded_target(how: str, name: str, tmp_path: Path, every_load: None) -> None:
    target = offload(new_model(name), how, tmp_path)
    for drafter in ("lookahead", draft_of(name), DraftModelDrafter(draft_of(name), pipelined=True)):
        fast = specdec.accelerate(target, drafter, strict=True, budget=Budget(64, fixed=True))
        assert fast.capability.mode == "tree"
        for kwargs in ({}, {"do_sample": True}):
            inputs = prompts(12, 5)
            torch.manual_seed(0)
            expected = tiny_model(name).generate(**inputs, max_new_tokens=16, **kwargs)
            torch.manual_seed(0)
            assert torch.equal(fast.generate(**inputs, max_new_tokens=16, **kwargs), expected)
            assert fast.report.fallback is None


@pytest.mark.parametrize("batch", [(12,), (3, 11, 5, 12, 7)])
@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("agrees", [True, False])
def test_same_tokens_with_drafts_ahead(
    batch: tuple[int, ...], coupled: bool, agrees: bool, offloaded: Any, every_load: None
) -> None:
    draft_model = copy.deepcopy(tiny_model()) if agrees else draft_of("llama")
    used = 0
    for do_sample, eos in ((False, EOS), (True, [2])) if coupled else ((True, EOS),):
        fast = accelerated(offloaded, draft_model, coupled=coupled, max_depth=4, top_k=2)
        inputs, kwargs = prompts(*batch), {"max_new_tokens": 16, "do_sample": do_sample, "eos_token_id": eos}
        torch.manual_seed(3)
        expected, state = tiny_model().generate(**inputs, **kwargs), torch.get_rng_state()
        torch.manual_seed(3)
        assert torch.equal(fast.generate(**inputs, **kwargs), expected)
        assert torch.equal(torch.get_rng_state(), state)
        figures = fast.report.drafter_figures
        assert figures["num_levels_ahead"] >= figures["num_drafts_ahead"] > 0
        assert fast.report.num_accepted_tokens > 0
        used += figures["num_drafts_ahead_used"]
    assert used > 0 or len(batch) > 1 or not coupled


def test_what_was_drafted_ahead_saves_levels(offloaded: Any, every_load: None) -> None:
    """The draft model agrees with the target, so that a step needs no more than what was made in the one before."""
    levels: dict[str, list[int]] = {"ahead": [], "not": []}

    class Counting(DraftModelDrafter):
        def start(self, context: DraftContext) -> DraftSession:
            session: Any = super().start(context)
            propose = session.propose

            def counted(*args: Any) -> TokenTree:
                before = session.passes.num_fed if session.nodes is not None else 0
                tree: TokenTree = propose(*args)
                levels["ahead" if session.went_on else "not"].append(session.passes.num_fed - before * session.went_on)
                return tree

            session.propose = counted
            return session  # type: ignore[no-any-return]

    drafter = Counting(copy.deepcopy(tiny_model()), pipelined=True, max_depth=3, top_k=1)
    fast = specdec.accelerate(offloaded, drafter, strict=True, budget=Budget(64, fixed=True))
    fast.generate(**prompts(9), max_new_tokens=48, eos_token_id=None)
    assert fast.report.num_accepted_tokens >= 30
    assert fast.report.drafter_figures["num_drafts_ahead_used"] >= 8
    assert len(levels["not"]) <= 2


class CheckedAhead(Checked):
    """Compares the cache of what was drafted ahead with a fresh encoding, at each step."""

    went_on = 0

    def checked(self, session: Any, propose: Any, _: Any, context: DraftContext, size: int) -> TokenTree:
        tree: TokenTree = propose(context, size)
        self.compare(session, context)
        self.went_on += session.went_on
        return tree


@pytest.mark.parametrize("batch", [(12,), (3, 9)])
def test_cache_is_that_of_a_fresh_encoding(batch: tuple[int, ...], offloaded: Any, every_load: None) -> None:
    drafter = CheckedAhead(copy.deepcopy(tiny_model()), pipelined=True, max_depth=3, top_k=2)
    fast = specdec.accelerate(offloaded, drafter, strict=True, budget=Budget(64, fixed=True))
    fast.generate(**prompts(*batch), max_new_tokens=24, eos_token_id=None)
    assert drafter.went_on > 0


# --- when it drafts ---------------------------------------------------------------------------------------------------


class Recorder(ModelHook):
    """Notes when a module computes: behind the hook that loads its weights."""

    def __init__(self, intervals: list[tuple[float, float]]) -> None:
        self.intervals = intervals

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.begun = time.perf_counter()
        return args, kwargs

    def post_forward(self, module: Any, output: Any) -> Any:
        self.intervals.append((self.begun, time.perf_counter()))
        return output


def test_nothing_is_drafted_while_the_target_computes(tmp_path: Path, every_load: None) -> None:
    target, draft_model = on_disk("llama", tmp_path), copy.deepcopy(draft_of("llama"))
    computing: list[tuple[float, float]] = []
    drafting: list[tuple[float, float]] = []
    for module in target.modules():
        if hasattr(module, "_hf_hook"):
            add_hook_to_module(module, Recorder(computing), append=True)
    # Of the modules that hold weights themselves: the others' time is that of their parts' loads too.
    leaves = {id(m._hf_hook.hooks[-1]) for m in target.modules() if hasattr(m, "_hf_hook") and not [*m.children()]}
    for module in target.modules():
        hook = getattr(module, "_hf_hook", None)
        if hook is not None and id(hook.hooks[-1]) not in leaves:
            hook.hooks[-1].intervals = []
    draft_model.register_forward_pre_hook(lambda *args: drafting.append((time.perf_counter(), 0.0)))
    draft_model.register_forward_hook(lambda *args: drafting.append((drafting.pop()[0], time.perf_counter())))
    fast = accelerated(target, draft_model)
    fast.generate(**prompts(9), max_new_tokens=12)
    assert fast.report.drafter_figures["num_levels_ahead"] > 10
    assert len(computing) > 50
    for begin, end in drafting:
        assert not any(begin < b and a < end for a, b in computing)


def test_a_load_goes_on_while_something_is_drafted(tmp_path: Path) -> None:
    target = on_disk("llama", tmp_path)
    for hook in offload_hooks(target):
        slow_down(hook)
    fast = accelerated(target)
    fast.generate(**prompts(9), max_new_tokens=4)
    figures = fast.report.drafter_figures
    assert figures["num_levels_ahead"] > 0
    assert 0 < figures["overlapped_seconds"] <= 1.1 * figures["load_seconds"]


def slow_down(hook: Any) -> None:
    """Makes a hook's weights come from something slow."""
    weights = hook.weights_map

    class Slow(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            time.sleep(0.004)
            return weights[name]  # type: ignore[no-any-return]

    hook.weights_map = Slow()


# --- hooks ------------------------------------------------------------------------------------------------------------


def test_hooks_are_put_back(offloaded: Any, every_load: None) -> None:
    seen: list[bool] = []
    handle = offloaded.register_forward_hook(lambda *args: seen.append(all(pre_forwards(offloaded))))
    accelerated(offloaded).generate(**prompts(9), max_new_tokens=12)
    handle.remove()
    assert any(seen), "replaced while the target runs"
    assert not seen[0], "not for the prompt"
    assert not any(pre_forwards(offloaded))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["target", "draft"])
def test_hooks_are_put_back_after(error: type[BaseException], where: str, offloaded: Any, every_load: None) -> None:
    draft_model = copy.deepcopy(draft_of("llama"))
    fast = accelerated(offloaded, draft_model)
    module, at = (offloaded, 3) if where == "target" else (draft_model, 30)
    with raised_in(module, error, at, offloaded), pytest.raises(error, match="for a test"):
        fast.generate(**prompts(9), max_new_tokens=24)
    assert not any(pre_forwards(offloaded))
    expected = tiny_model().generate(**prompts(9), max_new_tokens=24)
    assert torch.equal(fast.generate(**prompts(9), max_new_tokens=24), expected)
    assert torch.equal(offloaded.generate(**prompts(9), max_new_tokens=24), expected)


@contextmanager
def raised_in(module: Any, error: type[BaseException], at: int, target: Any) -> Iterator[None]:
    """Raises at some forward of the target's, or of the draft model's while the target runs."""
    num_calls, is_armed = 0, False

    def fail(*args: Any) -> None:
        nonlocal num_calls
        num_calls += is_armed
        if num_calls >= at and (module is target or any(pre_forwards(target))):
            raise error("for a test")

    handle = (module.lm_head if module is target else module).register_forward_pre_hook(fail)
    try:
        probe(module)  # which is done anew where hooks have changed
        is_armed = True
        yield
    finally:
        handle.remove()


def test_an_error_in_drafting_ahead_costs_no_token(offloaded: Any, every_load: None) -> None:
    draft_model = copy.deepcopy(draft_of("llama"))
    fast = specdec.accelerate(offloaded, DraftModelDrafter(draft_model, pipelined=True), budget=Budget(64, fixed=True))
    expected = tiny_model().generate(**prompts(9), max_new_tokens=24)
    with raised_in(draft_model, RuntimeError, 1, offloaded), pytest.warns(RuntimeWarning, match="for a test"):
        assert torch.equal(fast.generate(**prompts(9), max_new_tokens=24), expected)
    assert not any(pre_forwards(offloaded))


# --- settings ---------------------------------------------------------------------------------------------------------


def test_a_target_in_memory_brings_a_warning_and_the_same_tokens() -> None:
    drafter = DraftModelDrafter(draft_of("llama"), pipelined=True)
    with pytest.warns(UserWarning, match="offloaded none of its weights"):
        specdec.accelerate(tiny_model(), drafter)
    report = assert_identical(tiny_model(), drafter, prompts(9), max_new_tokens=16)
    assert report.drafter_figures["num_levels_ahead"] == 0


def test_settings_that_cannot_be(offloaded: Any) -> None:
    with pytest.raises(ValueError, match="pipelined=True goes with growth='paced'"):
        DraftModelDrafter(draft_of("llama"), growth="chain", pipelined=True)
    with pytest.raises(ValueError, match="shares modules with the target"):
        specdec.accelerate(offloaded, DraftModelDrafter("self", layers=1, pipelined=True))
    assert DraftModelDrafter(draft_of("llama"), pipelined=True).growth == "paced"


@pytest.mark.parametrize("batch", [(12,), (3, 11, 5)])
def test_paced_growth_by_itself(batch: tuple[int, ...]) -> None:
    for kwargs in ({}, {"do_sample": True}):
        for eos in ([2], EOS):
            drafter = DraftModelDrafter(draft_of("llama"), growth="paced")
            report = assert_identical(
                tiny_model(), drafter, prompts(*batch), max_new_tokens=24, eos_token_id=eos, **kwargs
            )
            assert report.num_accepted_tokens > 0


# --- weights ----------------------------------------------------------------------------------------------------------


def test_same_tokens_with_weights_mapped_from_a_checkpoint(tmp_path: Path, every_load: None) -> None:
    """What `from_pretrained` leaves on the disk are safetensors files, which are mapped and not read."""
    tiny_model().save_pretrained(tmp_path / "model")
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    target = tf.LlamaForCausalLM.from_pretrained(
        tmp_path / "model", device_map={**places, "model.layers": "disk"}, offload_folder=str(tmp_path / "offload")
    )
    fast = accelerated(target)
    expected = tiny_model().generate(**prompts(9), max_new_tokens=16)
    assert torch.equal(fast.generate(**prompts(9), max_new_tokens=16), expected)
    assert fast.report.drafter_figures["num_levels_ahead"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_weights_of_any_type_are_read(dtype: torch.dtype) -> None:
    shapes = [(), (0,), (3,), (70, 90)]
    pipelined.read_pages(torch.nn.Parameter(torch.zeros(shape).to(dtype), requires_grad=False) for shape in shapes)


# --- pacing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "drafted", "accepted", "after"),
    [
        (0.01, 8, 8, 0.005),
        (0.01, 0, 0, 0.01),
        (0.01, 1, 0, 0.02),
        (0.01, 3, 1, 0.01 * 2 ** (2 / 3)),
        (0.01, 9, 4, 0.01 * 2 ** (5 / 9)),
        (LEAST_THRESHOLD, 8, 8, LEAST_THRESHOLD),
        (0.09, 8, 0, LARGEST_THRESHOLD),
    ],
)
def test_threshold_adjusts_itself(before: float, drafted: int, accepted: int, after: float) -> None:
    assert adjusted(before, drafted, accepted) == pytest.approx(after)


def test_threshold_starts_as_in_the_paper() -> None:
    assert pipelined.FIRST_THRESHOLD == 0.01


@pytest.mark.parametrize(("accepted", "expected"), [(3, (3, 3)), (2, (3, 2)), (0, (3, 0)), (4, (4, 4))])
def test_outcome_of_a_tree(accepted: int, expected: tuple[int, int]) -> None:
    """The likeliest path is 1, 2, 3; another one 4, 5, 6, 7; the last node is padding."""
    tree = TokenTree(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 9]]), torch.tensor([[-1, 0, 1, 2, 0, 4, 5, 6, -1]]))
    assert outcome(Step([0], tree, [accepted])) == expected


def drafted(parents: list[int], ranks: list[int], scores: list[float], fed: list[int]) -> DraftNodes:
    """A row of nodes whose tokens are their indices."""
    nodes = DraftNodes.of_roots(np.zeros(1, np.int64), 16)
    count = len(parents)
    for node in range(1, count):
        parent = parents[node]
        nodes.tokens[0, node], nodes.parents[0, node] = node, parent
        nodes.depths[0, node] = nodes.depths[0, parent] + 1
        nodes.paths[0, node] = nodes.paths[0, parent] * scores[node]
    nodes.ranks[0, :count], nodes.scores[0, :count], nodes.fed[0, :count] = ranks, scores, fed
    nodes.counts[0] = count
    return nodes


@pytest.mark.parametrize(
    ("scores", "fed", "least", "width", "expected"),
    [
        # Two branches from the root, none with a token yet: their due is 0.6 / 0.95 and 0.35 / 0.95 of the next one.
        ([1, 0.6, 0.35, 0.01], [0, -1, -1, -1], 0.01, 1, [1]),
        # The second one has its turn before the first one's comes again.
        ([1, 0.6, 0.35, 0.01], [0, -1, -1, -1], 0.01, 4, [1, 2]),
        # The first one's turn would come again at once.
        ([1, 0.95, 0.3, 0.01], [0, -1, -1, -1], 0.01, 4, [1]),
        # What is unlikely opens no branch, unless it is the best token.
        ([1, 0.6, 0.29, 0.01], [0, -1, -1, -1], 0.01, 4, [1]),
        ([1, 0.2, 0.19, 0.01], [0, -1, -1, -1], 0.01, 4, [1]),
        ([1, 0.6, 0.35, 0.01], [0, -1, -1, -1], 0.5, 4, [1]),
        ([1, 0.6, 0.35, 0.01], [0, -1, -1, -1], 0.7, 4, []),
    ],
)
def test_the_branch_that_lacks_most_is_served(
    scores: list[float], fed: list[int], least: float, width: int, expected: list[int]
) -> None:
    nodes = drafted([-1, 0, 0, 0], [0, 0, 1, 2], scores, fed)
    level = np.zeros((1, width), np.int64)
    taken = choose_branches(nodes, 0.3, least, np.array([9]), 1, level)
    assert level[0, :taken].tolist() == expected
    assert nodes.fed[0, expected].tolist() == list(range(1, 1 + taken))


def test_tokens_that_a_branch_was_given_count() -> None:
    # The branch of 1 was given one token and goes on at 4, of confidence 0.54; that of 2, of 0.4, was given none.
    nodes = drafted([-1, 0, 0, 0, 1], [0, 0, 1, 2, 0], [1, 0.6, 0.4, 0.01, 0.9], [0, 1, -1, -1, -1])
    level = np.zeros((1, 1), np.int64)
    assert choose_branches(nodes, 0.3, 0.01, np.array([9]), 2, level) == 1
    assert level[0, 0] == 2
    assert choose_branches(nodes, 0.3, 0.01, np.array([1]), 2, level) == 0, "none may be deeper"


def test_what_is_left_after_the_chosen_tokens() -> None:
    #        0 -> 1 -> 3 -> 5 -> 6
    #          -> 2      -> 4 (a sibling of 3)
    nodes = drafted(
        [-1, 0, 0, 1, 1, 3, 5], [0, 0, 1, 0, 1, 0, 0], [1, 0.5, 0.2, 0.5, 0.3, 0.8, 0.9], [0, 2, 1, 3, -1, 5, -1]
    )
    below = subtrees_after(nodes, np.array([[1, 3]]), np.array([2]))
    assert below is not None
    assert below.nodes.counts.tolist() == [3]
    assert below.nodes.tokens[0, :3].tolist() == [3, 5, 6]
    assert below.nodes.parents[0, :3].tolist() == [-1, 0, 1]
    assert below.nodes.depths[0, :3].tolist() == [0, 1, 2]
    assert below.nodes.fed[0, :3].tolist() == [0, 1, -1]
    np.testing.assert_allclose(below.nodes.paths[0, :3], [1, 0.8, 0.72])
    assert (below.places.tolist(), below.parents.tolist()) == ([[3, 5]], [[-1, 0]])
    for known in ([4, 0], [1, 4], [9, 9]):
        assert subtrees_after(nodes, np.array([known]), np.array([2])) is None
