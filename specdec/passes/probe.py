"""What the probe runs: a tiny tree, the same paths one token at a time, and the model's own rounding noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

from specdec.compat import CACHE, next_inputs, prefill
from specdec.passes.chain_target import ChainTarget
from specdec.passes.tolerance import allowed, distance, floor_of
from specdec.target import CausalLM, TargetModel, accepts
from specdec.tree import TokenTree

PROMPT = 9
PADDING = 3
VARIANTS = 5
"""Copies of both prompts in the probe's batch. Each copy shows other tokens, or keeps another path."""
FIRST_PARENTS = (-1, 0, 0, 2, 1)
SECOND_PARENTS = (-1, 0, 0)
LARGEST_NOISE = {torch.float64: 1e-4, torch.float32: 1e-2}
"""Largest noise that is believed, in standard deviations; `LARGEST_HALF_NOISE` for other types."""
LARGEST_HALF_NOISE = 0.15
DOUBTFUL = 0.8, 2.0
"""Runs the probe on a second prompt where a difference is between these multiples of what is allowed."""

OUT_OF_MEMORY = ("out of memory", "allocate memory", "alloc_failed")
"""Parts of the messages of torch's own errors, in lower case; on a CPU and in cuBLAS they are plain `RuntimeError`s."""


class NotRolledBackError(NotImplementedError):
    """The model's cache holds states that cannot be rolled back."""


def prompts_of(vocab: int, seed: int) -> tuple[Tensor, Tensor]:
    """The probe's batch and its mask: two prompts, the second one padded on the left, in `VARIANTS` copies.

    Returns:
        Token ids and mask, `[2 * VARIANTS, PROMPT]`; copy `v` of prompt `p` is row `2 * v + p`.
    """
    rows = [[11 + 7 * i + 31 * seed for i in range(PROMPT)], [13 + 5 * i + 29 * seed for i in range(PROMPT)]]
    ids = torch.tensor(rows * VARIANTS) % vocab
    mask = torch.ones_like(ids)
    mask[1::2, :PADDING] = 0
    return ids, mask


