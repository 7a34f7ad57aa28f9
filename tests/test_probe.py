"""The probe judges by structure and by the model's own rounding noise: right trees pass, planted faults do not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from specdec.kv_cache import TreeCache
from specdec.passes import capability, capability_store
from specdec.passes import probe as probing
from specdec.passes.capability import probe
from specdec.passes.chain_target import ChainTarget
from specdec.passes.masks import MaskFormat
from specdec.passes.tolerance import allowed, differ, distance, noise_of, typical_noise
from specdec.target import TreeTarget
from specdec.tree import TokenTree
from tests.tiny_models import new_model


def deep_model(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """Thirty layers of random weights, whose rounding adds up as that of a trained model does."""
    values = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 30}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.12}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tf.LlamaForCausalLM(tf.LlamaConfig(**{**values, **heads, **changes})).eval().to(dtype)


# --- faults -----------------------------------------------------------------------------------------------------------


def shift_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    run = TreeTarget.run_pass
    monkeypatch.setattr(TreeTarget, "run_pass", lambda self, tokens, mask, at: run(self, tokens, mask, at + 1))


def positions_by_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    run = TreeTarget.run_pass

    def by_slot(self: Any, tokens: Tensor, mask: Any, positions: Tensor) -> Tensor:
        return run(self, tokens, mask, positions[:, :1] + torch.arange(tokens.shape[1]))

    monkeypatch.setattr(TreeTarget, "run_pass", by_slot)


def wrong_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = TreeTarget.forward

    def mistaken(self: Any, tree: TokenTree) -> Tensor:
        parents = tree.parents.clone()
        if parents.shape[1] > 3:
            parents[:, 3] = 1  # has the same depth as the right one
        return forward(self, TokenTree(tree.tokens, parents))

    monkeypatch.setattr(TreeTarget, "forward", mistaken)


def causal_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    build = MaskFormat.build

    def causal(self: Any, tree: TokenTree, *args: Any) -> Any:
        chain = torch.arange(-1, tree.num_nodes - 1).expand_as(tree.parents)
        return build(self, TokenTree(tree.tokens, chain), *args)

    monkeypatch.setattr(MaskFormat, "build", causal)


def hide_one_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    build = MaskFormat.build

    def hidden(self: Any, *args: Any) -> Any:
        mask = build(self, *args).clone()
        mask[..., 5] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return mask

    monkeypatch.setattr(MaskFormat, "build", hidden)


def keep_a_rejected_node(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = TreeCache.commit

    def careless(self: Any, paths: Sequence[Sequence[int]]) -> None:
        commit(self, [[0, 1] if list(path) == [0] else path for path in paths])

    monkeypatch.setattr(TreeCache, "commit", careless)


FAULTS = [shift_positions, positions_by_slot, wrong_parent, causal_mask, hide_one_slot, keep_a_rejected_node]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_deep_model_takes_trees(dtype: torch.dtype, attention: str) -> None:
    model = deep_model(dtype)
    model.set_attn_implementation(attention)
    found = probe(model)
    assert found.mode == "tree", found.reason
    assert found.rounding is not None and (found.rounding > 0 or dtype == torch.float32)
    assert noise_of(model, dtype) >= typical_noise(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_faults_are_caught(fault: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    found = probe(deep_model(dtype))
    assert found.mode != "tree"
    assert "differ" in found.reason or "depend" in found.reason


def test_windows_and_a_large_vocabulary_in_half_precision() -> None:
    config = tf.Gemma3TextConfig(
        vocab_size=20_000, hidden_size=64, intermediate_size=128, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, sliding_window=16, initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tf.Gemma3ForCausalLM(config).eval().to(torch.bfloat16)
    assert probe(model).mode == "tree", probe(model).reason


def keep_a_rejected_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a chain: one token too many stays in the cache, though positions and mask are right."""
    commit = ChainTarget._commit

    def careless(self: Any, *args: Any) -> None:
        self.nodes -= 1
        commit(self, *args)

    def forward(self: Any, tree: TokenTree) -> Tensor:
        if (past := self._cache().get_seq_length()) > (seen := self.mask.shape[1]):
            self.mask = torch.nn.functional.pad(self.mask, (0, past - seen), value=1)
        return right(self, tree)

    right = ChainTarget.forward
    monkeypatch.setattr(ChainTarget, "_commit", careless)
    monkeypatch.setattr(ChainTarget, "forward", forward)


