"""Runs a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from specdec.benchmark.display import Display
from specdec.benchmark.measuring import EncodedPrompt, Measurement, Method, run_interleaved
from specdec.benchmark.methods import COMPILED, CompiledGenerate, Contender, assisted_kwargs, contenders_of, hf_methods
from specdec.benchmark.prompts import DEFAULT_SOURCE, batches, random_prompts, read_benchmark_prompts
from specdec.benchmark.results import BenchmarkResults, PartResults
from specdec.benchmark.settings import BenchmarkSettings, Part
from specdec.common.embedded import embedded_path
from specdec.common.loading import EMBEDDED
from specdec.common.provenance import circumstances, model_info
from specdec.common.smollm2 import SMOLLM2, is_smollm2

DEFAULT_PROMPTS = 20


def run_benchmark(
    model: Any,
    tokenizer: Any,
    drafters: Sequence[str | Contender] | None = None,
    prompts: Sequence[str | EncodedPrompt] | None = None,
    settings: BenchmarkSettings | None = None,
    *,
    warm_up: str | EncodedPrompt | None = None,
    draft_model: Any = None,
    draft_tokenizer: Any = None,
    console: Console | None = None,
    show_text: bool = False,
) -> BenchmarkResults:
    """Measures transformers' own methods, drafting off, and drafters, in turn on each prompt.

    Args:
        model: The target.
        tokenizer: Its tokenizer.
        drafters: Names or contenders; None for all that can run.
        prompts: Texts to complete, or encoded prompts of one row each; None for 20 held-out ones of the package:
            chat prompts where the tokenizer has a chat template, else Python code.
        settings: Tokens, temperatures, batch sizes, repeats.
        warm_up: A prompt that is run beforehand and not measured; the first prompt if None.
        draft_model: For the drafter `"draft-model"` and transformers' assisted generation.
        draft_tokenizer: Its tokenizer, where that is another one.
        console: Where to show progress; None for nowhere.
        show_text: Whether to show the completions too.

    Returns:
        The results. After Ctrl-C, those of what had been measured: each part up to its last whole round.

    Raises:
        ValueError: A setting is not allowed, or there are too few prompts.
        TypeError: A drafter is neither a name nor a contender.
        KeyboardInterrupt: Nothing had been measured yet.
    """
    settings = settings or BenchmarkSettings()
    contenders = contenders_of(drafters, draft_model, settings.max_nodes, settings.methods_compiled)
    measured, first = _encoded(prompts, warm_up, tokenizer)
    runs = [_PartRun.of(part, settings, measured, first, model, tokenizer) for part in settings.parts()]
    kwargs = assisted_kwargs(tokenizer, draft_tokenizer) if draft_tokenizer is not None else {}
    models = {
        "target": model_info(_name_of(model), model),
        "draft": model_info(_name_of(draft_model), draft_model) if draft_model is not None else None,
    }
    described = {contender.name: contender.described() for contender in contenders}
    results = BenchmarkResults(circumstances(), models, settings, described)
    methods = [run.methods(contenders, draft_model, kwargs) for run in runs]
    num_runs = sum(len(m) * (1 + len(run.prompts) * settings.repeats) for run, m in zip(runs, methods, strict=True))
    with Display(console, num_runs, tokenizer if show_text else None) as display:
        for run, of_part in zip(runs, methods, strict=True):
            try:
                measurement = run.measure(of_part, display)
            except KeyboardInterrupt:
                if not results.parts:
                    raise
                next(reversed(results.parts.values())).measurement.is_interrupted = True
                break
            num_prompts = len(dict.fromkeys(s.prompt for s in measurement.samples)) * run.part.batch_size
            results.parts[run.part.name] = PartResults(measurement, run.part, num_prompts)
            if measurement.is_interrupted:
                break
    return results


def _name_of(model: Any) -> str:
    """Hub name, or the folder's own name without its path."""
    name = str(model.config.name_or_path)
    if is_smollm2(name):
        return SMOLLM2
    for embedded, called in (("target", EMBEDDED), ("draft", f"{EMBEDDED}-draft")):
        with suppress(FileNotFoundError):  # an installation without these models
            if name == str(embedded_path(embedded)):
                return called
    return Path(name).name if Path(name).is_dir() else name


def _encoded(
    prompts: Sequence[str | EncodedPrompt] | None, warm_up: str | EncodedPrompt | None, tokenizer: Any
) -> tuple[list[EncodedPrompt], EncodedPrompt]:
    """The prompts, and the one for the warm-up."""
    if prompts is None:
        *prompts, warm_up = read_benchmark_prompts(DEFAULT_SOURCE, tokenizer, DEFAULT_PROMPTS + 1)
    if not prompts:
        raise ValueError("prompts are empty; give at least one")

    def encoded(prompt: str | EncodedPrompt, name: str) -> EncodedPrompt:
        if isinstance(prompt, EncodedPrompt):
            return prompt
        return EncodedPrompt(name, tokenizer(prompt, return_tensors="pt").input_ids, text=prompt)

    measured = [encoded(prompt, f"prompt {number}") for number, prompt in enumerate(prompts)]
    return measured, measured[0] if warm_up is None else encoded(warm_up, "warm-up")


@dataclass(frozen=True)
class _PartRun:
    """A part of the benchmark, ready to run."""

    part: Part
    settings: BenchmarkSettings
    model: Any
    prompts: list[EncodedPrompt]
    warm_up: EncodedPrompt
    compiled: CompiledGenerate | None

    @classmethod
    def of(
        cls,
        part: Part,
        settings: BenchmarkSettings,
        measured: list[EncodedPrompt],
        warm_up: EncodedPrompt,
        model: Any,
        tokenizer: Any,
    ) -> _PartRun:
        if part.is_random:
            vocab = model.config.get_text_config(decoder=True).vocab_size
            *measured, warm_up = random_prompts(len(measured) + 1, vocab)
        pad = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
        made = batches(measured, part.batch_size, pad, model.device)
        (first,) = batches([warm_up] * part.batch_size, part.batch_size, pad, model.device)
        longest = max(prompt.input_ids.shape[1] for prompt in [*made, first])
        arguments = settings.of(part).arguments
        compiled = CompiledGenerate(model, part.batch_size, longest, arguments) if settings.compiled else None
        return cls(part, settings, model, made, first, compiled)

    def methods(self, contenders: Sequence[Contender], draft_model: Any, kwargs: dict[str, Any]) -> list[Method]:
        """HF's own, then ours."""
        theirs = hf_methods(self.model, draft_model, kwargs, is_sampled=self.part.temperature > 0)
        if self.compiled is not None:
            theirs.insert(1, self.compiled.method())
        ours = [contender.method(self.model, self.part.name) for contender in contenders]
        return [*theirs, *(replace(m, kwargs={"trace": True}) if self.settings.trace else m for m in ours)]

    def measure(self, methods: list[Method], display: Display) -> Measurement:
        repeats = self.settings.repeats
        display.begin(self.part.name, [method.name for method in methods], len(self.prompts) * repeats)
        asked = self.settings.of(self.part)
        measurement = run_interleaved(methods, self.prompts, self.model, asked, self.warm_up, repeats, display)
        if self.compiled is not None and self.compiled.seconds and COMPILED not in measurement.failed:
            measurement.setup_seconds[COMPILED] = self.compiled.seconds
        return measurement
