"""A benchmark must not be fooled by a method that cheats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig

from specdec.benchmark import BenchmarkResults, BenchmarkSettings, Contender, figures, measuring, runner
from specdec.benchmark.comparison import compare, comparison_tables
from specdec.benchmark.measuring import EncodedPrompt, Measurement, Method, Sample, first_difference
from specdec.benchmark.prompts import batches
from specdec.benchmark.results import load_results
from specdec.benchmark.runs import Settings, spread
from specdec.benchmark.tables import text_tables
from specdec.drafters import DraftContext, Drafter, LookaheadDrafter
from specdec.tree import TokenTree
from tests.compiled.builders import built_by, uncompiled
from tests.tiny_models import EOS, tiny_model, tiny_tokenizer

TEXTS = [f"def add(a, b):\n    return a{i}" for i in range(3)]
GREEDY = BenchmarkSettings(max_new_tokens=8, temperatures=(0.0,))


def measured(drafters: Any, settings: BenchmarkSettings = GREEDY, **kwargs: Any) -> BenchmarkResults:
    return runner.run_benchmark(tiny_model(), tiny_tokenizer(), drafters, TEXTS, settings, **kwargs)


class Faulty:
    """Passes the target's output through a fault."""

    def __init__(self, fault: Callable[[Tensor, int], Tensor]) -> None:
        self.fault = fault

    def generate(self, ids: Tensor, **kwargs: Any) -> Tensor:
        return self.fault(tiny_model().generate(ids, **kwargs), ids.shape[1])


def overshoot(output: Tensor, prompt: int) -> Tensor:
    """End of text after two tokens, and four more tokens behind it."""
    output = output.clone()
    output[:, prompt + 2] = EOS
    return output


def changed(output: Tensor, prompt: int) -> Tensor:
    output = output.clone()
    output[:, prompt + 3] += 1
    return output