def look_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a chain: every token sees those behind it, too."""
    forward = ChainTarget.forward

    def seeing(self: Any, tree: TokenTree) -> Tensor:
        right, nodes = self.mask, tree.num_nodes
        self.mask = None
        seen = torch.nn.functional.pad(right, (0, nodes), value=1).bool()[:, None, None].expand(-1, 1, nodes, -1)
        self.extra["attention_mask"] = seen
        try:
            return forward(self, tree)
        finally:
            self.mask = right
            del self.extra["attention_mask"]

    monkeypatch.setattr(ChainTarget, "forward", seeing)


def no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("fault", "mode"), [(no_change, "chain"), (keep_a_rejected_token, "plain"), (look_ahead, "plain")]
)
def test_faults_of_chains_are_caught(
    fault: Any, mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capability, "_mask_formats", lambda model: ([], "it takes none"))
    fault(monkeypatch)
    found = probe(deep_model(dtype))
    assert found.mode == mode, found.reason
    assert mode == "chain" or "differ" in found.reason or "depend" in found.reason


# --- passes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_takes_at_most_ten_passes(dtype: torch.dtype) -> None:
    model, passes = deep_model(dtype), []
    model.register_forward_pre_hook(lambda *args: passes.append(1))
    assert probe(model).mode == "tree"
    assert 0 < len(passes) <= 10


def test_random_numbers_are_left_alone_in_training_mode() -> None:
    model = new_model("gpt2").train()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    probe(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    ],
)
def test_a_lack_of_memory_is_not_remembered(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model("llama")

    def starved(*args: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(probing.Trial, "run_reference", starved)
        assert probe(model).mode == "plain"
        assert "tried again" in probe(model).reason
    assert probe(model).mode == "tree"


def test_a_doubt_is_settled_by_a_second_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    compare = capability._compare

    def watched(trial: Any, names: Any) -> Any:
        seeds.append(trial.seed)
        found, _ = compare(trial, names)
        return found, len(seeds) == 1

    monkeypatch.setattr(capability, "_compare", watched)
    assert probe(new_model("llama")).mode == "tree"
    assert seeds == [0, 1]


@pytest.mark.parametrize(
    ("multiple", "is_off", "is_doubtful"),
    [(0.5, False, False), (0.9, False, True), (1.5, True, True), (3, True, False)],
)
def test_differences_close_to_what_is_allowed_leave_a_doubt(
    multiple: float, is_off: bool, is_doubtful: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing.Trial, "noise", 0.1)
    ids, _ = probing.prompts_of(512, seed=0)
    trial = probing.Trial(deep_model(), ids, tf.GenerationConfig(), {})
    right = torch.randn(2, 3, 100, generator=torch.Generator().manual_seed(0))
    wrong = right.clone()
    wrong[0, 1] += multiple * allowed(torch.bfloat16, 0.1) * float(right.std())
    assert trial.is_off(wrong, right) == is_off
    assert trial.is_doubtful == is_doubtful


# --- the rule ---------------------------------------------------------------------------------------------------------


def test_what_counts_as_rounding() -> None:
    torch.manual_seed(0)
    right = torch.randn(3, 4, 100)
    assert distance(right, right) == 0.0
    assert not differ(right + 1e-6 * torch.randn_like(right), right)
    wrong = right.clone()
    wrong[1, 2] += 0.2  # one position of many
    assert differ(wrong, right)
    assert 0.15 < distance(wrong, right) < 0.25
    assert differ(wrong, right, torch.bfloat16) and not differ(wrong, right, torch.bfloat16, noise=0.1)
    noisy = right + 0.02 * torch.randn_like(right)
    assert differ(noisy, right) and not differ(noisy, right, torch.bfloat16)
    for value in (float("nan"), float("inf")):
        broken = right.clone()
        broken[0, 0, 0] = value
        assert differ(broken, right, torch.bfloat16, noise=1.0)
    masked = right.clone()
    masked[..., 3] = -torch.inf
    assert not differ(masked, masked.clone())
    assert differ(torch.tensor([1, 2]), torch.tensor([1, 3]))
    assert allowed(torch.float32, 0.0) < allowed(torch.float16) < allowed(torch.bfloat16)


# --- kept on disk -----------------------------------------------------------------------------------------------------


def forget() -> None:
    capability._KNOWN.clear()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.setattr(capability_store, "LEAST_PARAMETERS", 0)
    return tmp_path / "capability"


def test_the_answer_is_kept_for_other_processes(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep_model()
    found, noise = probe(model), noise_of(model, torch.bfloat16)
    assert len(list(store.iterdir())) == 1
    forget()
    monkeypatch.setattr(capability, "_probe", lambda *args: pytest.fail("was probed again"))
    again = deep_model()
    assert probe(again) == found
    assert noise_of(again, torch.bfloat16) == noise > 0


def test_another_model_dtype_or_attention_has_an_answer_of_its_own(store: Path) -> None:
    probe(deep_model())
    probe(deep_model(torch.float32))
    probe(deep_model(num_hidden_layers=2))
    eager = deep_model()
    eager.set_attn_implementation("eager")
    probe(eager)
    assert len(list(store.iterdir())) == 4


def test_a_broken_file_counts_as_none(store: Path) -> None:
    found = probe(deep_model())
    file = next(store.iterdir())
    right = json.loads(file.read_text())
    changes = [{"mode": "forest"}, {"mode": "plain"}, {"noise": 1e9}, {"attention": "flex"}, {"mask_format": None}]
    for text in ("", "[]", "{}", json.dumps({"noise": 1}), *(json.dumps(right | change) for change in changes)):
        file.write_text(text)
        forget()
        assert probe(deep_model()) == found


def test_what_is_demanded_is_not_kept(store: Path) -> None:
    model = deep_model()
    assert probe(model, "tree").rounding is None
    assert not store.exists()
    assert noise_of(model, torch.bfloat16) == typical_noise(torch.bfloat16)  # until it is probed
    assert noise_of(model, torch.float32) == 0.0


def test_models_that_their_config_does_not_tell_are_not_kept(store: Path) -> None:
    class Own(tf.LlamaForCausalLM):
        pass

    config = deep_model().config
    probe(Own(config).eval())
    hooked = deep_model()
    hooked.model.layers[0].register_forward_hook(lambda *args: None)
    probe(hooked)
    assert not store.exists()
    capability_store.LEAST_PARAMETERS = 10**9  # restored by the fixture
    probe(deep_model())
    assert not store.exists()


def test_a_folder_that_cannot_be_written_is_no_error(store: Path) -> None:
    store.parent.joinpath("capability").write_text("a file, not a folder")
    assert probe(deep_model()).mode == "tree"
