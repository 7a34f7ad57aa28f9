"""Measures methods of generation against each other: the same prompts, tokens, counters and clock for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from specdec.benchmark.peak_memory import peak_bytes, reset_peak
from specdec.benchmark.runs import Measurement, Row, Sample, Settings
from specdec.passes.cuda_graphs.fingerprint import quiet
from specdec.report import SpeculationReport

__all__ = [
    "EncodedPrompt",
    "Measurement",
    "Method",
    "Row",
    "Sample",
    "Settings",
    "count_tokens",
    "end_tokens",
    "mark_identical",
    "run_interleaved",
    "run_once",
]


@dataclass(frozen=True)
class Method:
    """A way to generate.

    Args:
        name: For tables.
        prepare: Returns what has the `generate` method; called anew for each run, outside the clock.
        kwargs: Further arguments of `generate`.
        remembers: It keeps something from run to run: it meets each prompt once, and what it saw of it in the warm-up
            is lost.
        optional: It is left out, with its reason, when it fails.
        guarantee: What it promises: `"token-identical"`, `"distribution"` or `"approximate"`.
    """

    name: str
    prepare: Callable[[], Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    remembers: bool = False
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
    """

    id: str
    input_ids: Tensor
    attention_mask: Tensor | None = None
    category: str | None = None


@dataclass
class _Rounds:
    """The runs of all methods, prompt by prompt."""

    methods: list[Method]
    target: nn.Module
    settings: Settings
    result: Measurement
    on_sample: Callable[[Sample], None]
    on_failure: Callable[[str, str], None]
    runners: dict[str, Any] = field(default_factory=dict)

    def warm_up(self, prompt: EncodedPrompt, on_warm_up: Callable[[str, str | None], None]) -> None:
        """Runs each method once, and leaves out those that cannot run."""
        for method in list(self.methods):
            self._try(method, method.prepare, prompt, 0, 0)
            on_warm_up(method.name, self.result.failed.get(method.name))
        self.runners = {method.name: method.prepare() for method in self.methods if method.remembers}

    def run(self, turn: int, number: int, prompt: EncodedPrompt, repeat: int) -> list[Sample]:
        """Runs all methods on a prompt, beginning with another one each time."""
        turn %= len(self.methods)
        samples = []
        for method in self.methods[turn:] + self.methods[:turn]:
            if method.remembers and repeat:
                continue
            prepare = partial(self.runners.get, method.name) if method.remembers else method.prepare
            sample = self._try(method, prepare, prompt, number, repeat)
            if sample is None:
                self.on_failure(method.name, self.result.failed[method.name])
            else:
                samples.append(sample)
                self.on_sample(sample)
        mark_identical(samples, self.result.reference)
        order = [m.name for m in self.methods]
        return sorted(samples, key=lambda s: order.index(s.method))

    def _try(
        self, method: Method, prepare: Callable[[], Any], prompt: EncodedPrompt, number: int, repeat: int
    ) -> Sample | None:
        """A run; None if the method failed and may be left out."""
        try:
            return run_once(method, prepare(), prompt, self.target, self.settings, number, repeat)
        except Exception as error:
            if not method.optional:
                raise
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            self.result.failed[method.name] = reason
            self.methods.remove(method)
            return None


def run_interleaved(
    methods: Sequence[Method],
    prompts: Sequence[EncodedPrompt],
    target: nn.Module,
    settings: Settings,
    warm_up: EncodedPrompt | None = None,
    repeats: int = 1,
    on_warm_up: Callable[[str, str | None], None] = lambda method, failure: None,
    on_sample: Callable[[Sample], None] = lambda sample: None,
    on_round: Callable[[EncodedPrompt, list[Sample]], None] = lambda prompt, samples: None,
    on_failure: Callable[[str, str], None] = lambda method, failure: None,
    earlier: Measurement | None = None,
) -> Measurement:
    """Runs every method on each prompt before the next prompt, beginning with another method each time.

    Args:
        methods: The first one is what the others are compared with.
        prompts: What to complete.
        target: The model whose forwards are counted.
        settings: The same for all.
        warm_up: Prompt of one run per method beforehand that is not measured; the first prompt if None.
        repeats: How often each prompt is run.
        on_warm_up: Called after each warm-up run with the method's name, and the reason if it is left out.
        on_sample: Called after each measured run, outside the clock.
        on_round: Called when all methods have run on a prompt, with their samples.
        on_failure: Called with name and reason when an optional method fails in a measured run; it is left out.
        earlier: Whole rounds of an interrupted run, which are not run again.

    Raises:
        ValueError: Nothing to run, names or ids that are not distinct, or a method that remembers cannot go on.
    """
    _check_distinct("methods", [m.name for m in methods])
    _check_distinct("prompts", [p.id for p in prompts])
    result = Measurement(methods[0].name, settings, guarantees={m.name: m.guarantee for m in methods})
    if earlier is not None:
        result.samples, result.failed = list(earlier.samples), dict(earlier.failed)
    usable = [method for method in methods if method.name not in result.failed]
    if result.samples and any(method.remembers for method in usable):
        raise ValueError("a method that remembers cannot go on with an interrupted run; start anew")
    rounds = _Rounds(usable, target, settings, result, on_sample, on_failure)
    done = {(s.prompt, s.repeat) for s in result.samples}
    ahead = [(repeat, number) for repeat in range(repeats) for number in range(len(prompts))]
    ahead = [(repeat, number) for repeat, number in ahead if (prompts[number].id, repeat) not in done]
    if ahead:
        rounds.warm_up(warm_up or prompts[0], on_warm_up)
    for repeat, number in ahead:
        samples = rounds.run(repeat * len(prompts) + number, number, prompts[number], repeat)
        on_round(prompts[number], samples)
        result.samples += samples
    result.samples = [sample for sample in result.samples if sample.method not in result.failed]
    return result


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
    _synchronize(ids.device)
    with _PassCounter(target, ids.device).attached() as counter:
        start = perf_counter()
        output = runner.generate(ids, attention_mask=mask, **settings.arguments, **method.kwargs)
        _synchronize(ids.device)
        end = perf_counter()
    sequences = (output if isinstance(output, Tensor) else output.sequences).tolist()
    length = ids.shape[1]
    report = getattr(runner, "report", None)
    report = report if isinstance(report, SpeculationReport) else None
    # A pass replayed from a captured graph calls no hook; the report counts it all the same.
    told = report if report is not None and report.fallback is None else None
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
        num_target_passes=told.num_target_passes if told else counter.count,
        num_row_passes=told.num_row_passes if told else counter.count * len(sequences),
        category=prompt.category,
        report=report.to_dict() if report is not None else None,
        peak_bytes=peak_bytes(ids.device),
    )


def mark_identical(samples: Sequence[Sample], reference: str) -> None:
    """Compares the outputs of one round with the reference's: all ids, anything after the end of text included."""
    expected = next(s.outputs for s in samples if s.method == reference)
    for sample in samples:
        pairs = zip(sample.outputs, expected, strict=True)
        sample.identical_rows = [theirs is not None and mine == theirs for mine, theirs in pairs]


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
            _synchronize(self.device)
            self.first_end = perf_counter()


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def _check_distinct(what: str, names: Sequence[str]) -> None:
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{what} must be named distinctly, and there must be some; got {list(names)}")