@dataclass
class Trial:
    """The probe's prompts as `generate` prepared them, and what is right for them.

    Args:
        model: The target.
        input_ids: `[2 * VARIANTS, PROMPT]`.
        generation_config: As prepared.
        model_kwargs: As prepared.
        seed: Of the tokens.
    """

    model: CausalLM
    input_ids: Tensor
    generation_config: GenerationConfig
    model_kwargs: dict[str, Any]
    seed: int = 0
    largest: float = field(init=False)
    """The largest difference of what was compared since `begin`."""
    is_doubtful: bool = field(init=False)
    """Whether some difference since `begin` was close to what is allowed."""
    reference: Tensor = field(init=False)
    """Logits of plain decoding along `paths`: `[paths, prompts, depth, vocab]`."""

    def __post_init__(self) -> None:
        vocab = self.model.config.get_text_config(decoder=True).vocab_size
        # r is the root, a to d are the first tree's nodes, x to z the second one's; the last two stand in for others.
        r, a, b, c, d, x, y, z, v, w = ((17 + 9 * i + 37 * self.seed) % vocab for i in range(10))
        self.first = [[r, a, b, c, d], [r, v, b, c, w], [r, a, v, w, d], [r, a, b, c, d], [r, a, b, c, d]]
        self.second = [[x, y, z], [x, y, w], [x, y, z], [x, y, z], [v, y, z]]
        self.paths = [[r, b, c], [r, a, d], [r, b, x], [r, x, y], [r, x, z]]
        self.spread = 1.0
        self.begin()

    def begin(self) -> None:
        """Starts the comparisons of one way to run the model."""
        self.largest, self.is_doubtful = 0.0, False

    def fresh_kwargs(self) -> dict[str, Any]:
        """The call's arguments with an empty cache."""
        config = self.model.config.get_text_config(decoder=True)
        return {**self.model_kwargs, CACHE: DynamicCache(config=config)}

    def run_reference(self) -> None:
        """Runs the paths as plain decoding would: one token at a time."""
        logits = self._plain(self._tokens())  # [paths * prompts, depth, V]
        self.spread = max(float(logits[logits.isfinite()].std()), 1e-12)
        self.reference = logits.view(len(self.paths), 2, *logits.shape[1:])

    def depends_on_batch(self) -> bool:
        """Whether a row's logits change with the tokens of other rows, as where a whole pass is quantised by one scale.

        The shapes are the same in both passes, so that without such a scale the bits are the same, or nearly so.
        """
        ids = self.input_ids.clone()
        ids[1:] = (ids[1:] + 1) % self.model.config.get_text_config(decoder=True).vocab_size
        first, second = (
            prefill(self.model, given, self.generation_config, self.fresh_kwargs()).logits[:1, -1].float()
            for given in (self.input_ids, ids)
        )
        return not torch.equal(first, second) and distance(second, first) > floor_of(self.model.dtype)

    def _tokens(self) -> Tensor:
        """The paths, one per row of the batch, `[paths * prompts, depth]`."""
        return torch.tensor(self.paths, device=self.input_ids.device).repeat_interleave(2, dim=0)

    def _plain(self, tokens: Tensor) -> Tensor:
        kwargs = self.fresh_kwargs()
        ids = self.input_ids
        outputs = prefill(self.model, ids, self.generation_config, kwargs)
        steps = []
        for column in tokens.split(1, dim=1):
            ids = torch.cat([ids, column], dim=1)
            kwargs, inputs = next_inputs(self.model, ids, outputs, kwargs)
            outputs = self.model(**inputs, return_dict=True)
            steps.append(outputs.logits[:, -1].float())
        return torch.stack(steps, dim=1)

    @cached_property
    def noise(self) -> float:
        """How far the model's own prefill is from its own passes over one token, in standard deviations.

        One more pass, over prompts and paths, only run where a difference exceeds the floor. 0 where the model takes no
        such pass.
        """
        tokens, logits = self._tokens(), self.reference.flatten(0, 1)
        depth = tokens.shape[1]
        inputs: dict[str, Any] = {"input_ids": torch.cat([self.input_ids, tokens], dim=1), "return_dict": True}
        mask = self.model_kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            inputs["attention_mask"] = torch.nn.functional.pad(mask, (0, depth), value=1)
        positions = self.model_kwargs.get("position_ids")
        if positions is not None:
            more = positions[..., -1:] + torch.arange(1, depth + 1, device=positions.device)
            inputs["position_ids"] = torch.cat([positions, more], dim=-1)
        inputs |= {"use_cache": False} if accepts(self.model, "use_cache") else {}
        inputs |= {"logits_to_keep": depth} if accepts(self.model, "logits_to_keep") else {}
        try:
            mine = self.model(**inputs).logits[:, -depth:]
        except (ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError, IndexError) as error:
            if is_passing(error):
                raise
            return 0.0
        found = distance(mine.float(), logits)
        # Where the prefill is another function than the steps, the difference says nothing of rounding.
        return found if found <= LARGEST_NOISE.get(self.model.dtype, LARGEST_HALF_NOISE) else 0.0

    def is_rounding(self, difference: float, factor: float = 1.0) -> bool:
        """Whether a difference, in standard deviations, is within `factor` times what rounding may do."""
        dtype = self.model.dtype
        return difference <= factor * floor_of(dtype) or difference <= factor * allowed(dtype, self.noise)

    def is_off(self, mine: Tensor, reference: Tensor) -> bool:
        """Whether logits differ by more than rounding."""
        difference = distance(mine.float(), reference.float())
        self.largest = max(self.largest, difference)
        least, most = DOUBTFUL
        self.is_doubtful |= self.is_rounding(difference, most) and not self.is_rounding(difference, least)
        return not self.is_rounding(difference)

    def tree(self, rows: list[list[int]], parents: tuple[int, ...]) -> TokenTree:
        """One tree per row of the batch."""
        doubled = [row for row in rows for _ in range(2)]
        return TokenTree.from_rows(doubled, [list(parents)] * len(doubled)).to(self.input_ids.device)


Check = tuple[str, bool]
"""What was looked at, and whether it is wrong."""


def first_problem(checks: Callable[[], Iterator[Check]]) -> str | None:
    """The first check that fails, or the error that ended them; None if all is right.

    Raises:
        Exception: One that may pass, such as a lack of memory.
    """
    try:
        for what, is_wrong in checks():
            if is_wrong:
                return what
    except Exception as error:
        if is_passing(error):
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def is_passing(error: BaseException) -> bool:
    """Whether an error says nothing about the model, and may not happen again."""
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(part in text for part in OUT_OF_MEMORY)


