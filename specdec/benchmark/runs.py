"""What runs of methods gave, and their summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median, quantiles
from typing import Any


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
        cls,
        max_new_tokens: int = 128,
        do_sample: bool = False,
        temperature: float = 1.0,
        seed: int = 0,
        top_p: float = 1.0,
    ) -> Settings:
        """Greedy decoding, or sampling; from the target's whole distribution unless `top_p` is below 1."""
        sampling = {"temperature": temperature, "top_k": 0, "top_p": top_p} if do_sample else {}
        return cls({"max_new_tokens": max_new_tokens, "do_sample": do_sample, "num_beams": 1, **sampling}, seed)


@dataclass
class Sample:
    """One run of one method on one prompt, or on one batch of prompts.

    Args:
        method: Its name.
        prompt: The prompt's id, or the batch's.
        repeat: Which repetition.
        outputs: Per row every token id returned after the prompt; None where the prompt itself was not returned
            unchanged.
        num_tokens: Generated tokens of all rows, the end-of-text token included, anything after it not counted.
        seconds: Wall time of the call.
        prefill_seconds: The part of it up to the end of the first target pass.
        num_target_passes: Forwards of the target, the prefill included.
        num_row_passes: The same, counted per row; where the method does not tell, all rows took part in each.
        identical_rows: Per row whether the output is what the first method gave with the same seed; None until that
            is known.
        category: Of the prompt.
        report: What the method says of itself, as `SpeculationReport.to_dict` has it; None if it says nothing.
        peak_bytes: Largest memory during the call: what torch held on the GPU, or the process on the CPU; None where it
            cannot be told.
        differences: One entry per row that is not identical: `row`, `position` of the first token that differs, and
            `gap`, see `compare_outputs`.
        trace: Which tokens had been drafted, if the method was asked for it.
    """

    method: str
    prompt: str
    repeat: int
    outputs: list[list[int] | None]
    num_tokens: int
    seconds: float
    prefill_seconds: float
    num_target_passes: int
    num_row_passes: int = 0
    identical_rows: list[bool] | None = None
    category: str | None = None
    report: dict[str, Any] | None = None
    peak_bytes: int | None = None
    differences: list[dict[str, Any]] = field(default_factory=list)
    trace: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.num_row_passes = self.num_row_passes or self.num_target_passes * len(self.outputs)

    @property
    def tokens_per_second(self) -> float:
        """Over the whole call and all rows, prefill included."""
        return self.num_tokens / self.seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """After the prefill, which gives each row's first token."""
        return max(self.num_tokens - len(self.outputs), 0) / max(self.seconds - self.prefill_seconds, 1e-9)


@dataclass(frozen=True)
class Row:
    """Summary of one method. A spread is the first and the third quartile over the prompts.

    Args:
        method: Its name.
        tokens_per_second: Median over the prompts, prefill included.
        decode_tokens_per_second: The same without prefill.
        prefill_seconds: Median.
        speedup: Median over the prompts of the ratio to the first method.
        tokens_per_pass: All generated tokens by all target passes, prefills included, per row.
        num_identical: Outputs whose tokens are those of the first method.
        num_runs: All outputs.
        guarantee: What the method promises.
        tokens_per_second_spread: Of the tokens per second.
        speedup_spread: Of the speed-up.
        decode_speedup: As the speed-up, without prefill.
        num_draft_tokens: Draft tokens that the target verified, in all; None where the method does not tell.
        acceptance_rate: Share of these that was accepted.
        accepted_per_position: Share of the drafts of which the first, second, ... token of a path was accepted.
        seconds_per_phase: Wall time by phase, in all.
        peak_bytes: Largest memory of any run.
        speedup_by_category: Median speed-up over the prompts of a category.
        notes: Calls that fell back, drafters that were switched off, and where outputs differ from the reference's.
    """

    method: str
    tokens_per_second: float
    decode_tokens_per_second: float
    prefill_seconds: float
    speedup: float
    tokens_per_pass: float
    num_identical: int
    num_runs: int
    guarantee: str
    tokens_per_second_spread: tuple[float, float]
    speedup_spread: tuple[float, float]
    decode_speedup: float
    num_draft_tokens: int | None
    acceptance_rate: float | None
    accepted_per_position: list[float]
    seconds_per_phase: dict[str, float]
    peak_bytes: int | None
    speedup_by_category: dict[str, float]
    notes: list[str]


