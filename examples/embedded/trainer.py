"""The training loop of the embedded models: resumable, deterministic, on a CPU or one GPU."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from corpus import MAX_LENGTH
from muon import Muon
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES: dict[str, dict[str, int]] = {
    "target": {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 768,
    },
    "draft": {
        "hidden_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 352,
    },
    "other-draft": {
        "hidden_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 352,
    },
}
LOG_EVERY = 50
HELD_OUT_SAMPLE = 40_000
COUNTERS = ("step", "tokens", "optimizers_from", "losses", "held_out", "phases")
# What an exported model keeps of its training, in this file beside its weights.
RECORD_FILE = "training.json"
RECORD = ("step", "tokens", "held_out", "phases")
# Settings that do not touch the weights, and settings that do so only once the decay has begun.
WITHOUT_EFFECT = {"save_every", "eval_every"}
TOTALS = {"tokens", "decay_tokens"}


@dataclass
class Settings:
    """Everything that decides the weights a run ends with, next to the data and the shape."""

    tokens: int = 14_000_000
    """Training tokens in all; decides only where the decay lies."""
    decay_tokens: int = 2_500_000
    """The learning rate falls linearly to zero over this many last tokens."""
    batch: int = 16
    """Windows a step."""
    window: int = 256
    """Tokens a window."""
    muon_lr: float = 6e-3
    """Learning rate of the hidden matrices (Muon, scaled to AdamW's update size)."""
    adam_lr: float = 3e-3
    """Learning rate of the embedding and the norms (AdamW)."""
    warmup_steps: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    teacher: str | None = None
    """Exported model whose distributions are learned in place of the text's tokens; of the same tokenizer."""
    layers: int | None = None
    """Layers of the model, where they differ from its shape's."""
    answers: float = 0.0
    """Share of the windows that are drawn from the target's own answers; the others are from the text."""
    bf16: bool = False
    """Forward and backward passes in bfloat16; the weights and the optimizers stay in float32."""
    seed: int = 0
    save_every: int = 100
    """Steps between checkpoints."""
    eval_every: int = 500
    """Steps between losses on the held-out sample."""

    def scale(self, step: int, tokens: int) -> float:
        """The factor on both learning rates: warm-up, constant, linear decay."""
        decay = (self.tokens - tokens) / max(self.decay_tokens, 1)
        return max(0.0, min(1.0, (step + 1) / self.warmup_steps, decay))


@dataclass
class Run:
    """A model in training: all that a checkpoint holds."""

    model: LlamaForCausalLM
    muon: Muon
    adam: torch.optim.AdamW
    step: int = 0
    tokens: int = 0
    optimizers_from: int = 0
    """The step at which the optimizers began; the warm-up counts from there."""
    losses: list[float] = field(default_factory=list)
    """Training loss of every step since the optimizers began."""
    held_out: list[tuple[int, float]] = field(default_factory=list)
    """Tokens seen and the loss on the held-out sample then."""
    phases: list[dict[str, Any]] = field(default_factory=list)
    """The settings of each stretch of the run, with the step and the tokens at which they came to hold."""

    @classmethod
    def fresh(cls, shape: dict[str, int], vocab_size: int, settings: Settings, device: str = "cpu") -> Run:
        """A model with new weights; token 0 ends a text, token 1 pads."""
        torch.manual_seed(settings.seed)
        config = LlamaConfig(
            **shape,
            vocab_size=vocab_size,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )
        model = LlamaForCausalLM(config).to(device)
        hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
        hidden_ids = set(map(id, hidden))
        others = [p for p in model.parameters() if id(p) not in hidden_ids]
        muon = Muon(hidden, lr=settings.muon_lr, weight_decay=settings.weight_decay)
        adam = torch.optim.AdamW(others, lr=settings.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        return cls(model, muon, adam)

    def save(self, path: Path) -> None:
        state: dict[str, Any] = {name: getattr(self, name) for name in COUNTERS}
        state |= {name: getattr(self, name).state_dict() for name in ("model", "muon", "adam")}
        state |= {"config": self.model.config.to_dict(), "rng": torch.get_rng_state()}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)  # a run killed in the middle of a write keeps its previous checkpoint

    def start_from(self, exported: Path) -> None:
        """Takes weights and counters of a model that `export` wrote; the optimizers stay new.

        Layers that it does not have are put behind its own, and begin as the identity.
        """
        theirs = LlamaForCausalLM.from_pretrained(exported, dtype=torch.float32)
        self.model.load_state_dict(theirs.state_dict(), strict=False)
        for layer in self.model.model.layers[len(theirs.model.layers) :]:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                torch.nn.init.zeros_(projection.weight)
        record = json.loads((exported / RECORD_FILE).read_text())
        for name in RECORD:
            setattr(self, name, record[name])
        self.optimizers_from = self.step

    def begin_phase(self, settings: Settings, compiled: bool) -> None:
        """Records `settings`; those that leave the steps so far as they were replace the last phase's."""
        phase = {"from_step": self.step, "from_tokens": self.tokens, **asdict(settings), "compiled": compiled}
        phase["optimizers_from"] = self.optimizers_from
        if self.phases:
            last = self.phases[-1]
            changed = {name for name in phase if phase[name] != last.get(name)} - {"from_step", "from_tokens"}
            decaying = self.tokens > last["tokens"] - last["decay_tokens"]
            if changed <= WITHOUT_EFFECT or (changed <= WITHOUT_EFFECT | TOTALS and not decaying):
                phase |= {name: last[name] for name in ("from_step", "from_tokens")}
                self.phases.pop()
        self.phases.append(phase)

    def go_on_from(self, path: Path) -> None:
        """Takes everything from the checkpoint at `path`, unless this run is as far already."""
        state = torch.load(path, weights_only=True, map_location=self.model.device)
        if state["tokens"] <= self.tokens:
            return
        for name in ("model", "muon", "adam"):
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["rng"].cpu())
        for name in COUNTERS:
            setattr(self, name, state[name])

    def schedule(self, settings: Settings) -> None:
        """Sets this step's learning rates and forgets the last step's gradients."""
        scale = settings.scale(self.step - self.optimizers_from, self.tokens)
        for optimizer, rate in ((self.muon, settings.muon_lr), (self.adam, settings.adam_lr)):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
            optimizer.zero_grad(set_to_none=True)

    def update(self, loss: Tensor, settings: Settings, tokens: int) -> float:
        """Changes the weights by the loss on so many tokens; returns the loss."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.muon.step()
        self.adam.step()
        self.step += 1
        self.tokens += tokens
        return loss.item()


def draw_windows(stream: np.ndarray, step: int, settings: Settings, answers: np.ndarray | None = None) -> Tensor:
    """Draws [batch, window + 1] token ids; a function of seed and step alone, so a resumed run repeats nothing."""
    rng = np.random.default_rng((settings.seed, step))
    sources = [stream] * settings.batch
    if answers is not None:
        sources[: round(settings.answers * settings.batch)] = [answers] * round(settings.answers * settings.batch)
    starts = [rng.integers(0, len(source) - settings.window) for source in sources]
    windows = [source[s : s + settings.window + 1] for source, s in zip(sources, starts, strict=True)]
    return torch.from_numpy(np.stack(windows).astype(np.int64))


def next_token_loss(model: torch.nn.Module, windows: Tensor, bf16: bool = False) -> Tensor:
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=bf16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def divergence(model: torch.nn.Module, teacher: torch.nn.Module, windows: Tensor, bf16: bool = False) -> Tensor:
    """KL(teacher || model) in nats a token: what a draft model is judged by is whether it says what its target says."""
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=bf16):
        with torch.no_grad():
            wanted = teacher(input_ids=windows[:, :-1], use_cache=False).logits
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    log_probs = [F.log_softmax(part.float().flatten(0, 1), dim=-1) for part in (logits, wanted)]
    return F.kl_div(*log_probs, reduction="batchmean", log_target=True)


@torch.inference_mode()
def mean_loss(model: torch.nn.Module, stream: np.ndarray, window: int, most_tokens: int | None = None) -> float:
    """Mean loss in nats a token over disjoint windows of `stream`, evenly thinned to about `most_tokens`."""
    starts = list(range(0, len(stream) - window, window))
    if most_tokens is not None:
        starts = starts[:: max(1, len(starts) * window // most_tokens)]
    windows = torch.from_numpy(np.stack([stream[s : s + window + 1] for s in starts]).astype(np.int64))
    device = next(model.parameters()).device
    losses = [next_token_loss(model, chunk.to(device)).item() * len(chunk) for chunk in windows.split(8)]
    return sum(losses) / len(windows)


def train_step(
    run: Run, model: torch.nn.Module, windows: Tensor, settings: Settings, teacher: torch.nn.Module | None = None
) -> float:
    run.schedule(settings)
    if teacher is None:
        loss = next_token_loss(model, windows, settings.bf16)
    else:
        loss = divergence(model, teacher, windows, settings.bf16)
    return run.update(loss, settings, windows[:, 1:].numel())


def _teacher(folder: str, model: LlamaForCausalLM) -> torch.nn.Module:
    teacher = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    if teacher.config.vocab_size != model.config.vocab_size:
        raise ValueError(f"the teacher {folder} has another vocabulary; name a model of the same tokenizer")
    return teacher.to(model.device)


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in the list it gives, in place of ending the process."""
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda caught_now, _: caught.append(caught_now)) for number in numbers]
    try:
        yield caught
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


