"""The measuring must see a method that cheats, and count and time the same way for all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from specdec import accelerate
from specdec.benchmark import measuring
from specdec.benchmark.measuring import (
    EncodedPrompt,
    Measurement,
    Method,
    Observer,
    Settings,
    count_tokens,
    run_interleaved,
)
from specdec.common import provenance
from specdec.drafters import LookaheadDrafter

EOS = 2
PROMPTS = [EncodedPrompt(f"prompt {i}", torch.tensor([[5, 6, 7 + i]])) for i in range(3)]
SETTINGS = Settings.of(max_new_tokens=6)


class FakeTarget(nn.Module):
    """Generates 10, 11, ... with a pass each."""

    def __init__(self) -> None:
        super().__init__()
        self.generation_config = SimpleNamespace(eos_token_id=EOS)

    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=torch.zeros(1, 1, 8))

    def generate(self, ids: Tensor, max_new_tokens: int, **kwargs: Any) -> Tensor:
        for i in range(max_new_tokens):
            self(ids)
            ids = torch.cat([ids, torch.tensor([[10 + i]])], 1)
        return ids


class Changed:
    """Passes the target's output through a fault."""

    def __init__(self, target: FakeTarget, fault: Callable[[Tensor], Tensor]) -> None:
        self.target = target
        self.fault = fault

    def generate(self, ids: Tensor, **kwargs: Any) -> Tensor:
        return self.fault(self.target.generate(ids, **kwargs))


