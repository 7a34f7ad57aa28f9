"""Training of Medusa heads: Medusa-1, Medusa-2 in two stages, Medusa-2 in one stage with self-distillation."""

from __future__ import annotations

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

from specdec.heads import MedusaHeads
from specdec.training.batches import BatchPlan, evaluation_batches, training_batches
from specdec.training.checkpoints import Checkpoints
from specdec.training.config import MedusaTrainingConfig
from specdec.training.data import TrainingData, most_frequent, self_distilled, windows_of
from specdec.training.evaluation import Counts, Evaluation, evaluate
from specdec.training.losses import IGNORED, medusa_targets
from specdec.training.progress import TrainingProgress, evaluation_table
from specdec.training.recipes import HeadsAlone, Recipe, build
from specdec.training.results import TrainingResult, save_result
from specdec.training.schedules import heads_factor, learning_rate_factor
from specdec.training.state_cache import StateCache

FIRST_STAGE_FOLDER = "first-stage"
FIRST_STAGE_LEARNING_RATE = 1e-3


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
        model, tokenizer = _load(config, accelerator)
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
        result = _Run(first, model, tokenizer, data, accelerator, console).run()
        if not result.is_complete:
            return result
        accelerator = new_accelerator(config)
        config = replace(config, initial_heads=first.output)
    return _Run(config, model, tokenizer, data, accelerator, console).run()