def run_steps(
    run: Run,
    settings: Settings,
    checkpoint: Path,
    one_step: Callable[[], float],
    evaluate: Callable[[], str],
    console: Console,
) -> bool:
    """Trains until `settings.tokens`, with checkpoints, and shows how far it is.

    Args:
        run: The model.
        settings: How far, and how often it is saved and evaluated.
        checkpoint: Its file, in a folder that bears the model's name.
        one_step: Changes the weights once and returns the loss.
        evaluate: Says in words how good the model is.
        console: Shows the progress.

    Returns:
        Whether the run is complete; False when SIGINT or SIGTERM ended it early, after saving.
    """
    plain = not console.is_terminal
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with caught_signals() as signals, Progress(*columns, console=console, disable=plain) as progress:
        bar = progress.add_task(checkpoint.parent.name, total=settings.tokens, completed=run.tokens, note="")
        started, started_at = time.perf_counter(), run.tokens
        while run.tokens < settings.tokens and not signals:
            run.losses.append(one_step())
            rate = (run.tokens - started_at) / (time.perf_counter() - started)
            note = f"loss {float(np.mean(run.losses[-LOG_EVERY:])):.3f}  {rate:,.0f} tokens/s"
            progress.update(bar, completed=run.tokens, note=note)
            if plain and run.step % LOG_EVERY == 0:
                left = (settings.tokens - run.tokens) / rate / 60
                print(f"step {run.step}  tokens {run.tokens:,}  {note}  {left:.0f} min left", flush=True)
            if run.step % settings.eval_every == 0:
                progress.console.print(f"step {run.step}: {evaluate()}", soft_wrap=True)
            if run.step % settings.save_every == 0:
                run.save(checkpoint)
        run.save(checkpoint)
    return not signals


