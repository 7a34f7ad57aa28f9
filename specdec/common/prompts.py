"""Chat prompts of the package's own: nine kinds of tasks, half of them held out from tuning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

SPLITS = ("heldout", "tuning")
CATEGORIES = (
    "chat",
    "explanation",
    "summary",
    "answer",
    "edit",
    "extraction",
    "translation",
    "arithmetic",
    "story",
)


@dataclass(frozen=True)
class ChatPrompt:
    """A conversation that waits for the assistant's answer.

    Args:
        id: Category and number.
        category: One of `CATEGORIES`.
        split: `"tuning"` for whatever is chosen or trained; `"heldout"` for figures.
        messages: Role and content of each turn, as chat templates take them.
    """

    id: str
    category: str
    split: str
    messages: Sequence[dict[str, str]]

    def encode(self, tokenizer: Any) -> Any:
        """Token ids and mask, `[1, tokens]` each, with the chat template."""
        return tokenizer.apply_chat_template(
            list(self.messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )


def own_prompts(split: str | None = "heldout") -> list[ChatPrompt]:
    """The package's chat prompts, category by category.

    Args:
        split: `"heldout"`, `"tuning"`, or None for both.

    Raises:
        ValueError: The split is not known.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"split={split!r} is not known; use one of {', '.join(map(repr, SPLITS))}, or None for both")
    text = files("specdec").joinpath("assets", "prompts", "chat.jsonl").read_text(encoding="utf-8")
    prompts = [ChatPrompt(**json.loads(line)) for line in text.splitlines()]
    return [prompt for prompt in prompts if split in (None, prompt.split)]