FAULTS: dict[str, tuple[Callable[[Tensor, int], Tensor], int, int | None]] = {
    # fault, tokens that may be counted, where it shows
    "tokens past the end of text": (overshoot, 3, 2),
    "prompt skipped": (lambda output, prompt: output[:, :prompt], 0, 0),
    "token changed": (changed, 8, 3),
    "one token more": (lambda output, prompt: torch.cat([output, output[:, -1:]], 1), 9, 8),
    "prompt altered": (lambda output, prompt: torch.cat([output[:, :1] + 1, output[:, 1:]], 1), 8, None),
    "prompt not returned": (lambda output, prompt: output[:, prompt:], 0, None),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_reported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, num_tokens, position = FAULTS[name]
    methods = [Method("HF generate", tiny_model), Method("faulty", lambda: Faulty(fault))]
    monkeypatch.setattr(runner._PartRun, "methods", lambda *args: methods)
    results = measured([])
    reference, faulty = results.parts["greedy"].measurement.rows()
    assert (reference.num_identical, reference.num_runs) == (3, 3)
    assert (faulty.num_identical, faulty.num_runs) == (0, 3)
    samples = [s for s in results.parts["greedy"].measurement.samples if s.method == "faulty"]
    assert {s.num_tokens for s in samples} == {num_tokens}
    for sample in samples:
        (difference,) = sample.differences
        assert (difference["row"], difference["position"]) == (0, position)
        # The target was sure of its token: this is a fault, not a near-tie.
        assert difference["gap"] is None if position is None else difference["gap"] > 1e-3
    (table,) = text_tables(results)
    assert table.rows[1][-1] == "0 of 3"
    assert any("faulty: " in note for note in table.notes)


def test_batch_that_lacks_a_row_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    methods = [
        Method("HF generate", tiny_model),
        Method("faulty", lambda: Faulty(lambda output, prompt: output[1:]), optional=True),
    ]
    monkeypatch.setattr(runner._PartRun, "methods", lambda *args: methods)
    results = measured([], replace(GREEDY, batch_sizes=(3,)))
    assert list(results.parts["greedy-batch-3"].measurement.failed) == ["faulty"]


def test_methods_are_compared_on_the_same_prompts_only() -> None:
    samples = [Sample("a", p, 0, [[1]], 1, 1.0, 0.5, 1) for p in "xy"] + [Sample("b", "x", 0, [[1]], 1, 1.0, 0.5, 1)]
    with pytest.raises(ValueError, match=r"b and a were not run on the same prompts: \['y'\]"):
        Measurement("a", Settings({}), samples).rows()


class WrongDrafter(Drafter):
    """Proposes the token that the target will not say, and breaks after some steps."""

    name = "wrong"
    steps = 0

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        self.steps += 1
        if self.steps > 4:
            raise RuntimeError("it broke")
        roots = torch.tensor([int(sequence[-1]) for sequence in context.sequences])
        tokens = torch.stack([roots, torch.full_like(roots, EOS)], 1)
        return TokenTree(tokens, torch.tensor([[-1, 0]]).expand(len(roots), 2))


@pytest.mark.filterwarnings("ignore:drafter 'wrong' failed")
def test_drafter_cannot_change_a_token_and_its_failure_is_told() -> None:
    results = measured([Contender("wrong", WrongDrafter)], BenchmarkSettings(max_new_tokens=8))
    for part in results.parts.values():
        row = part.measurement.rows()[-1]
        assert row.num_identical == row.num_runs == 3
        assert row.notes == ["the drafter was switched off: RuntimeError: it broke"]
        assert row.acceptance_rate in (None, 0.0)


def test_clock_of_decoding_leaves_out_the_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(measuring, "perf_counter", lambda: now[0])

    class Timed(torch.nn.Module):
        generation_config = None

        def forward(self, ids: Tensor) -> None:
            now[0] += 10.0 if ids.shape[1] > 1 else 0.5

        def generate(self, ids: Tensor, **kwargs: Any) -> Tensor:
            self(ids)
            for _ in range(4):
                self(ids[:, :1])
            return torch.cat([ids, ids.new_ones(len(ids), 5)], 1)

    target = Timed()
    prompt = EncodedPrompt("two rows", torch.tensor([[5, 6, 7], [5, 6, 8]]))
    sample = measuring.run_once(Method("m", lambda: target), target, prompt, target, Settings({}))
    assert (sample.seconds, sample.prefill_seconds, sample.num_tokens) == (12.0, 10.0, 10)
    assert sample.decode_tokens_per_second == pytest.approx(8 / 2.0)
    assert sample.num_row_passes == 2 * sample.num_target_passes == 10


def test_drafters_of_one_kind_do_not_learn_from_each_other() -> None:
    def budget_of(name: str, part: str) -> Any:
        prepared = Contender(name, LookaheadDrafter).method(tiny_model(), part).prepare()
        prepared.generate(torch.tensor([[5, 6, 5, 6, 5]]), max_new_tokens=8, do_sample=False)
        return prepared.speculation.budget

    first = budget_of("a", "greedy")
    assert budget_of("a", "greedy").learned is first.learned
    assert budget_of("b", "greedy").learned is not first.learned
    assert budget_of("a", "incompressible").learned is not first.learned


def test_every_setting_is_measured_and_methods_of_each_guarantee_apart() -> None:
    contenders = [
        Contender("exact", lambda: "lookahead"),
        Contender("typical", lambda: LookaheadDrafter(max_depth=2), verifier="typical"),
    ]
    settings = BenchmarkSettings(6, temperatures=(0.0, 1.0), batch_sizes=(1, 2), repeats=2, random_prompts=True)
    results = measured(contenders, settings)
    assert list(results.parts) == ["greedy", "sampled", "greedy-batch-2", "sampled-batch-2", "incompressible"]
    assert [part.num_prompts for part in results.parts.values()] == [3, 3, 2, 2, 3]
    for name, part in results.parts.items():
        rows = {row.method: row for row in part.measurement.rows()}
        assert all(row.num_runs == part.num_prompts * 2 for row in rows.values())
        for method in ("HF generate", "specdec off", "exact"):
            assert rows[method].num_identical == rows[method].num_runs
            assert rows[method].guarantee == "token-identical"
        assert rows["typical"].guarantee == "approximate"
        if "batch" in name:
            assert "batch_size = 1" in part.measurement.failed["HF prompt lookup"]
        elif "greedy" not in name:
            assert rows["HF prompt lookup"].guarantee == "distribution"
    titles = {table.title.partition("; ")[2]: [row[0] for row in table.rows] for table in text_tables(results)}
    assert titles["approximate: the output may differ"] == ["HF generate", "typical"]
    assert "typical" not in titles["exact: the tokens of HF generate"]


def test_sizes_of_the_tree_and_a_compiled_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.benchmark.methods.CompileConfig", lambda: CompileConfig(backend="eager"))
    settings = replace(GREEDY, max_nodes=(4, 16), compiled=True)
    results = measured(["lookahead"], settings)
    measurement = results.parts["greedy"].measurement
    rows = {row.method: row for row in measurement.rows()}
    assert list(rows)[:2] == ["HF generate", "HF generate, compiled"]
    assert list(rows)[-2:] == ["specdec lookahead, 4 nodes", "specdec lookahead, 16 nodes"]
    assert rows["HF generate, compiled"].num_identical == 3
    assert measurement.setup_seconds["HF generate, compiled"] > 0
    assert any("to compile and run once, not counted" in note for note in text_tables(results)[0].notes)
    assert [label.get_text() for label in figures(results)["speedup"].axes[0].get_yticklabels()] == list(rows)[1:]
    with pytest.raises(ValueError, match=r"max_nodes=\(3,\) is not allowed; give distinct values out of 1, 2"):
        replace(GREEDY, max_nodes=(3,))


def test_our_methods_compiled() -> None:
    with built_by(uncompiled) as built:
        measurement = measured(["lookahead"], replace(GREEDY, methods_compiled=True)).parts["greedy"].measurement
    rows = {row.method: row for row in measurement.rows()}
    assert list(rows)[-4:] == [
        "specdec off", "specdec lookahead", "specdec off, compiled", "specdec lookahead, compiled"
    ]  # fmt: skip
    assert all(row.num_identical == row.num_runs for row in list(rows.values())[-4:])
    assert len(built) == 1


def test_compiled_generate_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("specdec.benchmark.methods.CompileConfig", fail)
    measurement = measured([], replace(GREEDY, compiled=True)).parts["greedy"].measurement
    assert measurement.failed == {"HF generate, compiled": "RuntimeError: no compiler"}


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    made = [0]

    def interrupted(limit: int) -> Callable[[], Drafter]:
        def drafter() -> Drafter:
            made[0] += 1
            if made[0] > limit:
                raise KeyboardInterrupt
            return LookaheadDrafter()

        return drafter

    settings = BenchmarkSettings(6)
    with pytest.raises(KeyboardInterrupt):  # the contender is described once, warmed up, and then run on a prompt
        measured([Contender("mine", interrupted(2))], settings)
    for limit, prompts in {4: [2], 6: [3], 7: [3, 1]}.items():
        made[0] = 0
        results = measured([Contender("mine", interrupted(limit))], settings)
        assert results.is_interrupted
        assert [part.num_prompts for part in results.parts.values()] == prompts
        assert all(
            row.num_runs == part.num_prompts for part in results.parts.values() for row in part.measurement.rows()
        )
    results.save(tmp_path)
    assert load_results(tmp_path)["parts"]["greedy"]["num_prompts"] == 3
    assert "Interrupted: medians over the prompts" in (tmp_path / "results.md").read_text()


def test_method_that_fails_later_is_left_out_as_a_whole() -> None:
    made = [0]

    def drafter() -> Drafter:
        made[0] += 1
        if made[0] > 3:
            raise RuntimeError("no more")
        return LookaheadDrafter()

    contenders = [Contender("frail", drafter, optional=True)]
    results = measured(contenders)
    measurement = results.parts["greedy"].measurement
    assert measurement.failed == {"frail": "RuntimeError: no more"}
    assert "frail" not in {s.method for s in measurement.samples}


def results_of(speeds: dict[str, list[float]]) -> dict[str, Any]:
    """Results with these tokens per second, a prompt each."""
    samples = [
        Sample(method, f"prompt {i}", 0, [[1] * 10], 10, 10 / speed, 0.0, 5, identical_rows=[True])
        for method, of_method in speeds.items()
        for i, speed in enumerate(of_method)
    ]
    return {"parts": {"greedy": Measurement(next(iter(speeds)), Settings({}), samples).to_dict()}}


BASE = [100.0, 110.0, 90.0, 120.0, 105.0, 95.0, 130.0, 80.0]
NOISE = [1.03, 0.98, 1.01, 0.97, 1.02, 0.99, 1.04, 0.96]
CHANGES = {
    # factors on the reference and on the method, verdicts on both
    "nothing": ([1.0] * 8, [1.0] * 8, "noise", "noise"),
    "faster": ([1.0] * 8, [1.3 * n for n in NOISE], "noise", "faster"),
    "slower": ([1.0] * 8, [0.8 * n for n in NOISE], "noise", "slower"),
    "noise": ([1.0] * 8, NOISE, "noise", "noise"),
    "sure but small": ([1.0] * 8, [1.01] * 8, "noise", "noise"),
    "large but unsure": ([1.0] * 8, [1.5, 0.7, 1.4, 0.6, 1.6, 0.8, 1.3, 0.75], "noise", "noise"),
    "slower machine": ([0.5] * 8, [0.5 * n for n in NOISE], "slower", "noise"),
    "lost on a slower machine": ([0.5] * 8, [0.3 * n for n in NOISE], "slower", "slower"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_beyond_noise(name: str) -> None:
    reference, method, *verdicts = CHANGES[name]
    old = results_of({"HF generate": BASE, "mine": [2 * speed for speed in BASE]})
    new = results_of(
        {
            "HF generate": [speed * factor for speed, factor in zip(BASE, reference, strict=True)],
            "mine": [2 * speed * factor for speed, factor in zip(BASE, method, strict=True)],
        }
    )
    changes = compare(old, new)
    assert [change.verdict for change in changes] == verdicts
    assert [change.figure for change in changes] == ["tokens/s", "speed-up"]
    assert [row[-1] for row in comparison_tables(old, new)[0].rows] == verdicts


def test_compare_refuses_what_cannot_be_compared(tmp_path: Path) -> None:
    old, new = results_of({"a": BASE}), results_of({"a": BASE})
    new["parts"]["greedy"]["settings"]["seed"] = 1
    with pytest.raises(ValueError, match="measured with other settings"):
        compare(old, new)
    with pytest.raises(ValueError, match="no part and method in common"):
        compare(old, {"parts": {}})
    (tmp_path / "x.json").write_text('{"parts": {"greedy": {"methods": [{}]}}}')
    with pytest.raises(ValueError, match="does not hold results"):
        load_results(tmp_path / "x.json")


def test_small_helpers() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([1, 9], [1, 2, 3]) == 1
    assert spread([4.0]) == (4.0, 4.0)
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 4.0)
    rows = [EncodedPrompt("a", torch.tensor([[5]])), EncodedPrompt("b", torch.tensor([[6, 7]]))]
    (batch,) = batches([*rows, rows[0]], 2, 0, "cpu")
    assert batch.input_ids.tolist() == [[0, 5], [6, 7]]
    assert batch.attention_mask is not None and batch.attention_mask.tolist() == [[0, 1], [1, 1]]
    with pytest.raises(ValueError, match="a batch of 4 prompts cannot be made of 2"):
        batches(rows, 4, 0, "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 1}, "max_new_tokens=1"),
        ({"temperatures": ()}, "temperatures"),
        ({"batch_sizes": (2, 2)}, "give distinct values"),
        ({"temperatures": (-1.0,)}, "each at least 0"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchmarkSettings(**changes)


def test_drafters_are_checked() -> None:
    with pytest.raises(ValueError, match="drafter 'nothing' is not known; use one of 'auto'"):
        measured(["nothing"])
    with pytest.raises(ValueError, match="needs a draft model"):
        measured(["draft-model"])
    with pytest.raises(TypeError, match="would remember them"):
        measured([LookaheadDrafter()])
    with pytest.raises(ValueError, match="the same name"):
        measured(["lookahead", "lookahead"])
    with pytest.raises(ValueError, match="prompts are empty"):
        runner.run_benchmark(tiny_model(), tiny_tokenizer(), [], [])
