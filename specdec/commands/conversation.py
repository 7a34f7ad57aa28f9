"""A conversation with a chat model: its turns, its cache, and its answers on the screen."""

from __future__ import annotations

import time
from typing import Any

import torch
import typer
from torch import Tensor
from transformers.generation import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from specdec.session import Session


class Conversation:
    """Turns, and the cache of those so far.

    Args:
        fast: From `specdec.accelerate`.
        tokenizer: With a chat template.
        system: The system's turn; None for the template's own.
        show_drafts: Whether to colour drafted tokens.
    """

    def __init__(self, fast: Any, tokenizer: Any, system: str | None = None, show_drafts: bool = False) -> None:
        self.fast, self.tokenizer, self.show_drafts = fast, tokenizer, show_drafts
        self.start = [{"role": "system", "content": system}] if system else []
        self.stopping = _Stopping()
        self.reset()

    def reset(self) -> None:
        """Forgets all turns."""
        self.turns = list(self.start)
        self.session: Session | None = None

    def stop(self) -> None:
        """Ends the answer that is being written."""
        self.stopping.is_asked_for = True

    def ask(self, question: str, **kwargs: Any) -> str:
        """Prints the answer as it comes; returns its figures in words.

        Args:
            question: The user's turn.
            kwargs: Of `generate`.
        """
        turns = [*self.turns, {"role": "user", "content": question}]
        prompt: list[int] = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=True
        ).input_ids
        limit = getattr(self.fast.model.config, "max_position_embeddings", None)
        if limit is not None and len(prompt) >= limit:
            return f"[{len(prompt)} tokens so far, and the model takes {limit}; /reset starts a new conversation]"
        if self.session is None:
            self.session = self.fast.session(prompt)
        self.session.replace(prompt)  # a template may render earlier turns otherwise
        self.stopping.is_asked_for = False
        printer = _Printer(self.fast, self.tokenizer, self.show_drafts)
        start = time.perf_counter()
        new = self.session.generate(stop=self.stopping, streamer=printer, trace=self.show_drafts, **kwargs)[0]
        seconds = time.perf_counter() - start
        answer = self.tokenizer.decode(new, skip_special_tokens=True)
        self.turns = [*turns, {"role": "assistant", "content": answer}]
        report = self.fast.report
        stopped = "stopped; " if self.stopping.is_asked_for else ""
        passes = f", {report.tokens_per_pass:.2f} per pass" if report.fallback is None else ""
        return f"[{stopped}{len(new)} tokens, {len(new) / seconds:.1f} tokens/s{passes}]"


class _Stopping(StoppingCriteria):
    """Ends a call when it is asked to."""

    def __init__(self) -> None:
        self.is_asked_for = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.is_asked_for, device=input_ids.device)


class _Printer(BaseStreamer):
    """Prints text as soon as it is whole, drafted tokens in colour if asked for."""

    def __init__(self, fast: Any, tokenizer: Any, show_drafts: bool) -> None:
        self.fast, self.tokenizer, self.show_drafts = fast, tokenizer, show_drafts
        self.is_prompt = True
        self.tokens: list[int] = []
        self.shown = ""

    def put(self, value: Tensor) -> None:
        if self.is_prompt:
            self.is_prompt = False
            return
        self.tokens += value.flatten().tolist()
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if text.startswith(self.shown) and not text.endswith("\ufffd"):
            self._print(text[len(self.shown) :])
            self.shown = text

    def end(self) -> None:
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        self._print(text[len(self.shown) :] + "\n")

    def _print(self, text: str) -> None:
        drafted = self.show_drafts and text.strip() and self._is_drafted()
        typer.echo(typer.style(text, fg="green", bold=True) if drafted else text, nl=False)

    def _is_drafted(self) -> bool:
        """Whether the last token had been drafted; its pass is in the trace before it is streamed."""
        trace = self.fast.report.trace
        sources = [source for made in trace.passes for source in made.sources_by_token] if trace is not None else []
        return len(self.tokens) <= len(sources) and bool(sources[len(self.tokens) - 1])
