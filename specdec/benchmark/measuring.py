"""Measures methods of generation against each other: the same prompts, tokens, counters and clock for all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from specdec.benchmark.runs import Measurement, Row, Sample, Settings
from specdec.passes.cuda_graphs.fingerprint import quiet
from specdec.report import SpeculationReport

__all__ = ["EncodedPrompt", "Measurement", "Method", "Observer", "Row", "Sample", "Settings", "run_interleaved"]

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
RESET_PEAK = "5"
"""Written to `CLEAR`, this sets the process's peak memory to its present one (Linux, proc(5))."""


@dataclass(frozen=True)
class Method:
    """A way to generate.

    Args:
        name: For tables.
        prepare: Returns what has the `generate` method; called anew for each run, outside the clock.
        kwargs: Further arguments of `generate`.
        optional: Leave it out, with the reason, when it fails.
        guarantee: `"token-identical"`, `"distribution"` or `"approximate"`.
    """

    name: str
    prepare: Callable[[], Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False
    guarantee: str = "token-identical"


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt, or a batch of prompts, as token ids.

    Args:
        id: For tables.
        input_ids: `[batch, tokens]`, on the target's device, padded on the left.
        attention_mask: Of the same shape; ones if None.
        category: The kind of task, for tables.
        text: What to show of it.
    """

    id: str
    input_ids: Tensor
    attention_mask: Tensor | None = None
    category: str | None = None
    text: str = ""


class Observer:
    """Called between the runs, outside the clock."""

    def warmed_up(self, method: str, failure: str | None) -> None:
        """A method's warm-up run has ended; with a failure, it is left out."""

    def ran(self, sample: Sample) -> None:
        """A measured run has ended."""

    def round_ended(self, prompt: EncodedPrompt, samples: Sequence[Sample]) -> None:
        """All methods have run on a prompt; outputs have been compared."""

    def left_out(self, method: str, reason: str) -> None:
        """A method failed in a measured run, and is left out."""


def run_interleaved(
    methods: Sequence[Method],
    prompts: Sequence[EncodedPrompt],
    target: nn.Module,
    settings: Settings,
    warm_up: EncodedPrompt | None = None,
    repeats: int = 1,
    observer: Observer | None = None,
) -> Measurement:
    """Runs every method on each prompt before the next prompt, beginning with another method each time.

    Ctrl-C ends it: rounds in which all methods have run are kept, and `Measurement.is_interrupted` is set.

    Args:
        methods: The first one is what the others are compared with.
        prompts: What to complete.
        target: The model whose forwards are counted.
        settings: The same for all.
        warm_up: Prompt of one run per method beforehand that is not measured; the first prompt if None.
        repeats: How often each prompt is run.
        observer: Called between the runs.

    Raises:
        ValueError: Nothing to run, or names or ids that are not distinct.
        KeyboardInterrupt: Interrupted before a round was complete.
    """
    _check_distinct("methods", [m.name for m in methods])
    _check_distinct("prompts", [p.id for p in prompts])
    result = Measurement(methods[0].name, settings, guarantees={m.name: m.guarantee for m in methods})
    rounds = _Rounds(list(methods), target, settings, result, observer or Observer())
    try:
        rounds.warm_up(warm_up or prompts[0])
        for repeat in range(repeats):
            for number, prompt in enumerate(prompts):
                result.samples += rounds.run(repeat * len(prompts) + number, number, prompt, repeat)
    except KeyboardInterrupt:
        if not result.samples:
            raise
        result.is_interrupted = True
    result.samples = [sample for sample in result.samples if sample.method not in result.failed]
    return result


@dataclass
class _Rounds:
    """The runs of all methods, prompt by prompt."""

    methods: list[Method]
    target: nn.Module
    settings: Settings
    result: Measurement
    observer: Observer

    def warm_up(self, prompt: EncodedPrompt) -> None:
        """Runs each method once, and leaves out those that cannot run."""
        for method in list(self.methods):
            self._try(method, prompt, 0, 0)
            self.observer.warmed_up(method.name, self.result.failed.get(method.name))

    def run(self, turn: int, number: int, prompt: EncodedPrompt, repeat: int) -> list[Sample]:
        """Runs all methods on a prompt, beginning with another one each time."""
        turn %= len(self.methods)
        samples = []
        for method in self.methods[turn:] + self.methods[:turn]:
            sample = self._try(method, prompt, number, repeat)
            if sample is None:
                self.observer.left_out(method.name, self.result.failed[method.name])
            else:
                samples.append(sample)
                self.observer.ran(sample)
        order = [m.name for m in self.methods]
        samples = sorted((s for s in samples if s.method in order), key=lambda s: order.index(s.method))
        compare_outputs(samples, prompt, self.target, not self.settings.arguments.get("do_sample"))
        self.observer.round_ended(prompt, samples)
        return samples

    def _try(self, method: Method, prompt: EncodedPrompt, number: int, repeat: int) -> Sample | None:
        """A run; None if the method failed and may be left out."""
        try:
            return run_once(method, method.prepare(), prompt, self.target, self.settings, number, repeat)
        except Exception as error:
            if not method.optional:
                raise
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            self.result.failed[method.name] = reason
            self.methods.remove(method)
            return None


def run_once(
    method: Method,
    runner: Any,
    prompt: EncodedPrompt,
    target: nn.Module,
    settings: Settings,
    number: int = 0,
    repeat: int = 0,
) -> Sample:
    """One run under the clock.

    Args:
        method: Which.
        runner: What the method's `prepare` returned.
        prompt: What to complete.
        target: The model whose forwards are counted.
        settings: What is asked for.
        number: The prompt's number, added to the seed.
        repeat: Noted in the sample.
    """
    ids = prompt.input_ids
    mask = torch.ones_like(ids) if prompt.attention_mask is None else prompt.attention_mask
    torch.manual_seed(settings.seed + number)
    reset_peak(ids.device)
    synchronize(ids.device)
    with _PassCounter(target, ids.device).attached() as counter:
        start = perf_counter()
        output = runner.generate(ids, attention_mask=mask, **settings.arguments, **method.kwargs)
        synchronize(ids.device)
        end = perf_counter()
    sequences = (output if isinstance(output, Tensor) else output.sequences).tolist()
    length = ids.shape[1]
    report = getattr(runner, "report", None)
    report = report if isinstance(report, SpeculationReport) else None
    # A pass replayed from a captured graph calls no hook; the report counts it all the same.
    own = report if report is not None and report.fallback is None else None
    return Sample(
        method=method.name,
        prompt=prompt.id,
        repeat=repeat,
        outputs=[
            sequence[length:] if sequence[:length] == given else None
            for sequence, given in zip(sequences, ids.tolist(), strict=True)
        ],
        num_tokens=sum(count_tokens(sequence[length:], end_tokens(target)) for sequence in sequences),
        seconds=end - start,
        prefill_seconds=(counter.first_end or end) - start,
        num_target_passes=own.num_target_passes if own else counter.count,
        num_row_passes=own.num_row_passes if own else counter.count * len(sequences),
        category=prompt.category,
        report=report.to_dict() if report is not None else None,
        peak_bytes=peak_bytes(ids.device),
        trace=report.trace if report is not None else None,
    )


def compare_outputs(samples: Sequence[Sample], prompt: EncodedPrompt, target: Any, is_greedy: bool) -> None:
    """Compares the outputs of one round with the first sample's: all ids, anything after the end of text included.

    Fills in `identical_rows`, and `differences` with one entry per row that is not identical. Its `gap` is how far
    apart the target's two best logits are at the first difference, in one pass over the prompt and the tokens before
    it. In half precision passes of another width round differently, so a gap near 0 is a near-tie; a large one is a
    fault. It is known for greedy decoding only: sampled tokens depend on the random numbers too.

    Args:
        samples: Of all methods on one prompt or batch, the reference first.
        prompt: What was completed.
        target: The model.
        is_greedy: Whether the outputs are greedy.
    """
    expected = samples[0].outputs
    gaps: dict[tuple[int, int], float] = {}
    for sample in samples:
        pairs = list(zip(sample.outputs, expected, strict=True))
        sample.identical_rows = [theirs is not None and mine == theirs for mine, theirs in pairs]
        for row, (mine, theirs) in enumerate(pairs):
            if sample.identical_rows[row]:
                continue
            position = None if mine is None or theirs is None else first_difference(mine, theirs)
            if is_greedy and position is not None and theirs is not None and (row, position) not in gaps:
                gaps[row, position] = _gap(prompt, row, theirs[:position], target)
            gap = None if position is None else gaps.get((row, position))
            sample.differences.append({"row": row, "position": position, "gap": gap})


def first_difference(mine: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Position of the first token that differs, or that only one of the two has; None if there is none."""
    pairs = enumerate(zip_longest(mine, theirs))
    return next((position for position, (a, b) in pairs if a != b), None)


@torch.no_grad()
def _gap(prompt: EncodedPrompt, row: int, before: Sequence[int], target: Any) -> float:
    ids = prompt.input_ids[row]
    if prompt.attention_mask is not None:
        ids = ids[prompt.attention_mask[row].bool()]
    ids = torch.cat([ids, ids.new_tensor(before)])
    best = target(input_ids=ids[None]).logits[0, -1].float().topk(2).values
    return float(best[0] - best[1])


def count_tokens(new_tokens: Sequence[int], ends: frozenset[int]) -> int:
    """Generated tokens up to the first end-of-text token, which counts."""
    return next((n for n, token in enumerate(new_tokens, start=1) if token in ends), len(new_tokens))


def end_tokens(target: Any) -> frozenset[int]:
    """The ids at which the target's `generate` stops."""
    eos = getattr(getattr(target, "generation_config", None), "eos_token_id", None)
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


class _PassCounter:
    """Counts forwards of a module, and notes when the first one has ended."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self.device = device
        self.count = 0
        self.first_end: float | None = None

    @contextmanager
    def attached(self) -> Iterator[_PassCounter]:
        handle = self.module.register_forward_hook(self._counted)
        try:
            yield self
        finally:
            handle.remove()

    @quiet
    def _counted(self, module: nn.Module, args: Any, output: Any) -> None:
        self.count += 1
        if self.first_end is None:
            synchronize(self.device)
            self.first_end = perf_counter()


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Starts the measuring of peak memory anew, where that is possible."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        try:
            CLEAR.write_text(RESET_PEAK)
        except OSError:
            return


def peak_bytes(device: torch.device) -> int | None:
    """Peak memory since `reset_peak`: torch's tensors on a GPU, the whole process on the CPU; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        lines = STATUS.read_text().splitlines() if os.access(CLEAR, os.W_OK) else []
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _check_distinct(what: str, names: Sequence[str]) -> None:
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{what} must be named distinctly, and there must be some; got {list(names)}")