class Clock:
    """Stands still unless told otherwise."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    fake = Clock()
    monkeypatch.setattr(measuring, "perf_counter", fake)
    return fake


def with_eos(output: Tensor) -> Tensor:
    """End of text after two tokens, and tokens past it."""
    return torch.cat([output[:, :5], torch.tensor([[EOS, 99, 99]])], 1)


def changed_token(output: Tensor) -> Tensor:
    return torch.cat([output[:, :-1], output[:, -1:] + 1], 1)


FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], bool, int]] = {
    "none": (lambda output: output, True, 6),
    "fewer tokens": (lambda output: output[:, :-1], False, 5),
    "one token more": (lambda output: torch.cat([output, output[:, -1:]], 1), False, 7),
    "a token changed": (changed_token, False, 6),
    "prompt changed": (lambda output: output + (torch.arange(output.shape[1]) == 0), False, 6),
    "prompt missing": (lambda output: output[:, 3:], False, 3),
    "tokens past the end": (with_eos, False, 3),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_reported(name: str) -> None:
    fault, is_identical, num_tokens = FAULTS[name]
    target = FakeTarget()
    methods = [Method("reference", lambda: target), Method("mine", lambda: Changed(target, fault))]
    result = run_interleaved(methods, PROMPTS, target, SETTINGS)
    reference, mine = result.rows()
    assert reference.num_identical == reference.num_runs == 3
    assert (mine.num_identical, mine.num_runs) == (3 if is_identical else 0, 3)
    assert {s.num_tokens for s in result.samples if s.method == "mine"} == {num_tokens}
    assert all(s.num_target_passes == 6 for s in result.samples)


def test_tokens_past_the_end_of_text_are_not_counted() -> None:
    assert count_tokens([5, EOS, 7, EOS], frozenset({EOS})) == 2
    assert count_tokens([5, 6], frozenset({EOS})) == 2
    assert count_tokens([], frozenset({EOS})) == 0
    target: Any = FakeTarget()
    assert measuring.end_tokens(target) == {EOS}
    target.generation_config.eos_token_id = [EOS, 9]
    assert measuring.end_tokens(target) == {EOS, 9}
    target.generation_config.eos_token_id = None
    assert measuring.end_tokens(target) == frozenset()


def test_clock_excludes_loading(clock: Clock) -> None:
    class Timed(FakeTarget):
        def forward(self, input_ids: Tensor) -> None:
            clock.now += 1.0 if input_ids.shape[1] == 3 else 0.25

    target = Timed()

    def load() -> FakeTarget:
        clock.now += 1000
        return target

    class Shown(Observer):
        def ran(self, sample: Any) -> None:
            clock.now += 1000

    result = run_interleaved([Method("reference", load)], PROMPTS, target, SETTINGS, observer=Shown())
    (row,) = result.rows()
    assert [s.seconds for s in result.samples] == [2.25] * 3
    assert row.prefill_seconds == 1.0
    assert row.tokens_per_second == pytest.approx(6 / 2.25)
    assert row.decode_tokens_per_second == pytest.approx(5 / 1.25)
    assert row.tokens_per_pass == 1.0


def test_runs_are_interleaved_and_take_turns() -> None:
    target = FakeTarget()
    order: list[tuple[str, str]] = []
    methods = [Method(name, lambda: target) for name in "ABC"]

    class Noted(Observer):
        def ran(self, sample: Any) -> None:
            order.append((sample.prompt, sample.method))

    result = run_interleaved(methods, PROMPTS, target, SETTINGS, repeats=2, observer=Noted())
    rounds = [order[i : i + 3] for i in range(0, 18, 3)]
    assert ["".join(method for _, method in turn) for turn in rounds] == ["ABC", "BCA", "CAB"] * 2
    assert all(len({prompt for prompt, _ in turn}) == 1 for turn in rounds)
    assert [s.method for s in result.samples] == list("ABC") * 6


@pytest.mark.parametrize("runs", [3, 5, 9])
def test_ctrl_c_keeps_whole_rounds(runs: int) -> None:
    target, made = FakeTarget(), [0]

    def prepare() -> FakeTarget:
        made[0] += 1
        if made[0] > runs:
            raise KeyboardInterrupt
        return target

    methods = [Method("A", prepare), Method("B", prepare)]  # the warm-up takes two runs, and each round two more
    if runs == 3:
        with pytest.raises(KeyboardInterrupt):
            run_interleaved(methods, PROMPTS, target, SETTINGS)
        return
    result = run_interleaved(methods, PROMPTS, target, SETTINGS)
    rounds = (runs - 2) // 2
    assert result.is_interrupted is (rounds < 3)
    assert [s.method for s in result.samples] == ["A", "B"] * rounds
    assert [row.num_runs for row in result.rows()] == [rounds] * 2


def test_every_method_gets_the_same_seed() -> None:
    target = FakeTarget()
    draws: list[tuple[str, float]] = []

    class Drawing:
        def __init__(self, name: str) -> None:
            self.name = name

        def generate(self, ids: Tensor, **kwargs: Any) -> Tensor:
            draws.append((self.name, float(torch.rand(()))))
            return target.generate(ids, **kwargs)

    methods = [Method(name, lambda name=name: Drawing(name)) for name in "AB"]
    run_interleaved(methods, PROMPTS, target, SETTINGS)
    by_name = [[draw for name, draw in draws[2:] if name == wanted] for wanted in "AB"]
    assert by_name[0] == by_name[1]
    assert len(set(by_name[0])) == 3


def test_failing_method() -> None:
    target = FakeTarget()

    def fail() -> Any:
        raise RuntimeError("no such thing\nat all")

    reasons: list[tuple[str, str | None]] = []

    class Noted(Observer):
        def warmed_up(self, method: str, failure: str | None) -> None:
            reasons.append((method, failure))

    methods = [Method("reference", lambda: target), Method("broken", fail, optional=True)]
    result = run_interleaved(methods, PROMPTS, target, SETTINGS, observer=Noted())
    assert result.failed == {"broken": "RuntimeError: no such thing"}
    assert reasons == [("reference", None), ("broken", "RuntimeError: no such thing")]
    assert [row.method for row in result.rows()] == ["reference"]
    with pytest.raises(RuntimeError, match="no such thing"):
        run_interleaved([methods[0], Method("broken", fail)], PROMPTS, target, SETTINGS)
    with pytest.raises(ValueError, match="distinctly"):
        run_interleaved([methods[0], methods[0]], PROMPTS, target, SETTINGS)


def test_speed_up_is_the_median_over_prompts_of_the_ratio() -> None:
    def sample(method: str, prompt: str, seconds: float) -> measuring.Sample:
        return measuring.Sample(method, prompt, 0, [[]], 100, seconds, 0.0, 50)

    times = {"slow": (1.0, 2.0, 10.0), "fast": (0.5, 0.5, 10.0)}
    samples = [sample(name, str(i), s) for name, seconds in times.items() for i, s in enumerate(seconds)]
    slow, fast = Measurement("slow", SETTINGS, samples).rows()
    assert (slow.tokens_per_second, fast.tokens_per_second) == (50, 200)
    assert (slow.speedup, fast.speedup) == (1.0, 2.0)
    assert fast.tokens_per_pass == 2.0


@pytest.mark.parametrize("do_sample", [False, True])
def test_real_model(do_sample: bool) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=32, eos_token_id=EOS, pad_token_id=0, **shape)).eval()
    drafted = Method("drafted", lambda: accelerate(model, LookaheadDrafter()))
    off = Method("off", lambda: accelerate(model, None))
    settings = Settings.of(max_new_tokens=12, do_sample=do_sample, temperature=0.8)
    prompts = [EncodedPrompt(str(i), torch.tensor([[3, 4 + i, 3, 4 + i]])) for i in range(2)]
    result = run_interleaved([Method("reference", lambda: model), drafted, off], prompts, model, settings)
    assert all(row.num_identical == row.num_runs for row in result.rows())
    for reference, sample in zip(result.samples[::3], result.samples[2::3], strict=True):
        # The reference's passes are counted by hooks, the other's by the report.
        assert sample.num_target_passes == reference.num_target_passes == sample.num_tokens
    assert json.loads(json.dumps(result.to_dict()))["settings"]["arguments"]["do_sample"] is do_sample


def test_circumstances(tmp_path: Path) -> None:
    found = provenance.circumstances()
    assert found["hardware"]["cores"] >= 1
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0] or found["versions"]["torch"]
    assert found["commit"] is None or len(found["commit"].removesuffix("+changes")) == 40
    provenance.write_json(tmp_path / "new" / "file.json", found)
    assert json.loads((tmp_path / "new" / "file.json").read_text()) == found
