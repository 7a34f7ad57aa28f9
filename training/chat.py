"""Conversations as tokens, and which of them the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from specdec.training.records import Record

Message = dict[str, Any]
Span = tuple[int, int]
"""Characters of a rendered conversation."""
Encoded = tuple[list[int], list[bool]]
"""Token ids, and which are supervised."""

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
    **{name: name for name in ("system", "developer")},
}
"""Names of roles in the wild."""

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THINKING = re.compile(r"<think>\s*(</think>\s*)?")
"""What some templates put after the assistant's header in a prompt only."""


class TemplateRefusedError(ValueError):
    """The chat template does not accept these turns."""


def as_messages(record: Record, field: str | None = None) -> list[Message]:
    """A record's turns in transformers' form.

    Turns of an assistant that nobody asked are left out at the beginning; ShareGPT has many of them.

    Args:
        record: With a list of turns: `role` and `content`, or `from` and `value`.
        field: Where they are; None for `messages` or `conversations`.

    Raises:
        ValueError: They are of another form, or a role is not known.
    """
    names = (field,) if field else ("messages", "conversations")
    turns = next((record.values[name] for name in names if record.values.get(name) is not None), None)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{record.where}: turns must be a list of objects with role and content, or from and value")
    messages = [_message(turn, record.where) for turn in turns]
    first = next((i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")), len(messages))
    while first < len(messages) and messages[first]["role"] == "assistant":
        del messages[first]
    return messages


def _message(turn: dict[str, Any], where: str) -> Message:
    role = turn.get("role") or turn.get("from")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise ValueError(f"{where}: a turn has the role {role!r}; known are {', '.join(ROLES)}")
    rest = {name: value for name, value in turn.items() if name not in ("role", "from", "value") and value is not None}
    if turn.get("content") is None and turn.get("value") is not None:
        rest["content"] = turn["value"]
    if "content" not in rest and not rest.get("tool_calls"):
        raise ValueError(f"{where}: a turn of {role} has no content; write it, or leave the turn out")
    return {"role": ROLES[role.lower()], **rest}


class ChatEncoder:
    """Renders conversations by a chat template, and finds what the assistant wrote.

    Args:
        tokenizer: The target's.
        template_file: File with a Jinja template, or None for the tokenizer's own.

    Raises:
        ValueError: The file cannot be read.
    """

    def __init__(self, tokenizer: Any, template_file: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.template: str | None = None
        if template_file is not None:
            try:
                self.template = Path(template_file).expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"the chat template {template_file} cannot be read ({error}); check the path"
                ) from None
        self._special = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)

    def encode(self, messages: Sequence[Message], tools: Any, where: str, *, complete: bool = True) -> list[Encoded]:
        """A conversation as tokens; only what the assistant wrote is supervised.

        The assistant's turns are those the template marks by `{% generation %}`. Without that mark they are found by
        rendering the conversation up to each of them. Where a template writes an earlier turn otherwise than the last
        one (without its reasoning, for instance), each turn becomes an example of its own, as it was when it was
        written.

        Args:
            messages: The turns.
            tools: Tools for the template, or None.
            where: Where the conversation stands, for messages.
            complete: Whether the last answer ended by itself. If not, the end token after it is not supervised.

        Raises:
            ValueError: There is no template, or the assistant's turns cannot be told apart.
            TemplateRefusedError: The template does not take these turns.
        """
        template = self._template_for(tools, where)
        if not any(message["role"] == "assistant" for message in messages):
            return []
        is_marked = bool(_GENERATION_MARK.search(template))
        turns = (
            [self._render(messages, tools, template, marked=True)]
            if is_marked
            else self._turns(messages, tools, template, where)
        )
        if not complete and turns[-1][1]:
            text, spans = turns[-1]
            turns[-1] = text, [*spans[:-1], self._without_end(text, spans[-1])]
        return [self._tokens(text, spans, where) for text, spans in turns]

    def _without_end(self, text: str, span: Span) -> Span:
        """The span without the whitespace and special tokens that end it."""
        start, end = span
        while True:
            end = start + len(text[start:end].rstrip())
            token = next((token for token in self._special if text.endswith(token, start, end)), None)
            if token is None:
                return start, end
            end -= len(token)

    def user_turn(self) -> tuple[str, str]:
        """What the template writes before and after the content of a first user turn, up to the assistant's header.

        Raises:
            ValueError: There is no template, or it changes the content of a user turn.
            TemplateRefusedError: The template does not take a lone user turn.
        """
        marker = "UserTurnGoesHere"
        text, _ = self._render([{"role": "user", "content": marker}], None, self._template_for(None, "a prompt"), True)
        before, found, after = text.partition(marker)
        if not found or marker in after:
            raise ValueError(
                "the chat template does not write a user turn exactly once, so the model cannot be let write one; "
                "give prompts of your own"
            )
        return before, after

    def prompt(self, messages: Sequence[Message], tools: Any, where: str) -> list[int]:
        """Token ids of a conversation that the assistant is to continue."""
        text, _ = self._render(messages, tools, self._template_for(tools, where), ask=True)
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _template_for(self, tools: Any, where: str) -> str:
        if self.template is not None:
            return self.template
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"{where} is a conversation, and the tokenizer has no chat template; "
                "name a Jinja file with --chat-template, or give plain text or prompts with completions"
            )
        return self.tokenizer.get_chat_template(None, tools)

    def _render(
        self, messages: Sequence[Message], tools: Any, template: str, ask: bool = False, marked: bool = False
    ) -> tuple[str, list[Span]]:
        """Text, with `ask` up to the assistant's header, and if it is `marked` the spans that the template marks."""
        try:
            rendered: Any = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                tools=tools if isinstance(tools, list) and tools else None,
                chat_template=template,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=ask,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise TemplateRefusedError(f"the chat template refuses the conversation: {error}") from error
        texts, spans = rendered
        return texts[0], list(spans[0]) if marked else []

    def _turns(
        self, messages: Sequence[Message], tools: Any, template: str, where: str
    ) -> list[tuple[str, list[Span]]]:
        """Rendered texts with the spans that the assistant wrote: one text for all turns if possible."""
        full, _ = self._render(messages, tools, template)
        turns = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self._render(messages[:i], tools, template, ask=True)
            through, _ = self._render(messages[: i + 1], tools, template)
            turns.append((through, self._span(before, through, where)))
        if all(full.startswith(text) for text, _ in turns):
            return [(full, [span for _, span in turns])]
        return [(text, [span]) for text, span in turns]

    def _span(self, before: str, through: str, where: str) -> Span:
        """What the assistant's turn adds to the prompt for it, up to the token that ends the turn.

        Raises:
            ValueError: The prompt is not how the text through the turn begins.
        """
        start = len(before)
        if not through.startswith(before):
            thinking = [match.start() for match in _THINKING.finditer(before) if match.end() == len(before)]
            if not thinking or not through.startswith(before[: thinking[-1]]):
                raise ValueError(
                    f"{where}: the chat template writes a prompt that is not how the answered conversation begins, "
                    "so the assistant's part cannot be told; mark it by {% generation %} in a template of your own "
                    "(--chat-template)"
                )
            start = thinking[-1]
        end = len(through.rstrip())
        ends_turn = any(through.endswith(token, start, end) for token in self._special)
        return start, end if ends_turn else len(through)

    def _tokens(self, text: str, spans: Sequence[Span], where: str) -> Encoded:
        """Tokens that begin within a span are supervised."""
        if not self.tokenizer.is_fast:
            return self._tokens_piecewise(text, spans, where)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        return ids, [any(first <= start < end for first, end in spans) for start, _ in offsets]

    def _tokens_piecewise(self, text: str, spans: Sequence[Span], where: str) -> Encoded:
        """The same for a tokenizer without offsets: by the lengths of encoded beginnings."""
        ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        flags = [False] * len(ids)
        for start, end in spans:
            places = []
            for cut in (start, end):
                beginning = list(self.tokenizer(text[:cut], add_special_tokens=False).input_ids)
                if ids[: len(beginning)] != beginning:
                    raise ValueError(
                        f"{where}: the tokenizer does not tell where its tokens stand, and joins some across the edge "
                        "of a turn; use a fast tokenizer, or prompts with completions"
                    )
                places.append(len(beginning))
            flags[slice(*places)] = [True] * (places[1] - places[0])
        return ids, flags
