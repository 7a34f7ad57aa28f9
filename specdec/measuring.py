"""Measures methods of generation against each other: the same prompts, tokens, counters and clock for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from specdec.report import SpeculationReport


@dataclass(frozen=True)
class Settings:
    """What all methods are asked for.

    Args:
        arguments: Of `generate`.
        seed: Prompt i is sampled with seed + i, by every method.
    """

    arguments: Mapping[str, Any]
    seed: int = 0

    @classmethod
    def of(
        cls, max_new_tokens: int = 128, do_sample: bool = False, temperature: float = 1.0, seed: int = 0
    ) -> Settings:
        """Greedy decoding, or sampling from the target's whole distribution."""
        sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if do_sample else {}
        return cls({"max_new_tokens": max_new_tokens, "do_sample": do_sample, "num_beams": 1, **sampling}, seed)


@dataclass(frozen=True)
class Method:
    """A way to generate.

    Args:
        name: For tables.
        prepare: Returns what has the `generate` method; called anew for each run, outside the clock.
        kwargs: Further arguments of `generate`.
        remembers: It keeps something from run to run: it meets each prompt once, and what it saw of it in the warm-up
            is lost.
        optional: It is left out, with its reason, when it fails in the warm-up.
    """

    name: str
    prepare: Callable[[], Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    remembers: bool = False
    optional: bool = False


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as token ids.

    Args:
        id: For tables.
        input_ids: `[1, tokens]`, on the target's device.
        attention_mask: Of the same shape; ones if None.
    """

    id: str
    input_ids: Tensor
    attention_mask: Tensor | None = None


@dataclass
class Sample:
    """One run of one method on one prompt.

    Args:
        method: Its name.
        prompt: The prompt's id.
        repeat: Which repetition.
        output: Every token id returned after the prompt; None when the prompt itself was not returned unchanged.
        num_tokens: Generated tokens, the end-of-text token included, anything after it not counted.
        seconds: Wall time of the call.
        prefill_seconds: The part of it up to the end of the first target pass.
        num_target_passes: Forwards of the target, the prefill included.
        identical: Whether `output` is what the first method gave with the same seed; None until that is known.
    """

    method: str
    prompt: str
    repeat: int
    output: list[int] | None
    num_tokens: int
    seconds: float
    prefill_seconds: float
    num_target_passes: int
    identical: bool | None = None

    @property
    def tokens_per_second(self) -> float:
        """Over the whole call, prefill included."""
        return self.num_tokens / self.seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """After the prefill, which gives the first token."""
        return max(self.num_tokens - 1, 0) / max(self.seconds - self.prefill_seconds, 1e-9)


@dataclass(frozen=True)
class Row:
    """Summary of one method.

    Args:
        method: Its name.
        tokens_per_second: Median over the prompts, prefill included.
        decode_tokens_per_second: The same without prefill.
        prefill_seconds: Median.
        speedup: Median over the prompts of the ratio to the first method.
        tokens_per_pass: All generated tokens by all target passes, prefills included.
        num_identical: Runs whose tokens are those of the first method.
        num_runs: All runs.
    """

    method: str
    tokens_per_second: float
    decode_tokens_per_second: float
    prefill_seconds: float
    speedup: float
    tokens_per_pass: float
    num_identical: int
    num_runs: int


@dataclass
class Measurement:
    """Samples of all methods, and what was left out.

    Args:
        reference: Name of the first method, which the others are compared with.
        settings: What was asked for.
        samples: In the order of the runs.
        failed: Reason by name of each optional method that could not run.
    """

    reference: str
    settings: Settings
    samples: list[Sample] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def rows(self) -> list[Row]:
        """One summary per method, in the order in which they were given."""
        return [self._row(name) for name in dict.fromkeys(s.method for s in self.samples)]

    def _row(self, method: str) -> Row:
        mine = [s for s in self.samples if s.method == method]
        theirs = _median_by_prompt([s for s in self.samples if s.method == self.reference], "tokens_per_second")
        speed = _median_by_prompt(mine, "tokens_per_second")
        return Row(
            method=method,
            tokens_per_second=median(speed.values()),
            decode_tokens_per_second=median(_median_by_prompt(mine, "decode_tokens_per_second").values()),
            prefill_seconds=median(_median_by_prompt(mine, "prefill_seconds").values()),
            speedup=median(speed[prompt] / theirs[prompt] for prompt in speed),
            tokens_per_pass=sum(s.num_tokens for s in mine) / max(sum(s.num_target_passes for s in mine), 1),
            num_identical=sum(bool(s.identical) for s in mine),
            num_runs=len(mine),
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "reference": self.reference,
            "settings": asdict(self.settings),
            "methods": [asdict(row) for row in self.rows()],
            "failed": self.failed,
            "samples": [asdict(sample) for sample in self.samples],
        }


def _median_by_prompt(samples: Sequence[Sample], figure: str) -> dict[str, float]:
    prompts = dict.fromkeys(s.prompt for s in samples)
    return {prompt: median(getattr(s, figure) for s in samples if s.prompt == prompt) for prompt in prompts}


def run_interleaved(
    methods: Sequence[Method],
    prompts: Sequence[EncodedPrompt],
    target: nn.Module,
    settings: Settings,
    warm_up: EncodedPrompt | None = None,
    repeats: int = 1,
    on_warm_up: Callable[[str, str | None], None] = lambda method, failure: None,
    on_sample: Callable[[Sample], None] = lambda sample: None,
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

    Raises:
        ValueError: Nothing to run, or names or ids that are not distinct.
    """
    _check_distinct("methods", [m.name for m in methods])
    _check_distinct("prompts", [p.id for p in prompts])
    result = Measurement(methods[0].name, settings)
    usable = list(methods)
    for method in methods:
        try:
            run_once(method, method.prepare(), warm_up or prompts[0], target, settings)
        except Exception as error:
            if not method.optional:
                raise
            result.failed[method.name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            usable.remove(method)
        on_warm_up(method.name, result.failed.get(method.name))
    runners = {method.name: method.prepare() for method in usable if method.remembers}
    for repeat in range(repeats):
        for number, prompt in enumerate(prompts):
            turn = (repeat * len(prompts) + number) % len(usable)
            round_samples = []
            for method in usable[turn:] + usable[:turn]:
                if method.remembers and repeat:
                    continue
                runner = runners[method.name] if method.remembers else method.prepare()
                sample = run_once(method, runner, prompt, target, settings, number, repeat)
                round_samples.append(sample)
                on_sample(sample)
            mark_identical(round_samples, methods[0].name)
            result.samples += sorted(round_samples, key=lambda s: [m.name for m in usable].index(s.method))
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
    _synchronize(ids.device)
    with _PassCounter(target, ids.device).attached() as counter:
        start = perf_counter()
        output = runner.generate(ids, attention_mask=mask, **settings.arguments, **method.kwargs)
        _synchronize(ids.device)
        end = perf_counter()
    sequence = (output if isinstance(output, Tensor) else output.sequences)[0].tolist()
    length = ids.shape[1]
    new_tokens = sequence[length:]
    report = getattr(runner, "report", None)
    return Sample(
        method=method.name,
        prompt=prompt.id,
        repeat=repeat,
        output=new_tokens if sequence[:length] == ids[0].tolist() else None,
        num_tokens=count_tokens(new_tokens, end_tokens(target)),
        seconds=end - start,
        prefill_seconds=(counter.first_end or end) - start,
        # A pass replayed from a captured graph calls no hook; the report counts it all the same.
        num_target_passes=report.num_target_passes if isinstance(report, SpeculationReport) else counter.count,
    )


def mark_identical(samples: Sequence[Sample], reference: str) -> None:
    """Compares the outputs of one round with the reference's: all ids, anything after the end of text included."""
    expected = next(s.output for s in samples if s.method == reference)
    for sample in samples:
        sample.identical = expected is not None and sample.output == expected


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