def new_accelerator(config: MedusaTrainingConfig) -> Accelerator:
    """Devices, processes and precision, as `accelerate launch` says where the config does not.

    Raises:
        ValueError: A tracker is not installed.
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
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        plugin = accelerator.state.deepspeed_plugin
        if plugin.zero_stage == 3:
            raise ValueError("DeepSpeed's ZeRO stage 3 cannot be used here; use stage 2, or FSDP")
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.batch_size
    return accelerator


def _load(config: MedusaTrainingConfig, accelerator: Accelerator) -> tuple[Any, Any]:
    from specdec.common.loading import load_model

    device = str(accelerator.device)
    return load_model(config.model, config.dtype, device, config.device_map, config.attn, config.trust_remote_code)


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
        tokenizer: Any,
        data: TrainingData,
        accelerator: Accelerator,
        console: Console,
    ) -> None:
        self.config, self.tokenizer, self.data, self.accelerator = config, tokenizer, data, accelerator
        self.console = console
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
            self.state_cache = self.recipe.state_cache = StateCache(Path(config.output), key, len(data.train))
        # From here on processes draw different numbers.
        set_seed(config.seed, device_specific=True)
        self.plan = BatchPlan(
            len(data.train), config.batch_size, config.accumulation, accelerator.num_processes, config.seed
        )
        self.steps = config.steps or self.plan.steps(config.epochs)
        optimizer = torch.optim.AdamW(self.recipe.parameter_groups(config), weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._learning_rate_factor)
        self.trained, self.optimizer, self.schedule = accelerator.prepare(self.recipe, optimizer, schedule)
        self.checkpoints = Checkpoints(accelerator, config, config.keep_checkpoints)
        self.record = _Record(data.digest)

    def _learning_rate_factor(self, step: int) -> float:
        assert self.config.schedule is not None
        return learning_rate_factor(self.config.schedule, step, self.steps, self.config.warmup_steps)

    def run(self) -> TrainingResult:
        """Trains from where the last checkpoint stands, to the end or a signal."""
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
        if done < self.steps:
            self._say(
                f"stopped by {signals[0].name} and saved at step {done} of {self.steps}; the same run goes on there"
            )
            result = TrainingResult(self.config, done, False, self.recipe.heads, None, stopped_by=signals[0])
        else:
            result = self._finish(done)
            if self.state_cache is not None:
                self.state_cache.remove()
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
            self._say(f"goes on from step {done} of {self.steps}")
        return done

    def _steps(self, done: int, signals: list[signal.Signals]) -> int:
        """Trains; returns how many steps are done."""
        config, process = self.config, self.accelerator.process_index
        batches = training_batches(self.data.train, self.plan, process, range(done, self.steps), config.workers)
        title = f"{config.recipe}, {self.num_heads} heads"
        self.trained.train()
        recent: list[Counts] = []
        since = time.perf_counter()
        with TrainingProgress(self.console, title, self.steps, done, self.accelerator.is_main_process) as progress:
            for step_batches in batches:
                counts, stop = self._step(done, step_batches, bool(signals))
                done += 1
                recent.append(counts)
                progress.advance(done)
                if done % config.log_every == 0 or done == self.steps:
                    elapsed, since = time.perf_counter() - since, time.perf_counter()
                    self.record.seconds += elapsed
                    self._log(done, recent, elapsed / len(recent), progress)
                    recent = []
                if config.eval_every and done % config.eval_every == 0 and done < self.steps:
                    self._evaluate_and_record(done)
                if stop:
                    break
                if done % config.save_every == 0:
                    self.checkpoints.save(done, asdict(self.record))
        return done

    def _step(self, step: int, batches: list[dict[str, Tensor]], stop: bool) -> tuple[Counts, bool]:
        """One step of the optimizer.

        Losses are means over the supervised targets of the whole step, in all processes: their number is added up
        first, so that it does not matter how windows are spread over processes and passes.

        Returns:
            This process's counts, and whether any process was asked to stop.
        """
        accelerator, config = self.accelerator, self.config
        moved = [{n: t.to(accelerator.device, non_blocking=True) for n, t in batch.items()} for batch in batches]
        targets = [medusa_targets(b["input_ids"], b["supervised"], b["segments"], self.num_heads) for b in moved]
        num_targets = torch.stack([(t != IGNORED).flatten(1).sum(1) for t in targets]).sum(0).float()
        shared = accelerator.reduce(torch.cat([num_targets, num_targets.new_full((1,), float(stop))]), reduction="sum")
        coefficients = self._coefficients(step, shared[:-1])
        total: Counts | None = None
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
            counts = Counts.of(sums, batch_targets)
            total = counts if total is None else total + counts
        assert total is not None
        return total, bool(shared[-1] > 0)

    def _coefficients(self, step: int, num_targets: Tensor) -> Tensor:
        """Factors of the summed losses: row 0 the target's own, then the heads'; `[heads + 1]`."""
        config = self.config
        assert config.heads_weight is not None and config.heads_schedule is not None
        weight = config.heads_weight * heads_factor(config.heads_schedule, step, self.steps)
        factors = [1.0, *(weight * config.head_decay**k for k in range(1, self.num_heads + 1))]
        return torch.tensor(factors, device=num_targets.device) / num_targets.clamp(min=1)

    def _log(self, step: int, recent: list[Counts], seconds_per_step: float, progress: TrainingProgress) -> None:
        total = recent[0]
        for counts in recent[1:]:
            total = total + counts
        result = total.reduced(self.accelerator).evaluated()
        progress.show(step, result, seconds_per_step)
        rates = {f"learning_rate/{i}": rate for i, rate in enumerate(self.schedule.get_last_lr())}
        self._track("train", result, step, rates | {"seconds_per_step": seconds_per_step})

    def _track(self, part: str, result: Evaluation, step: int, more: dict[str, float] | None = None) -> None:
        if not self.config.trackers:
            return
        values = {f"{part}/loss_{k}": loss for k, loss in enumerate(result.losses, 1)}
        for ranks in (1, 5):
            values |= {f"{part}/top{ranks}_{k}": share for k, share in enumerate(result.top(ranks), 1)}
        values |= {f"{part}/tokens_per_pass/{name}": tokens for name, tokens in result.tokens_per_pass.items()}
        if self.config.recipe != "medusa-1":
            values |= {f"{part}/own_loss": result.own_loss, f"{part}/divergence": result.divergence}
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

    def _finish(self, done: int) -> TrainingResult:
        result = self._evaluate_and_record(done)
        trained = TrainingResult(self.config, done, True, self.recipe.heads, result, self.record.before)
        return save_result(trained, self.recipe, self.trained, self.accelerator, self.tokenizer, self.data,
                           {**asdict(self.record), "windows_per_step": self.plan.windows_per_step})  # fmt: skip

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
