"""What was measured and learned of a model, kept in a file: a new process starts where the last one ended."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from specdec.budgeting.ledger import LEARNED, Learned
from specdec.budgeting.pass_times import TIMES, StepTimes, Surroundings
from specdec.target import unwrapped

if TYPE_CHECKING:
    from specdec.generation import Speculation

FORMAT, VERSION = "specdec profile", 5


@dataclass(frozen=True)
class Tuning:
    """What tuning measured, over all prompts.

    Args:
        tokens: Tokens generated.
        seconds: What that took.
        plain_seconds: What it took without drafts.
        passes: Target passes, counted per row.
    """

    tokens: int
    seconds: float
    plain_seconds: float
    passes: int

    @property
    def speedup(self) -> float:
        """Over drafting off."""
        return self.plain_seconds / self.seconds

    @property
    def tokens_per_pass(self) -> float:
        """Tokens per target pass and row."""
        return self.tokens / max(self.passes, 1)


def tune(fast: Any, plain: Any, prompts: Sequence[Any], max_new_tokens: int, **kwargs: Any) -> Tuning:
    """Generates for each prompt with and without drafts, in turn; see `SpeculativeModel.tune`."""
    if isinstance(prompts, str | torch.Tensor | Mapping) or not len(prompts):
        raise ValueError("prompts must be a list of prompts, not a single one and not none; put it into a list")
    tokens, passes, seconds = 0, 0, {True: 0.0, False: 0.0}
    with torch.random.fork_rng():
        for number, prompt in enumerate(prompts):
            inputs = dict(prompt) if isinstance(prompt, Mapping) else _ids(prompt, fast.device)
            for drafts in (True, False) if number % 2 else (False, True):
                runner = fast if drafts else plain
                torch.manual_seed(number)
                started = perf_counter()
                runner.generate(**inputs, max_new_tokens=max_new_tokens, **kwargs)
                seconds[drafts] += perf_counter() - started
            tokens += fast.report.num_generated_tokens
            passes += fast.report.num_row_passes
    return Tuning(tokens, seconds[True], seconds[False], passes)


def _ids(prompt: Any, device: torch.device) -> dict[str, torch.Tensor]:
    if isinstance(prompt, str):
        raise TypeError("prompts must be token ids or a tokenizer's outputs, not text; tokenize them first")
    ids = torch.as_tensor(prompt, device=device)
    ids = ids[None] if ids.ndim == 1 else ids
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def save_profile(speculation: Speculation, model: Any, path: str | os.PathLike[str], text: str) -> None:
    """Writes what is known; see `SpeculativeModel.save_profile`."""
    target, mine = unwrapped(model), _kind(speculation)
    owner = speculation.budget.owner
    body = {
        "text": text,
        "fingerprint": fingerprint(speculation, model),
        "step_times": [
            {
                "surroundings": list(at),
                "buckets": times.buckets[-1],
                "seconds": [list(pair) for pair in zip(*(known.tolist() for known in times.known()), strict=True)],
            }
            for at, times in TIMES.get(target, {}).items()
            if times.is_known or times.seconds
        ],
        "learned": [
            {
                "kind": list(kind[len(mine) :]),
                "sampled": sampled,
                "tried": known.tried.tolist(),
                "hit": known.hit.tolist(),
            }
            for (of, kind, sampled), known in LEARNED.get(target, {}).items()
            if of == owner and kind[: len(mine)] == mine
        ],
        "drafter": {} if speculation.drafter is None else speculation.drafter.state_dict(),
    }
    header = {"format": FORMAT, "version": VERSION, "sha256": _digest(body)}
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps({**header, "body": body}, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def load_profile(speculation: Speculation, model: Any, path: str | os.PathLike[str]) -> str:
    """Takes up what a file holds; see `SpeculativeModel.load_profile`."""
    body = _read(Path(path))
    theirs, mine = body["fingerprint"], fingerprint(speculation, model)
    if other := [name for name, value in mine.items() if theirs.get(name) != value]:
        told = "; ".join(f"{name} {theirs.get(name)!r} there, {mine[name]!r} here" for name in other)
        raise ValueError(f"{path} is a profile of something else: {told}. Make one for this with tune and save_profile")
    target, owner = unwrapped(model), speculation.budget.owner
    known_times = TIMES.setdefault(target, {})  # nothing else is read from the user's cache then
    for entry in body["step_times"]:
        seconds = {int(nodes): float(seconds) for nodes, seconds in entry["seconds"]}
        times = StepTimes(entry["buckets"], seconds, is_guess=False)
        rows, length, is_sampled, manner = entry["surroundings"]
        known_times[Surroundings(int(rows), int(length), bool(is_sampled), str(manner))] = times
    known_counts = LEARNED.setdefault(target, {})
    for entry in body["learned"]:
        tried, hit = (np.array(entry[name], np.float64) for name in ("tried", "hit"))
        known_counts[owner, (*_kind(speculation), *entry["kind"]), bool(entry["sampled"])] = Learned(tried, hit)
    speculation.budget.forget_times()
    if speculation.drafter is not None:
        speculation.drafter.bind(target)
        speculation.drafter.load_state_dict(body["drafter"])
    return str(body["text"])


def fingerprint(speculation: Speculation, model: Any) -> dict[str, Any]:
    """What a profile must have in common with its use: figures of another model or device are worth nothing."""
    target = unwrapped(model)
    config = {k: v for k, v in target.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    kind, settings = _kind(speculation)
    device = target.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "model": type(target).__name__,
        "config": _digest(config)[:16],
        "dtype": str(target.dtype),
        "device": f"{device.type} {name}, {torch.get_num_threads()} threads" if device.type == "cpu" else name,
        "drafter": kind.__name__,
        "settings": _digest(settings)[:16],
    }


def _kind(speculation: Speculation) -> tuple[type, str]:
    drafter = speculation.drafter
    return type(drafter), str(None if drafter is None else drafter.settings())


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    """A profile's body.

    Raises:
        ValueError: The file is no profile, of another version, cut short or changed.
    """
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged or no profile: {error}; make it anew with save_profile") from None
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise ValueError(f"{path} is not a specdec profile; give a file that save_profile has written")
    if whole.get("version") != VERSION:
        raise ValueError(f"{path} has version {whole.get('version')!r}, this program reads {VERSION}; make it anew")
    body = whole.get("body")
    if not isinstance(body, dict) or whole.get("sha256") != _digest(body):
        raise ValueError(f"{path} is damaged: its content does not match its checksum; make it anew with save_profile")
    return body
