"""Runs a benchmark."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from specdec.benchmark.baselines import OFF, assisted_kwargs
from specdec.benchmark.compiled import COMPILED, CompiledGenerate
from specdec.benchmark.contenders import Contender, and_compiled, as_contenders, at_sizes, methods_of
from specdec.benchmark.differences import note_differences
from specdec.benchmark.measuring import EncodedPrompt, Method, run_interleaved
from specdec.benchmark.progress import MeasuringProgress
from specdec.benchmark.prompts import DEFAULT_SOURCE, batches, random_prompts, read_benchmark_prompts
from specdec.benchmark.record import RunRecord
from specdec.benchmark.results import BenchmarkResults, PartResults
from specdec.benchmark.runs import Measurement, Sample
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
    folder: str | Path | None = None,
    console: Console | None = None,
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
        folder: Where samples are written as they come. A run that was interrupted goes on there when it is started
            again with the same arguments.
        console: Where to show progress; None for nowhere.

    Raises:
        ValueError: A setting is not allowed, there are too few prompts, or the folder holds another run.
        TypeError: A drafter is neither a name nor a contender.
    """
    settings = settings or BenchmarkSettings()
    contenders = [Contender(OFF, lambda: None), *at_sizes(as_contenders(drafters, draft_model), settings.max_nodes)]
    contenders = and_compiled(contenders) if settings.methods_compiled else contenders
    measured, first = _encoded(prompts, warm_up, tokenizer)
    kwargs = {} if draft_tokenizer is None else assisted_kwargs(tokenizer, draft_tokenizer)
    plans = [
        _plan(part, settings, measured, first, tokenizer, model, contenders, draft_model, kwargs)
        for part in settings.parts()
    ]
    started = circumstances()
    models = {
        "target": model_info(_name_of(model), model),
        "draft": model_info(_name_of(draft_model), draft_model) if draft_model is not None else None,
    }
    identity = {
        "settings": asdict(settings),
        "models": models,
        "prompts": {"number": len(measured), "digest": _digest([*measured, first])},
        "drafters": {contender.name: contender.described() for contender in contenders if contender.name != OFF},
        **{name: started[name] for name in ("hardware", "versions", "commit")},
    }
    record = RunRecord(Path(folder) if folder is not None else None, identity, started)
    results = BenchmarkResults(record.circumstances, models, settings)
    with MeasuringProgress(console, sum(plan.num_runs(settings.repeats) for plan in plans)) as progress:
        for plan in plans:
            measurement = plan.run(model, settings, record, progress)
            batch_size = plan.part.batch_size
            results.parts[plan.part.name] = PartResults(measurement, plan.part, len(plan.prompts) * batch_size)
    return results


def _name_of(model: Any) -> str:
    """Hub name, or the folder's own name: where it lies is of no interest elsewhere."""
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
        return EncodedPrompt(name, tokenizer(prompt, return_tensors="pt").input_ids)

    measured = [encoded(prompt, f"prompt {number}") for number, prompt in enumerate(prompts)]
    return measured, measured[0] if warm_up is None else encoded(warm_up, "warm-up")


@dataclass(frozen=True)
class _Plan:
    """A part, ready to be run."""

    part: Part
    methods: list[Method]
    prompts: list[EncodedPrompt]
    warm_up: EncodedPrompt
    compiled: CompiledGenerate | None = None

    def num_runs(self, repeats: int) -> int:
        return len(self.methods) * (1 + len(self.prompts) * repeats)

    def run(
        self, model: Any, settings: BenchmarkSettings, record: RunRecord, progress: MeasuringProgress
    ) -> Measurement:
        name, asked = self.part.name, settings.of(self.part)
        reference = self.methods[0].name
        earlier = record.earlier(name, reference, asked)
        runs = len(self.prompts) * settings.repeats
        progress.begin(name)
        for _ in earlier.samples:
            progress.ran()
        for method, reason in earlier.failed.items():
            progress.left_out(method, reason, 1 + runs)

        def warmed_up(method: str, failure: str | None) -> None:
            progress.ran()
            if failure:
                record.add_failure(name, method, failure)
                progress.left_out(method, failure, runs)

        def failed(method: str, reason: str) -> None:
            record.add_failure(name, method, reason)
            progress.left_out(method, reason, 0)

        def round_ended(prompt: EncodedPrompt, samples: list[Sample]) -> None:
            note_differences(samples, reference, prompt, model, is_greedy=self.part.temperature == 0)
            record.add_round(name, samples)

        measurement = run_interleaved(
            self.methods,
            self.prompts,
            model,
            asked,
            self.warm_up,
            settings.repeats,
            on_warm_up=warmed_up,
            on_sample=progress.ran,
            on_round=round_ended,
            on_failure=failed,
            earlier=earlier,
        )
        if self.compiled is not None and self.compiled.seconds and COMPILED not in measurement.failed:
            measurement.setup_seconds[COMPILED] = self.compiled.seconds
        return measurement


def _plan(
    part: Part,
    settings: BenchmarkSettings,
    measured: list[EncodedPrompt],
    warm_up: EncodedPrompt,
    tokenizer: Any,
    model: Any,
    contenders: Sequence[Contender],
    draft_model: Any,
    kwargs: dict[str, Any],
) -> _Plan:
    if part.is_random:
        vocab = model.config.get_text_config(decoder=True).vocab_size
        *measured, warm_up = random_prompts(len(measured) + 1, vocab)
    ends = [token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None]
    made = batches(measured, part.batch_size, ends[0], model.device)
    (first,) = batches([warm_up] * part.batch_size, part.batch_size, ends[0], model.device)
    longest = max(prompt.input_ids.shape[1] for prompt in [*made, first])
    arguments = dict(settings.of(part).arguments)
    compiled = CompiledGenerate(model, part.batch_size, longest, arguments) if settings.compiled else None
    methods = methods_of(model, contenders, part, draft_model, kwargs, compiled)
    return _Plan(part, methods, made, first, compiled)


def _digest(prompts: Sequence[EncodedPrompt]) -> str:
    found = hashlib.sha256()
    for prompt in prompts:
        found.update(f"{prompt.id} {prompt.input_ids.tolist()}\n".encode())
    return found.hexdigest()[:16]
