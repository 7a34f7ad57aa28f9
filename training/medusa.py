"""Training of Medusa heads: Medusa-1, Medusa-2 in two stages, Medusa-2 in one stage with self-distillation."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, set_seed
from rich.console import Console
from torch import Tensor
from transformers import get_scheduler

from specdec.common.loading import load_model
from specdec.heads import MedusaHeads
from specdec.training.batches import BatchPlan, evaluation_batches, training_batches
from specdec.training.checkpoints import Checkpoints
from specdec.training.config import MedusaTrainingConfig
from specdec.training.data import TrainingData, most_frequent, self_distilled, windows_of
from specdec.training.evaluation import Evaluation, count, evaluate
from specdec.training.losses import IGNORED, medusa_targets
from specdec.training.progress import evaluation_table, progress_bar, summary
from specdec.training.recipes import HeadsAlone, Recipe, build
from specdec.training.results import TrainingResult, save_result
from specdec.training.state_cache import StateCache

FIRST_STAGE_FOLDER = "first-stage"
FIRST_STAGE_LEARNING_RATE = 1e-3
UNSUPPORTED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
SCHEDULES = {"constant": "constant_with_warmup"}
"""transformers' names of schedules, where they differ from the settings'."""


def train(
    config: MedusaTrainingConfig, model: Any = None, tokenizer: Any = None, console: Console | None = None
) -> TrainingResult:
    """Trains heads and writes them, with all that belongs to them, into `config.output`.

    Medusa, arXiv 2401.10774, sections 2.2 and 2.3. A run that was stopped or killed goes on from its last checkpoint
    and ends with the same weights.

    Args:
        config: What to train, and how.
        model: The target, in place of `config.model`.
        tokenizer: Its tokenizer; needed with `model`.
        console: For progress.

    Returns:
        The heads, and how good they are. `is_complete` is False when SIGINT or SIGTERM stopped the run.

    Raises:
        ValueError: Settings, data and model do not go together, or the output folder is another run's.
    """
    config = config.resolved()
    console = console or Console()
    accelerator = new_accelerator(config)
    set_seed(config.seed)
    if model is None:
        device = str(accelerator.device)
        model, tokenizer = load_model(
            config.model, config.dtype, device, config.device_map, config.attn, config.trust_remote_code
        )
    elif config.device_map is None:
        model.to(accelerator.device)
    data = _data(config, model, tokenizer, accelerator, console)
    if config.recipe == "medusa-2" and config.initial_heads is None and config.first_stage_steps != 0:
        first = replace(
            config,
            recipe="medusa-1",
            output=str(Path(config.output) / FIRST_STAGE_FOLDER),
            steps=config.first_stage_steps or config.steps,
            learning_rate=FIRST_STAGE_LEARNING_RATE,
            heads_weight=1.0,
            measure_prompts=0,
        )
        result = _Run(first, model, data, accelerator, console).run()
        if not result.is_complete:
            return result
        accelerator = new_accelerator(config)
        config = replace(config, initial_heads=first.output)
    return _Run(config, model, data, accelerator, console).run()


def new_accelerator(config: MedusaTrainingConfig) -> Accelerator:
    """Devices, processes and precision, as `accelerate launch` says where the config does not.

    Raises:
        ValueError: A tracker is not installed, or processes would share the parameters of one model.
    """
    accelerator = Accelerator(
        cpu=config.cpu or None,
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.accumulation,
        step_scheduler_with_optimizer=False,
        log_with=list(config.trackers) or None,
        project_dir=config.output,
        # Other processes wait while the first one writes answers or reads data.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=24))],
    )
    if accelerator.distributed_type in UNSUPPORTED:
        raise ValueError(
            f"accelerate is configured for {accelerator.distributed_type.value}, which cannot be used here; "
            "launch with plain data parallelism, and spread a large target with device_map"
        )
    return accelerator


def _data(
    config: MedusaTrainingConfig, model: Any, tokenizer: Any, accelerator: Accelerator, console: Console
) -> TrainingData:
    source = config.data
    if (source is None) != config.is_self_distilled:
        raise ValueError(
            "there must be either data to train on, or prompts for the target to answer, or own_prompts, a number of "
            "prompts that it writes itself; name one of them"
        )
    with accelerator.main_process_first():
        if source is None:
            source = self_distilled(config, model, tokenizer, console if accelerator.is_main_process else None)
        return windows_of(config, source, tokenizer)


@dataclass
class _Record:
    """What a checkpoint keeps beside weights and states.

    Args:
        data: Digest of the windows.
        before: Evaluation before the first step.
        evaluations: Evaluations since, with their step.
        seconds: Time spent in steps.
    """

    data: str
    before: dict[str, Any] | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


class _Run:
    """One stage of training."""

    def __init__(
        self,
        config: MedusaTrainingConfig,
        model: Any,
        data: TrainingData,
        accelerator: Accelerator,
        console: Console,
    ) -> None:
        self.config, self.data, self.accelerator, self.console = config, data, accelerator, console
        set_seed(config.seed)
        if config.initial_heads is None:
            size = config.draft_vocabulary
            known = None if size is None else most_frequent(data.train, size)
            heads = MedusaHeads.for_model(
                model, config.num_heads, config.num_layers, config.heads_version, draft_tokens=known
            )
        else:
            heads = MedusaHeads.from_pretrained(config.initial_heads, dtype=torch.float32).bind(model)
        self.num_heads = heads.config.num_heads
        self.recipe: Recipe = build(model, heads, config)
        self.state_cache: StateCache | None = None
        if config.cache_states and isinstance(self.recipe, HeadsAlone):
            key = f"{data.digest}-{accelerator.process_index}"
            self.state_cache = self.recipe.state_cache = StateCache(Path(config.output), key)
        # From here on processes draw different numbers.
        set_seed(config.seed, device_specific=True)
        self.plan = BatchPlan(
            len(data.train), config.batch_size, config.accumulation, accelerator.num_processes, config.seed
        )
        self.steps = config.steps or self.plan.steps(config.epochs)
        optimizer = torch.optim.AdamW(self.recipe.parameter_groups(config), weight_decay=config.weight_decay)
        name = SCHEDULES.get(config.schedule or "", config.schedule) or "constant_with_warmup"
        schedule = get_scheduler(name, optimizer, config.warmup_steps, max(self.steps, config.warmup_steps + 1))
        self.trained, self.optimizer, self.schedule = accelerator.prepare(self.recipe, optimizer, schedule)
        self.checkpoints = Checkpoints(accelerator, config)
        self.record = _Record(data.digest)

    def run(self) -> TrainingResult:
        """Trains from the last checkpoint to the end or to a signal."""
        done = self._resume()
        if self.accelerator.is_main_process:
            self.config.save(Path(self.config.output))
        if self.config.trackers:
            settings = {k: str(v) for k, v in asdict(self.config).items()}
            self.accelerator.init_trackers(self.config.project, settings, {"wandb": {"dir": self.config.output}})
        if self.record.before is None and self.config.recipe != "medusa-1":
            self.record.before = self._evaluate().to_dict()
        with caught_signals() as signals:
            done = self._steps(done, signals)
        self.checkpoints.save(done, asdict(self.record))
        result = TrainingResult(self.config, done, done == self.steps, self.recipe.heads, None, self.record.before)
        if result.is_complete:
            self._finish(result)
        else:
            result.stopped_by = signals[0] if signals else signal.SIGTERM  # another process may have got it
            self._say(f"stopped by {result.stopped_by.name} at step {done} of {self.steps}; start it again to continue")
        if self.config.trackers:
            self.accelerator.end_training()
        return result

    def _resume(self) -> int:
        done, record = self.checkpoints.load_latest()
        if done:
            if record["data"] != self.record.data:
                raise ValueError(
                    f"the data are not those that the run in {self.config.output} began with; "
                    "use the same ones, or another output folder"
                )
            self.record = _Record(**record)
            self._say(f"continues from step {done} of {self.steps}")
        return done

    def _steps(self, done: int, signals: list[signal.Signals]) -> int:
        """Trains; returns how many steps are done."""
        config, process = self.config, self.accelerator.process_index
        batches = training_batches(self.data.train, self.plan, process, range(done, self.steps), config.workers)
        self.trained.train()
        recent: list[Tensor] = []
        since = time.perf_counter()
        shown = self.console if self.accelerator.is_main_process and self.console.is_terminal else None
        with progress_bar(shown) as progress:
            title = f"{config.recipe}, {self.num_heads} heads"
            task = progress.add_task(title, total=self.steps, completed=done, note="")
            for step_batches in batches:
                counts, stop = self._step(done, step_batches, bool(signals))
                done += 1
                recent.append(counts)
                progress.update(task, completed=done)
                if done % config.log_every == 0 or done == self.steps:
                    elapsed, since = time.perf_counter() - since, time.perf_counter()
                    self.record.seconds += elapsed
                    note = self._log(done, recent, elapsed / len(recent))
                    progress.update(task, note=note)
                    if shown is None:
                        self._say(f"step {done}/{self.steps}  {note}  {elapsed / len(recent):.2f} s/step")
                    recent = []
                if config.eval_every and done % config.eval_every == 0 and done < self.steps:
                    self._evaluate_and_record(done)
                if stop:
                    break
                if done % config.save_every == 0:
                    self.checkpoints.save(done, asdict(self.record))
        return done

    def _step(self, step: int, batches: list[dict[str, Tensor]], stop: bool) -> tuple[Tensor, bool]:
        """One step of the optimizer.

        Losses are means over the supervised targets of the whole step, in all processes: their number is summed up
        first, so that the spread of windows over processes and passes does not matter.

        Returns:
            This process's counts, and whether any process was asked to stop.
        """
        accelerator, config = self.accelerator, self.config
        moved = [{n: t.to(accelerator.device, non_blocking=True) for n, t in batch.items()} for batch in batches]
        targets = [medusa_targets(b["input_ids"], b["supervised"], b["segments"], self.num_heads) for b in moved]
        num_targets = torch.stack([(t != IGNORED).flatten(1).sum(1) for t in targets]).sum(0).float()
        shared = accelerator.reduce(torch.cat([num_targets, num_targets.new_full((1,), float(stop))]), reduction="sum")
        coefficients = self._coefficients(step, shared[:-1])
        counts = []
        for batch, batch_targets in zip(moved, targets, strict=True):
            with accelerator.accumulate(self.trained):
                sums = self.trained(self.recipe.prepare(batch), batch_targets, coefficients)
                # Gradients are averaged over passes and processes, where the sum is wanted.
                accelerator.backward(sums.loss * (config.accumulation * accelerator.num_processes))
                if accelerator.sync_gradients:
                    if config.max_grad_norm:
                        accelerator.clip_grad_norm_(self.trained.parameters(), config.max_grad_norm)
                    self.optimizer.step()
                    self.schedule.step()
                    self.optimizer.zero_grad()
            counts.append(count(sums, batch_targets))
        return torch.stack(counts).sum(0), bool(shared[-1] > 0)

    def _coefficients(self, step: int, num_targets: Tensor) -> Tensor:
        """Factors of the summed losses: row 0 the target's own, then the heads'; `[heads + 1]`."""
        config = self.config
        assert config.heads_weight is not None
        weight = config.heads_weight
        if config.heads_schedule == "sine":  # of Medusa-2; the step in progress counts, so that none has the factor 0
            weight *= math.sin(math.pi / 2 * (step + 1) / self.steps)
        factors = [1.0, *(weight * config.head_decay**k for k in range(1, self.num_heads + 1))]
        return torch.tensor(factors, device=num_targets.device) / num_targets.clamp(min=1)

    def _log(self, step: int, recent: list[Tensor], seconds_per_step: float) -> str:
        result = Evaluation.of(self.accelerator.reduce(torch.stack(recent).sum(0), reduction="sum"))
        rates = {f"learning_rate/{i}": rate for i, rate in enumerate(self.schedule.get_last_lr())}
        self._track("train", result, step, rates | {"seconds_per_step": seconds_per_step})
        return summary(result)

    def _track(self, part: str, result: Evaluation, step: int, more: dict[str, float] | None = None) -> None:
        if self.config.trackers:
            values = {f"{part}/{name}": value for name, value in result.figures().items()}
            self.accelerator.log({**values, **(more or {})}, step=step)

    def _evaluate(self) -> Evaluation:
        accelerator = self.accelerator
        batches = evaluation_batches(
            self.data.evaluation, self.config.batch_size, accelerator.process_index, accelerator.num_processes
        )
        return evaluate(self.trained, self.recipe.prepare, batches, self.num_heads, accelerator)

    def _evaluate_and_record(self, step: int) -> Evaluation:
        result = self._evaluate()
        self._track("eval", result, step)
        known = [e for e in self.record.evaluations if e["step"] < step]
        self.record.evaluations = [*known, {"step": step, **result.to_dict()}]
        if self.accelerator.is_main_process:
            self.console.print(evaluation_table(result, f"held-out windows after step {step}"))
        return result

    def _finish(self, result: TrainingResult) -> None:
        """Evaluates, and writes the result from the main process."""
        result.evaluation = self._evaluate_and_record(result.steps)
        if self.accelerator.is_main_process:
            record = {**asdict(self.record), "windows_per_step": self.plan.windows_per_step}
            save_result(result, self.recipe, self.data, record)
        self.accelerator.wait_for_everyone()
        if self.state_cache is not None:
            self.state_cache.remove()

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            self.console.print(text, highlight=False, soft_wrap=True)


@contextmanager
def caught_signals() -> Iterator[list[signal.Signals]]:
    """Collects SIGINT and SIGTERM in the list it gives; a second one has its usual effect."""
    caught: list[signal.Signals] = []
    usual: dict[int, Any] = {}

    def catch(number: int, frame: Any) -> None:
        caught.append(signal.Signals(number))
        for each, handler in usual.items():
            signal.signal(each, handler)

    try:
        usual |= {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # only the main thread may; elsewhere nothing is caught
        usual.clear()
    try:
        yield caught
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