def branching(target: TargetModel, trial: Trial) -> Iterator[Check]:
    """Shows a branching tree, keeps other paths in different rows, and shows a second tree behind them."""
    target.prefill(trial.input_ids)
    logits = target.forward(trial.tree(trial.first, FIRST_PARENTS))
    rows = logits.view(VARIANTS, 2, *logits.shape[1:])  # [variant, prompt, node, V]
    paths = trial.reference
    for nodes, path in (([0, 2, 3], 0), ([0, 1, 4], 1)):
        yield "a tree's logits differ from plain decoding's", trial.is_off(rows[0][:, nodes], paths[path])
    # Variant 1 has other tokens at nodes 1 and 4, variant 2 at nodes 2 and 3.
    for variant, same, other in ((1, [0, 2, 3], 4), (2, [0, 1, 4], 3)):
        yield "a node's logits depend on tokens that are not before it", _moved(trial, rows[variant], rows[0], same)
        yield "a node's logits do not depend on the tokens before it", _kept(trial, rows[variant], rows[0], other)
    kept: list[list[int]] = [[0, 2], [0], [0, 1], [0], [0, 2]]
    target.commit([path for path in kept for _ in range(2)])
    logits = target.forward(trial.tree(trial.second, SECOND_PARENTS))
    rows = logits.view(VARIANTS, 2, *logits.shape[1:])
    yield "logits after a commit differ from plain decoding's", trial.is_off(rows[0][:, 0], paths[2][:, 2])
    for node, path in ((1, 3), (2, 4)):
        is_off = trial.is_off(rows[3][:, [0, node]], paths[path][:, 1:])
        yield "logits after a rollback differ from plain decoding's", is_off
    # Variants 1 and 3 keep the same path; other tokens were rejected there, and node 2 is another one.
    yield "logits depend on rejected draft tokens", _moved(trial, rows[1], rows[3], [0, 1])
    yield "a node's logits do not depend on its root", _kept(trial, rows[4], rows[0], 1)


def _moved(trial: Trial, mine: Tensor, other: Tensor, nodes: list[int]) -> bool:
    """Whether nodes that see the same tokens have other logits.

    Rows of one pass usually have the same bits. Kernels that group tokens (of experts, for one) may round differently
    for each; then the difference must be well within the model's noise.
    """
    mine, other = mine[:, nodes], other[:, nodes]
    return not torch.equal(mine, other) and not trial.is_rounding(distance(mine.float(), other.float()), 0.5)


def _kept(trial: Trial, mine: Tensor, other: Tensor, node: int) -> bool:
    """Whether a node whose ancestor has changed has the logits of before."""
    return torch.equal(mine[:, node], other[:, node])


def chain(target: ChainTarget, trial: Trial) -> Iterator[Check]:
    """Shows a chain, rolls it back but for the root, and shows another one."""
    target.prefill(trial.input_ids)
    past = target.past
    if past is None or not past.is_croppable:
        raise NotRolledBackError("its cache holds states that cannot be rolled back")
    first = [[row[0], row[2], row[3]] for row in trial.first]
    logits = target.forward(trial.tree(first, (-1, 0, 1)))
    rows = logits.view(VARIANTS, 2, *logits.shape[1:])
    yield "a chain's logits differ from plain decoding's", trial.is_off(rows[0], trial.reference[0])
    # Variant 2 has other tokens behind the root, which are then rejected; variant 4 has another second chain.
    yield "a token's logits depend on tokens behind it", _moved(trial, rows[2], rows[0], [0])
    target.commit([[0]] * len(trial.input_ids))
    second = [row[:2] for row in trial.second]
    logits = target.forward(trial.tree(second, (-1, 0)))
    rows = logits.view(VARIANTS, 2, *logits.shape[1:])
    yield "logits after a rollback differ from plain decoding's", trial.is_off(rows[0], trial.reference[3][:, 1:])
    yield "logits depend on rejected draft tokens", _moved(trial, rows[2], rows[0], [0, 1])
    yield "a token's logits do not depend on the tokens before it", _kept(trial, rows[4], rows[0], 1)
