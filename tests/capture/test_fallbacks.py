"""Where a step cannot be captured, the call goes on without, and says why."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor

import specdec
from specdec.kv_cache import TreeCache
from specdec.passes.cuda_graphs import graphs
from specdec.passes.cuda_graphs import store as stores
from specdec.passes.cuda_graphs.fingerprint import fingerprint, hooked, quiet
from specdec.passes.cuda_graphs.store import StaticStore, acquire, obstacle, release, store_of
from specdec.target import TreeTarget
from tests.capture.recorders import Replays, recorded_by
from tests.conformance import DRAFTERS, assert_identical
from tests.tiny_models import new_model, prompts, tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("drafter", ["off", "random-tree", "medusa-taught"])
@pytest.mark.parametrize(
    ("recorder", "reason"),
    [
        (Replays(error_at=0), "RuntimeError: operation not permitted when stream is capturing"),
        (Replays(error_at=2), "RuntimeError: operation not permitted when stream is capturing"),
        (Replays(wrong_at=0), "another result than the step itself"),
        (Replays(wrong_at=1), "another result than the step itself"),
    ],
    ids=["error-at-once", "error-later", "wrong-at-once", "wrong-later"],
)
def test_a_graph_that_fails_costs_no_token(drafter: str, recorder: Replays, reason: str) -> None:
    model, recorder = new_model("llama"), Replays(recorder.error_at, recorder.wrong_at)
    with recorded_by(recorder) as found:
        for inputs in (prompts(12), prompts(3, 12, 7), prompts(9)):
            for do_sample in (False, True):
                report = assert_identical(
                    model, DRAFTERS[drafter], inputs, max_new_tokens=20, do_sample=do_sample, cuda_graphs="eager"
                )
        assert reason in str(found[model].graphs.failure)
        assert len(found[model].graphs) == 0
    assert "none, because" in str(report.cuda_graphs)
    assert recorder.num_recorded <= 3, "for good"


def test_a_value_of_the_host_in_a_graph_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    run_pass = TreeTarget.run_pass

    def from_the_host(self: TreeTarget, tokens: Tensor, mask: Any, positions: Tensor) -> Any:
        return run_pass(self, tokens, mask, torch.tensor(positions.tolist()))

    monkeypatch.setattr(TreeTarget, "run_pass", from_the_host)
    model, recorder = new_model("llama"), Replays(is_strict=False)
    with recorded_by(recorder) as found:
        assert_identical(model, None, prompts(12), max_new_tokens=20, eos_token_id=None, cuda_graphs="eager")
        assert "another result" in str(found[model].graphs.failure)
    assert recorder.num_replayed == 2, "right on the inputs of the recording, wrong on the next ones"


def test_a_model_that_minds_the_static_layout_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    write = TreeCache.write

    def scaled(self: TreeCache, *args: Any) -> Any:
        keys, values = write(self, *args)
        return keys, values if self.static is None else 2 * values

    monkeypatch.setattr(TreeCache, "write", scaled)
    with recorded_by(Replays()) as found:
        for drafter in ("off", "random-tree"):
            assert_identical(tiny_model(), DRAFTERS[drafter], prompts(3, 9), max_new_tokens=16, cuda_graphs="eager")
        assert "gives other logits" in str(found[tiny_model()].graphs.failure)


def test_an_error_over_the_static_layout_is_no_error_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    write = TreeCache.write

    def refused(self: TreeCache, *args: Any) -> Any:
        if self.static is not None:
            raise NotImplementedError("not over a static layout")
        return write(self, *args)

    monkeypatch.setattr(TreeCache, "write", refused)
    with recorded_by(Replays()) as found:
        assert_identical(tiny_model(), DRAFTERS["random-tree"], prompts(3, 9), max_new_tokens=16, cuda_graphs="eager")
        assert "not over a static layout" in str(found[tiny_model()].graphs.failure)


def test_two_calls_at_once() -> None:
    model = new_model("llama")
    store = store_of(model, "eager", CPU)
    assert store.acquire(model)
    report = assert_identical(model, None, prompts(5), max_new_tokens=4, cuda_graphs="eager")
    assert report.cuda_graphs == "none, because another call of this model is using them"
    store.end()
    results = []

    def run() -> None:
        fast = specdec.accelerate(model, None, cuda_graphs="eager")
        results.append(fast.generate(**prompts(5), max_new_tokens=24, do_sample=False).tolist())

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [model.generate(**prompts(5), max_new_tokens=24, do_sample=False).tolist()] * 3


def test_the_store_is_given_back_after_an_error() -> None:
    model = new_model("llama")
    fast = specdec.accelerate(model, DRAFTERS["random-tree"]([]), cuda_graphs="eager")

    def stop(*args: Any, **kwargs: Any) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fast.generate(**prompts(5), max_new_tokens=8, stopping_criteria=[stop])
    assert_identical(model, None, prompts(5), max_new_tokens=4, cuda_graphs="eager")


def test_what_keeps_a_model_from_being_captured() -> None:
    model = new_model("llama")
    assert obstacle(model, "auto", CPU) == "the model is on cpu"
    assert obstacle(model, False, CPU) == "switched off by the caller"
    assert obstacle(model, "eager", CPU) is None
    handle = model.model.layers[0].register_forward_hook(lambda *args: None)
    assert "LlamaDecoderLayer" in str(obstacle(model, "eager", CPU))
    handle.remove()
    model.model.register_forward_hook(quiet(lambda *args: None))
    assert hooked(model) is None
    model.train()
    assert obstacle(model, "eager", CPU) == "the model is in training mode"
    with pytest.raises(ValueError, match="cuda_graphs=True cannot be had: the model is on cpu"):
        acquire(model, True, CPU)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="cuda_graphs='yes' is not known; use one of 'auto', True, False, 'eager'"):
        specdec.accelerate(tiny_model(), None, cuda_graphs="yes")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            specdec.speculate(None, cuda_graphs=True)


def test_capability_tells_of_graphs() -> None:
    model = new_model("llama")
    assert specdec.accelerate(model, None).capability.cuda_graphs == ""
    assert "switched off" in str(specdec.accelerate(model, None, cuda_graphs=False).capability)
    with recorded_by(Replays(error_at=0)):
        fast = specdec.accelerate(model, None, cuda_graphs="eager")
        fast.generate(**prompts(5), max_new_tokens=8)
    assert "none, because RuntimeError" in str(fast.report.cuda_graphs)


def test_a_fingerprint_sees_what_changes_the_work() -> None:
    model = new_model("llama")
    seen = [fingerprint(model)]
    assert fingerprint(model) == seen[0]
    layer = model.model.layers[1]
    for change in (
        lambda: setattr(layer.mlp.up_proj, "weight", torch.nn.Parameter(layer.mlp.up_proj.weight.clone())),
        lambda: setattr(layer.self_attn, "scaling", 0.1),
        lambda: setattr(layer, "mlp", torch.nn.Identity()),
        lambda: setattr(model, "forward", lambda *args, **kwargs: None),
        lambda: model.set_attn_implementation("eager"),
        lambda: torch.set_float32_matmul_precision("high"),
    ):
        change()
        seen.append(fingerprint(model))
    torch.set_float32_matmul_precision("highest")
    assert len(set(seen)) == len(seen)


def test_graphs_go_when_the_model_changes() -> None:
    model, recorder = new_model("llama"), Replays()
    with recorded_by(recorder) as found:
        assert_identical(model, None, prompts(12), max_new_tokens=12, cuda_graphs="eager")
        before = recorder.num_recorded
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
                model.model.layers[0].mlp.up_proj.weight * 1.5
            )
        assert_identical(model, None, prompts(12), max_new_tokens=12, cuda_graphs="eager")
        assert recorder.num_recorded == 2 * before
        for scale in range(2, 8):
            model.model.layers[0].self_attn.scaling /= scale
            assert_identical(model, None, prompts(12), max_new_tokens=12, cuda_graphs="eager")
        assert "another one" in str(found[model].graphs.failure)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, recorder = new_model("llama"), Replays()
    with recorded_by(recorder) as found:
        for batch, length in ((1, 300), (4, 9), (2, 5), (1, 12), (8, 3)):
            assert_identical(model, None, prompts(*[length] * batch), max_new_tokens=6, cuda_graphs="eager")
            store = found[model]
            fits = store.batch >= batch and store.slots >= length + 6
            assert fits and store.batch * store.slots <= 2 * 384 * 8
        store.graphs.limit = 2
        for temperature in range(1, 6):
            assert_identical(
                model, None, prompts(5), max_new_tokens=6, do_sample=True, temperature=temperature / 2,
                cuda_graphs="eager",
            )  # fmt: skip
            assert len(store.graphs) <= 2
    assert store.nbytes > 0
    store._forget()
    assert store.nbytes == 0


def test_a_store_goes_with_its_model() -> None:
    model = new_model("llama")
    assert_identical(model, DRAFTERS["random-tree"], prompts(5), max_new_tokens=8, cuda_graphs="eager")
    alive = ref(stores._STORES[model]["eager" == "eager", "cpu"])
    assert isinstance(alive(), StaticStore)
    del model
    gc.collect()
    assert alive() is None
    other = new_model("llama")
    alive = ref(store_of(other, "eager", CPU))
    release(other)
    gc.collect()
    assert alive() is None


def test_a_lack_of_memory_stops_recording_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(Replays):
        def record(self, function: Callable[[], None]) -> Callable[[], None]:
            if self.num_recorded == 0:
                self.num_recorded = 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().record(function)

    now = [0.0]
    monkeypatch.setattr(graphs.time, "monotonic", lambda: now[0])
    model, recorder = new_model("llama"), Full()
    with recorded_by(recorder) as found:
        assert_identical(model, None, prompts(12), max_new_tokens=12, cuda_graphs="eager")
        assert found[model].graphs.failure == "OutOfMemoryError: CUDA out of memory (tried again after 30 s)"
        assert recorder.num_replayed == 0
        now[0] = 31.0
        assert_identical(model, None, prompts(12), max_new_tokens=12, cuda_graphs="eager")
        assert found[model].graphs.failure is None
        assert recorder.num_replayed > 0


def test_what_is_kept_between_calls_counts_buffers_and_graphs() -> None:
    store = StaticStore(CPU, Replays())
    store.buffer("noise", (2, 3, 5), torch.float32)
    store.keep("logits", (1, 4), torch.zeros(1, 4, 6))
    store.graphs.recorder.nbytes = 1000  # type: ignore[union-attr]
    assert store.nbytes == 4 * (30 + 24) + 1000
