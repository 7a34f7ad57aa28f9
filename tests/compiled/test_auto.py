"""`compiled="auto"`: used when found, compiled in a process of its own, and never for short lives."""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor, nn

import specdec
from specdec.passes.compiled import auto, background, package
from specdec.passes.compiled.forward import Layout, SlotForward
from specdec.passes.compiled.package import failure_file, locked, module_digest
from specdec.passes.compiled.structure import restored, without_weights
from tests.compiled.builders import built_by, uncompiled
from tests.conformance import DRAFTERS, assert_identical
from tests.tiny_models import new_model, prompts

LAYOUT = Layout((), None, False, ())


class FakeCompilation:
    """A process that compiles until told to end."""

    started: ClassVar[list[FakeCompilation]] = []

    def __init__(self, module: nn.Module, inputs: Any, dynamic: Any) -> None:
        self.file = package.package_file(module, inputs, dynamic)
        self.is_running, self.failure = True, None
        self.process = type("Process", (), {"pid": 4711})
        FakeCompilation.started.append(self)

    def end(self, failure: str | None = None) -> None:
        self.is_running, self.failure = False, failure
        if failure is None:
            self.file.write_text("a package")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[FakeCompilation]]:
    """No process and no compiler; gives the compilations that were started."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.setattr(auto, "Compilation", FakeCompilation)
    monkeypatch.setattr(auto, "get_cpp_compiler", lambda: "c++")
    monkeypatch.setattr(auto, "START_AFTER", 0.0)
    monkeypatch.setattr(auto, "_AUTO", WeakKeyDictionary())
    monkeypatch.setattr(FakeCompilation, "started", [])
    with built_by(uncompiled):
        yield FakeCompilation.started


def run(model: Any, do_sample: bool = False, drafter: str | None = "random-tree") -> str:
    found = DRAFTERS[drafter] if drafter else None
    report = assert_identical(model, found, prompts(9), compiled="auto", max_new_tokens=12, do_sample=do_sample)
    return report.compiled or ""


@pytest.mark.parametrize("do_sample", [False, True])
def test_taken_up_when_ready(do_sample: bool, started: list[FakeCompilation]) -> None:
    model = new_model("llama")
    assert run(model, do_sample) == run(model, do_sample) == "not yet, process 4711 is compiling"
    started[0].end()
    assert run(model, do_sample).startswith("yes")
    assert len(started) == 1


def test_what_was_compiled_before_is_used_at_once(started: list[FakeCompilation]) -> None:
    run(new_model("llama"))
    started[0].end()
    assert run(new_model("llama")).startswith("yes")
    assert len(started) == 1


def test_nothing_is_compiled_for_a_short_life(started: list[FakeCompilation], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "START_AFTER", 60.0)
    assert run(new_model("llama")) == "not yet, compiled in the background after 60 s of passes"
    assert not started


def test_a_failure_is_told_and_not_repeated(started: list[FakeCompilation]) -> None:
    model = new_model("llama")
    run(model)
    failure_file(started[0].file).write_text("RuntimeError: cannot be exported")
    started[0].end("RuntimeError: cannot be exported")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "no, because RuntimeError: cannot be exported" in run(model)
        again = new_model("llama")  # as in another process
        assert "no, because RuntimeError: cannot be exported (kept in " in run(again)
        fast = specdec.accelerate(again, None, compiled="auto")
        assert "cannot be exported" in str(fast.capability)
    assert len(started) == 1


def test_what_another_process_compiles_is_not_compiled_twice(started: list[FakeCompilation]) -> None:
    model = new_model("llama")
    run(model)
    file = started.pop().file
    auto.auto_passes(model).compilation = None
    with locked(file, waits=False) as is_mine, locked(file, waits=False) as is_second:
        assert is_mine and not is_second
        run(model)
        assert not started
    run(model)
    assert len(started) == 1


def test_other_logits_are_noticed(started: list[FakeCompilation]) -> None:
    def wrong(module: nn.Module, *args: Any) -> package.Function:
        right = uncompiled(module, *args)
        return lambda *inputs: (-right(*inputs)[0], *right(*inputs)[1:])

    model = new_model("llama")
    run(model)
    started[0].end()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "compile_ahead", wrong)  # undone before `started` puts the original back
        with pytest.warns(RuntimeWarning, match="other logits than the model itself"):
            told = run(model)
        assert told.startswith("no, because its compiled passes give other logits")
    assert run(model).startswith("no")


def test_no_compiler(started: list[FakeCompilation], monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(auto, "get_cpp_compiler", none)
    assert run(new_model("llama")) == "no, because RuntimeError: no C++ compiler"
    assert not started


def test_what_cannot_be_sent_to_another_process(
    started: list[FakeCompilation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "Compilation", background.Compilation)
    model = new_model("llama")
    model.own = lambda: None
    assert run(model).startswith("no, because ")


def test_only_known_modes() -> None:
    with pytest.raises(ValueError, match="compiled='always' is not known; use True, False or 'auto'"):
        specdec.accelerate(new_model("llama"), None, compiled="always")  # type: ignore[arg-type]


def test_a_copy_without_weights() -> None:
    model = new_model("llama")
    content = without_weights(SlotForward(model, LAYOUT))
    assert len(content) < 100_000
    (copy,) = restored(content)
    assert {n: p.shape for n, p in copy.named_parameters()} == {
        n: p.shape for n, p in SlotForward(model, LAYOUT).named_parameters()
    }
    assert module_digest(copy) == module_digest(SlotForward(model, LAYOUT))


def changed_weight(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(2)


def other_epsilon(model: Any) -> None:
    model.model.norm.variance_epsilon *= 2


def other_forward(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.GELU()


@pytest.mark.parametrize(
    ("change", "is_same"), [(changed_weight, True), (other_epsilon, False), (other_forward, False)]
)
def test_only_what_is_compiled_tells_packages_apart(change: Callable[[Any], None], is_same: bool) -> None:
    model, other = new_model("llama"), new_model("llama")
    change(other)
    digests = [module_digest(SlotForward(m, LAYOUT)) for m in (model, other)]
    assert (digests[0] == digests[1]) is is_same


def test_tiny_tensors_count_by_value() -> None:
    """Torch writes them into the code."""

    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(100))
            self.register_buffer("factor", torch.tensor(factor))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor

    assert module_digest(Scaled(2.0)) != module_digest(Scaled(3.0))


PARENT = """
import os, signal, sys
import torch
from specdec.passes.compiled.background import Compilation
from specdec.passes.compiled.forward import Layout, SlotForward
from tests.tiny_models import new_model
compilation = Compilation(SlotForward(new_model("llama"), Layout((), None, False, ())), [torch.ones(1, 1)], [{}])
print(compilation.process.pid, compilation._folder, flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["returns", "killed"])
def test_the_process_ends_with_the_one_that_started_it(end: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    parent = subprocess.run([sys.executable, "-c", PARENT, end], capture_output=True, text=True)
    pid, folder = parent.stdout.split()
    deadline = time.monotonic() + 60
    while is_alive(int(pid)) or Path(folder).exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("do_sample", [False, True])
def test_compiled_by_another_process_for_real(do_sample: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.setattr(auto, "START_AFTER", 0.0)
    model = new_model("llama")
    run(model, do_sample)
    compilation = auto.auto_passes(model).compilation
    assert compilation is not None
    assert compilation.process.wait(timeout=300) == 0
    assert run(model, do_sample).startswith("yes")
    assert not Path(compilation._folder).exists() and len(list(tmp_path.glob("*.pt2"))) == 1