@dataclass
class Measurement:
    """Samples of all methods, and what was left out.

    Args:
        reference: Name of the first method, which the others are compared with.
        settings: What was asked for.
        samples: In the order of the runs.
        failed: Reason by name of each optional method that could not run.
        guarantees: What each method promises; token-identical where it is not named.
        setup_seconds: What a method took to get ready before the first run, such as compiling; not in its times.
        is_interrupted: Ctrl-C ended it; the samples are those of the rounds before.
    """

    reference: str
    settings: Settings
    samples: list[Sample] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    guarantees: dict[str, str] = field(default_factory=dict)
    setup_seconds: dict[str, float] = field(default_factory=dict)
    is_interrupted: bool = False

    def rows(self) -> list[Row]:
        """One summary per method, in the order in which they were given.

        Raises:
            ValueError: A method lacks a prompt that another one has: their medians would not be of the same prompts.
        """
        methods = list(dict.fromkeys(s.method for s in self.samples))
        prompts = {method: {s.prompt for s in self.samples if s.method == method} for method in methods}
        for method in methods:
            if missing := prompts[self.reference] ^ prompts[method]:
                raise ValueError(f"{method} and {self.reference} were not run on the same prompts: {sorted(missing)}")
        return [self._row(name) for name in methods]

    def _row(self, method: str) -> Row:
        mine = [s for s in self.samples if s.method == method]
        theirs = [s for s in self.samples if s.method == self.reference]
        speed = by_prompt(mine, "tokens_per_second")
        decode, decode_theirs = (by_prompt(samples, "decode_tokens_per_second") for samples in (mine, theirs))
        speedups = self.speedups(method)
        categories = {s.prompt: s.category for s in mine if s.category is not None}
        peaks = [s.peak_bytes for s in mine if s.peak_bytes is not None]
        return Row(
            method=method,
            tokens_per_second=median(speed.values()),
            decode_tokens_per_second=median(decode.values()),
            prefill_seconds=median(by_prompt(mine, "prefill_seconds").values()),
            speedup=median(speedups.values()),
            tokens_per_pass=sum(s.num_tokens for s in mine) / max(sum(s.num_row_passes for s in mine), 1),
            num_identical=sum(sum(s.identical_rows or []) for s in mine),
            num_runs=sum(len(s.outputs) for s in mine),
            guarantee=self.guarantees.get(method, "token-identical"),
            tokens_per_second_spread=spread(speed.values()),
            speedup_spread=spread(speedups.values()),
            # Outputs of one token have no decoding.
            decode_speedup=median(decode[p] / decode_theirs[p] if decode_theirs[p] else 1.0 for p in decode),
            peak_bytes=max(peaks, default=None),
            speedup_by_category={
                category: median(speedups[prompt] for prompt, of in categories.items() if of == category)
                for category in dict.fromkeys(categories.values())
            },
            **_reported([s.report for s in mine if s.report is not None], _difference_notes(mine)),
        )

    def speedups(self, method: str) -> dict[str, float]:
        """Ratio of a method's speed to the reference's, by prompt."""
        mine, theirs = (
            by_prompt([s for s in self.samples if s.method == name], "tokens_per_second")
            for name in (method, self.reference)
        )
        return {prompt: mine[prompt] / theirs[prompt] for prompt in mine}

    def to_dict(self) -> dict[str, Any]:
        """The settings and each method's summary, ready for JSON."""
        return {
            "reference": self.reference,
            "settings": asdict(self.settings),
            "methods": [asdict(row) for row in self.rows()],
            "failed": self.failed,
            "setup_seconds": self.setup_seconds,
            "is_interrupted": self.is_interrupted,
        }


def _reported(reports: Sequence[Mapping[str, Any]], notes: list[str]) -> dict[str, Any]:
    """The figures of a row that come from the method's own reports, and its notes."""
    drafts, drafted, accepted = (
        sum(r[name] for r in reports) for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    )
    depth = max((len(r["num_accepted_tokens_per_pos"]) for r in reports), default=0)
    per_position = [sum(sum(r["num_accepted_tokens_per_pos"][d : d + 1]) for r in reports) for d in range(depth)]
    phases = dict.fromkeys(phase for r in reports for phase in r["seconds"])
    fallbacks = dict.fromkeys(f"fell back to HF generate: {r['fallback']}" for r in reports if r["fallback"])
    errors = dict.fromkeys(f"the drafter was switched off: {r['drafter_error']}" for r in reports if r["drafter_error"])
    return {
        "num_draft_tokens": drafted if reports else None,
        "acceptance_rate": accepted / drafted if drafted else None,
        "accepted_per_position": [count / drafts for count in per_position],
        "seconds_per_phase": {phase: sum(r["seconds"].get(phase, 0.0) for r in reports) for phase in phases},
        "notes": [*fallbacks, *errors, *notes],
    }


def _difference_notes(samples: Sequence[Sample]) -> list[str]:
    """Where outputs leave the reference's, and how near a tie the target was there."""
    different = [d for s in samples for d in s.differences]
    if not different:
        return []
    positions = sorted({d["position"] for d in different if d["position"] is not None})
    gaps = [d["gap"] for d in different if d["gap"] is not None]
    where = f"first difference at token {', '.join(map(str, positions[:8]))}" if positions else "prompt not returned"
    return [where + (f"; gap of the two best logits there {min(gaps):.3g} to {max(gaps):.3g}" if gaps else "")]


def by_prompt(samples: Sequence[Sample], figure: str) -> dict[str, float]:
    """Median over the repeats of a figure, by prompt."""
    prompts = dict.fromkeys(s.prompt for s in samples)
    return {prompt: median(getattr(s, figure) for s in samples if s.prompt == prompt) for prompt in prompts}


def spread(values: Any) -> tuple[float, float]:
    """First and third quartile."""
    known = sorted(values)
    if len(known) == 1:
        return known[0], known[0]
    first, _, third = quantiles(known, n=4, method="inclusive")
    return first, third