def train(
    run: Run,
    train_stream: np.ndarray,
    held_out: np.ndarray,
    settings: Settings,
    folder: Path,
    compiled: bool = False,
    start_from: Path | None = None,
    answers: np.ndarray | None = None,
) -> bool:
    """Trains until `settings.tokens`, going on from the checkpoint in `folder` where there is one.

    With `start_from`, a folder that `export` wrote, the run goes on from there unless the checkpoint is further.

    A resumed run ends with the bits of an uninterrupted one (same machine, threads and settings).

    Returns:
        Whether the run is complete; False when SIGINT or SIGTERM ended it early, after saving.
    """
    checkpoint = folder / "checkpoint.pt"
    if start_from is not None:
        run.start_from(start_from)
    if checkpoint.exists():
        run.go_on_from(checkpoint)
    run.begin_phase(settings, compiled)
    model = torch.compile(run.model) if compiled else run.model
    teacher = _teacher(settings.teacher, run.model) if settings.teacher else None
    console = Console()

    def one_step() -> float:
        windows = draw_windows(train_stream, run.step, settings, answers).to(run.model.device)
        return train_step(run, model, windows, settings, teacher)

    def evaluate() -> str:
        run.held_out.append((run.tokens, mean_loss(run.model, held_out, settings.window, HELD_OUT_SAMPLE)))
        return f"held-out loss {run.held_out[-1][1]:.4f}"

    is_complete = run_steps(run, settings, checkpoint, one_step, evaluate, console)
    if not is_complete:
        console.print(f"{folder.name}: stopped and saved at {run.tokens:,} tokens")
        return False
    loss = mean_loss(run.model, held_out, settings.window)
    console.print(f"{folder.name}: {run.tokens:,} tokens, held-out loss {loss:.4f}, perplexity {math.exp(loss):.2f}")
    return True
