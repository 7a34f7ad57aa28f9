"""A text that grows by generating, feeding, scoring and rolling back, on one live kv cache."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from specdec.compat import CACHE, DummyLayer, has_default_cache
from specdec.report import SpeculationReport
from specdec.target import CausalLM, accepts, input_device

Tokens: TypeAlias = Tensor | Sequence[Any]
"""Token ids: of one row, or one sequence per row."""


class Session:
    """The text of one or several rows, and the model's kv cache of it; see `SpeculativeModel.session`.

    The cache holds what the model has read. What of it is a prefix of the present text is used, the rest is dropped or
    overwritten when the model reads next: `feed` and `rollback` change the text alone and cost nothing by themselves.
    Rows may have different lengths. Where a cache cannot be cut back (recurrent layers, full windows), the text is read
    again from the last point that is known, or from its beginning.

    Args:
        model: The target.
        generate: `model.generate`, or what stands in for it.
        last_report: Returns the report of the last call of `generate`; None for none.
        input_ids: The prompts, left-padded, `[batch, prompt]`; for one row also a plain list.
        attention_mask: Zero at padding, `[batch, prompt]`; None where there is none.
        cache: A cache that holds the beginning of the only row; None for an empty one.
        report: Takes the counts of all calls; None for a new one.
        kwargs: Arguments of every call of `generate`.
    """

    def __init__(
        self,
        model: CausalLM,
        generate: Callable[..., Any],
        last_report: Callable[[], SpeculationReport | None],
        input_ids: Tokens,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        report: SpeculationReport | None = None,
        **kwargs: Any,
    ) -> None:
        for name in ("num_beams", "num_return_sequences"):
            if (kwargs.get(name) or 1) > 1:
                raise ValueError(f"{name}={kwargs[name]}: a session keeps one text per row; leave {name} out")
        if getattr(model.config, "is_encoder_decoder", False):
            raise ValueError(f"{type(model).__name__} is an encoder-decoder; a session needs a causal LM")
        self.model, self.kwargs = model, kwargs
        self.report = SpeculationReport() if report is None else report
        self.output: Any = None
        """What the last `generate` of the model returned."""
        self._generate, self._last_report = generate, last_report
        self._text = _rows_of(input_ids, None, attention_mask)
        if not all(self._text):
            raise ValueError("input_ids have a row without tokens; a session needs at least one token per row")
        self._is_open = True
        self._keeps_cache = cache is not None or has_default_cache(model)
        self._cache: Cache | None = cache
        self._cached: list[list[int]] = [[] for _ in self._text]
        self._starts = [0] * len(self._text)
        self._checkpoint: tuple[int, list[Any]] = 0, []
        if cache is None:
            self._forget()
        else:
            self._note(self._text, [0], cache.get_seq_length())

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the cache. The text and the report stay."""
        self._is_open, self._cache = False, None

    @property
    def tokens(self) -> list[list[int]]:
        """The present text, per row, without padding."""
        return [list(row) for row in self._text]

    # --- growing and cutting the text ---

    def generate(self, max_new_tokens: int | None = None, stop: Any = None, **kwargs: Any) -> Tensor:
        """Continues the text, with the same tokens as `model.generate` on the whole text.

        Args:
            max_new_tokens: Tokens at most.
            stop: A string or strings, which need `tokenizer=...` among the session's arguments; a `StoppingCriteria`;
                or a function of `(input_ids, scores)` that returns a bool. A batch speculates with strings only.
            kwargs: Other arguments of `generate`, in place of the session's.

        Returns:
            The new tokens, `[batch, new]`, shorter rows padded on the right.
        """
        call = self.kwargs | kwargs | ({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens})
        call |= self._stopping(stop, call)
        ids, mask = self._inputs()
        self._keep_checkpoint()
        if self._keeps_cache:
            call[CACHE] = self._cache
        width, starts = ids.shape[1], [ids.shape[1] - len(row) for row in self._text]
        self.output = self._generate(input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **call)
        sequences: Tensor = self.output.sequences
        if (report := self._last_report()) is not None:
            self.report.add(report)
        rows = [row[start:] for row, start in zip(sequences.tolist(), starts, strict=True)]
        self._note(rows, starts, sequences.shape[1] - 1)
        for i, new in enumerate(sequences[:, width:].tolist()):
            self._text[i] += self._ended(new, call, stop is not None)
        return sequences[:, width:]

    def feed(self, tokens: Tokens) -> None:
        """Appends tokens to the text. They are read with the next pass.

        Args:
            tokens: For one row a list or a tensor of ids; else one per row.
        """
        for row, new in zip(self._text, self._checked(tokens), strict=True):
            row += new

    def rollback(self, count: int | Sequence[int]) -> None:
        """Drops the last tokens of the text.

        Args:
            count: How many; one for all rows, or one per row.
        """
        counts = [count] * len(self._text) if isinstance(count, int) else list(count)
        for row, n in zip(self._text, counts, strict=True):
            if not 0 <= n < len(row):
                raise ValueError(f"rollback({count}): a row of {len(row)} tokens can lose 0 to {len(row) - 1}")
        self._text = [row[: len(row) - n] for row, n in zip(self._text, counts, strict=True)]

    def replace(self, tokens: Tokens) -> None:
        """Puts another text in place of the present one; what they begin with in common is not read again."""
        rows = self._checked(tokens)
        if not all(rows):
            raise ValueError("replace(): a row is empty; a session needs at least one token per row")
        self._text = rows

    # --- looking ahead ---

    def score(self, tokens: Tokens, keep: bool = False) -> Any:
        """Log-probabilities of given tokens behind the present text, in one pass.

        Args:
            tokens: As for `feed`; rows may have different numbers of tokens.
            keep: Append the tokens to the text.

        Returns:
            The model's own log-probability of each token, before any logits processor, float32: a tensor per row, or
            one tensor for tokens that came as one row.
        """
        rows = self._checked(tokens)
        found = [
            logits[:-1].float().log_softmax(-1).gather(1, torch.tensor([row], device=logits.device).long().T)[:, 0]
            for logits, row in zip(self.logits(rows), rows, strict=True)
        ]
        if keep:
            self.feed(rows)
        return found[0] if _is_flat(tokens) else found

    @torch.no_grad()
    def cache(self) -> Cache | None:
        """The kv cache, made to hold the text but for its last token, as `generate` would leave it."""
        if any(len(row) > 1 + len(held) for row, held in zip(self._text, self._cached, strict=True)):
            self.logits([[]] * len(self._text))
        self._inputs()
        return self._cache

    @torch.no_grad()
    def logits(self, tokens: Tokens) -> list[Tensor]:
        """The model's logits behind the present text and behind each of the given tokens, in one pass.

        The tokens do not become part of the text; if they are fed next, they are not read again.

        Args:
            tokens: As for `feed`; no tokens at all for the logits behind the text alone.

        Returns:
            Per row `[tokens + 1, vocab]`.
        """
        rows = self._checked(tokens)
        ids, mask = self._inputs()
        self._keep_checkpoint()
        longest = max(map(len, rows))
        past = self._cache.get_seq_length() if self._cache is not None else 0
        more = ids.new_zeros((len(rows), longest))
        for i, row in enumerate(rows):
            more[i, : len(row)] = ids.new_tensor(row)
        given: dict[str, Any] = {
            "attention_mask": torch.cat([mask, mask.new_ones(more.shape)], 1),
            "logits_to_keep": longest + 1,
            CACHE: self._cache,
        }
        if not bool(mask.all()):  # positions behind a shorter row's last token are not looked at, but must exist
            ends = torch.tensor([[len(text) + len(row)] for text, row in zip(self._text, rows, strict=True)])
            positions = given["attention_mask"].cumsum(1).clamp(min=1).minimum(ends.to(mask.device)) - 1
            given["position_ids"] = positions[:, past:]
        given = {name: value for name, value in given.items() if accepts(self.model, name)}
        inputs = torch.cat([ids, more], 1)
        with self.report.timed("target"):
            self.report.count_pass([0] * len(rows))
            output = self.model(input_ids=inputs[:, past:], use_cache=self._keeps_cache, return_dict=True, **given)
        starts = [ids.shape[1] - len(text) for text in self._text]
        self._note([row[start:] for row, start in zip(inputs.tolist(), starts, strict=True)], starts, inputs.shape[1])
        behind: Tensor = output.logits[:, -longest - 1 :]
        return [behind[i, : len(row) + 1] for i, row in enumerate(rows)]

    # --- the cache ---

    def _inputs(self) -> tuple[Tensor, Tensor]:
        """The text, left-padded, and its mask, `[batch, width]` each; the cache is made a beginning of it."""
        if not self._is_open:
            raise ValueError("the session is closed; use it inside its `with` block")
        width = max(map(len, self._text))
        starts = [width - len(row) for row in self._text]
        kept = [min(_common(old, new), len(new) - 1) for old, new in zip(self._cached, self._text, strict=True)]
        self._cut(starts, max(0, min(start + count for start, count in zip(starts, kept, strict=True))))
        device, pad = input_device(self.model), _first(self._setting("pad_token_id"))
        ids = torch.tensor([[pad] * start + row for start, row in zip(starts, self._text, strict=True)], device=device)
        places = torch.arange(width, device=device)
        return ids, (places >= torch.tensor(starts, device=device)[:, None]).long()

    def _cut(self, starts: list[int], past: int) -> None:
        """Leaves so many slots in the cache, each row beginning at its slot in `starts`."""
        if self._cache is None or self._cache.get_seq_length() == 0:
            return
        layers = [layer for layer in self._cache.layers if not isinstance(layer, DummyLayer)]
        more = self._cache.get_seq_length() - past
        if starts == self._starts and more == 0:
            return
        if past and starts != self._starts and all(type(layer) is DynamicLayer for layer in layers):
            self._shift(layers, starts, past)
        elif past and starts == self._starts and all(map(_can_crop, layers)):
            self._cache.crop(-more)
        elif starts == self._starts and 0 < self._checkpoint[0] <= past:
            self._cache.layers = [copy.copy(layer) for layer in self._checkpoint[1]]
        else:
            self._forget()
        self._starts = starts

    def _shift(self, layers: list[Any], starts: list[int], past: int) -> None:
        """Moves every row to its new first slot."""
        by = torch.tensor([new - old for new, old in zip(starts, self._starts, strict=True)])
        for layer in layers:
            for name in ("keys", "values"):
                states: Tensor = getattr(layer, name)
                source = (torch.arange(past) - by[:, None]).clamp(0, states.shape[2] - 1).to(states.device)
                index = source[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
                setattr(layer, name, states.gather(2, index))

    def _keep_checkpoint(self) -> None:
        """Remembers the cache as it is, where it could not be cut back: its tensors are replaced, not written to."""
        self._checkpoint = 0, []
        layers = [] if self._cache is None else self._cache.layers
        if all(isinstance(layer, DummyLayer) or type(layer) is DynamicLayer for layer in layers):
            return
        if all(isinstance(layer, DummyLayer | DynamicLayer) and not hasattr(layer, "conv_states") for layer in layers):
            assert self._cache is not None
            self._checkpoint = self._cache.get_seq_length(), [copy.copy(layer) for layer in layers]

    def _note(self, rows: list[list[int]], starts: list[int], slots: int) -> None:
        """Remembers what is in the cache now: so many slots, in which rows begin at `starts`."""
        if self._cache is None:
            return
        if self._cache.get_seq_length() != slots:  # the model keeps no such cache, or not this one
            self._forget()
            return
        self._cached = [row[: slots - start] for row, start in zip(rows, starts, strict=True)]
        self._starts = starts

    def _forget(self) -> None:
        """Starts anew with an empty cache."""
        self._cache = DynamicCache(config=self.model.config) if self._keeps_cache else None
        self._cached = [[] for _ in self._text]
        self._checkpoint = 0, []

    # --- arguments ---

    def _checked(self, tokens: Tokens) -> list[list[int]]:
        return _rows_of(tokens, len(self._text))

    def _setting(self, name: str, call: dict[str, Any] | None = None) -> Any:
        """A setting of `generate`, wherever it was made."""
        kwargs = self.kwargs if call is None else call
        if name in kwargs:
            return kwargs[name]
        configs = kwargs.get("generation_config"), self.model.generation_config
        return next((value for of in configs if (value := getattr(of, name, None)) is not None), None)

    def _stopping(self, stop: Any, call: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `generate` that end the text at `stop`."""
        if stop is None:
            return {}
        strings = [stop] if isinstance(stop, str) else stop
        if isinstance(strings, Sequence) and all(isinstance(part, str) for part in strings):
            if call.get("tokenizer") is None:
                raise ValueError(f"stop={stop!r} is text, which needs tokenizer=..., an argument of session()")
            return {"stop_strings": list(strings)}
        if not callable(stop):
            raise TypeError(f"stop={stop!r:.200} must be a string, a list of strings, a StoppingCriteria or a function")
        criterion = stop if isinstance(stop, StoppingCriteria) else _Called(stop)
        return {"stopping_criteria": StoppingCriteriaList([*(call.get("stopping_criteria") or []), criterion])}

    def _ended(self, new: list[int], call: dict[str, Any], may_stop: bool) -> list[int]:
        """A row's new tokens without the padding of a batch behind its end."""
        if len(self._text) == 1:
            return new
        eos = self._setting("eos_token_id", call)
        ends = set(eos if isinstance(eos, list | tuple) else [eos])
        end = next((at + 1 for at, token in enumerate(new) if token in ends), len(new))
        pad = self._setting("pad_token_id", call)
        while may_stop and end == len(new) and end and new[-1] == pad:
            new, end = new[:-1], end - 1
        return new[:end]


class _Called(StoppingCriteria):
    """Ends rows by a function that returns one bool, or one per row."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        is_done = torch.as_tensor(self.function(input_ids, scores), device=input_ids.device)
        return is_done.expand(len(input_ids))


def _is_flat(tokens: Tokens) -> bool:
    """Whether tokens came as one row."""
    return tokens.ndim == 1 if isinstance(tokens, Tensor) else not any(isinstance(t, Sequence | Tensor) for t in tokens)


def _rows_of(tokens: Tokens, count: int | None, mask: Tensor | None = None) -> list[list[int]]:
    """One list of ids per row.

    Args:
        tokens: As a user gives them.
        count: Rows of the session; None where they are to be found out.
        mask: Zero at padding.
    """
    rows: list[Any] = (
        tokens.tolist()
        if isinstance(tokens, Tensor)
        else [row.tolist() if isinstance(row, Tensor) else row for row in tokens]
    )
    if _is_flat(tokens):
        rows = [rows]
    if count is not None and len(rows) != count:
        raise ValueError(f"tokens of {len(rows)} rows were given to a session of {count}; give one sequence per row")
    if mask is not None:
        rows = [[t for t, m in zip(row, keep, strict=True) if m] for row, keep in zip(rows, mask.tolist(), strict=True)]
    return [[int(token) for token in row] for row in rows]


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two rows share from the first on."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _can_crop(layer: Any) -> bool:
    """Whether a layer can be cut back to what it was some tokens ago."""
    if not isinstance(layer, DynamicLayer) or hasattr(layer, "conv_states"):
        return False
    window: float = getattr(layer, "sliding_window", None) or math.inf
    return layer.get_seq_length() < window


def _first(value: Any) -> int:
    """A token id out of one, several or none."""
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    return 0 if value is None else int(value)
