"""Every causal-LM architecture of transformers: the same tokens as its own `generate`, in trees wherever possible."""

from __future__ import annotations

import gc
import random
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

import specdec
from specdec.budget import Budget
from specdec.drafters.base import DraftContext, Drafter
from specdec.passes.capability import MODES
from specdec.tree import TokenTree
from tests.architectures import NAMES, VOCAB, tiny_config, tiny_model

NEW_TOKENS = 24
SECONDS_EACH = 20
Report = Callable[[str, object], None]
LONGER_WINDOW = 16
"""As far as the probe sees, and less than what is generated."""
MIN_IDENTICAL = 100
PROMPTS = (14, 9, 11)
"""Prompt lengths of the batch, longest first: beyond the windows of the tiny models, one of them only just."""

ENDS = list(range(3, 11))
"""End-of-sequence ids: so many that the rows of a sampled batch end one after another."""


@dataclass
class PartlyRightDrafter(Drafter):
    """Knows what the target will say and mixes it with wrong siblings; every fourth tree is random throughout.

    Args:
        truth: Per row of the batch the tokens to come.
        seed: Of its own generator, so that the global one stays untouched.
    """

    truth: list[list[int]]
    seed: int = 0
    name = "partly-right"

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        rows = [self._row(context, i, max_nodes) for i in range(len(context.rows))]
        return TokenTree.from_rows([tokens for tokens, _ in rows], [parents for _, parents in rows])

    def _row(self, context: DraftContext, i: int, max_nodes: int) -> tuple[list[int], list[int]]:
        ids = context.sequences[i]
        future = self.truth[context.rows[i]][len(ids) - context.prompt_lengths[i] :]
        right = 0 if self.random.random() < 0.25 else self.random.randint(1, 5)
        tokens, parents, on_path = [int(ids[-1])], [-1], 0
        for depth in range(min(right, len(future), context.max_depth[i])):
            siblings = [future[depth], *self.random.choices(range(VOCAB), k=self.random.randint(0, 2))]
            if self.random.random() < 0.3:
                siblings.reverse()
            first = len(tokens)
            tokens += siblings
            parents += [on_path] * len(siblings)
            on_path = first + siblings.index(future[depth])
        while len(tokens) < max_nodes - 3 and context.max_depth[i] > 1:
            parents.append(self.random.randrange(len(tokens)))
            tokens.append(self.random.randrange(VOCAB))
        return tokens[:max_nodes], parents[:max_nodes]


@dataclass
class Outcome:
    """What became of one architecture."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    mode: str = ""
    reason: str = ""
    identical: bool = False
    problem: str = ""
    accepted: int = 0
    drafted: int = 0
    distinct: int = 0  # different tokens in the greedy batch: a model that repeats itself tests little
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        if not self.mode:
            return "left out"
        return "identical" if self.identical else "WRONG"


class _TooSlow(BaseException):
    """Not an Exception, so that nothing takes it for a failed probe."""


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Of processor time, so that a busy machine fails nothing."""

    def stop(*_: Any) -> None:
        raise _TooSlow(f"took more than {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _in_words(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:150]} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})"


def _prompts() -> tuple[Tensor, Tensor]:
    """Left-padded prompts and their mask, `[batch, prompt]`."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (len(PROMPTS), max(PROMPTS)), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(PROMPTS):
        mask[row, : max(PROMPTS) - length] = 0
    return ids * mask, mask


def _cases() -> dict[str, dict[str, Any]]:
    ids, mask = _prompts()
    one = {"input_ids": ids[:1], "attention_mask": mask[:1], "max_new_tokens": NEW_TOKENS}
    batch = {**one, "input_ids": ids, "attention_mask": mask}
    return {
        "greedy": {**one, "do_sample": False},
        "sampled": {**one, "do_sample": True},
        "padded batch": {**batch, "do_sample": False},
        "rows that end": {**batch, "do_sample": True, "eos_token_id": ENDS},
    }


def _generated(model: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """New tokens, `[batch, new]`, and the state of the random generator afterwards."""
    torch.manual_seed(7)
    output = model.generate(**kwargs)
    return output[:, kwargs["input_ids"].shape[1] :], torch.get_rng_state()


def _top_two_gap(model: PreTrainedModel, kwargs: dict[str, Any], mine: Tensor, reference: Tensor) -> str:
    """Where outputs part, and how sure the target is of its token there."""
    mine = torch.nn.functional.pad(mine, (0, reference.shape[1] - mine.shape[1]), value=-1)
    row, position = (mine != reference).nonzero()[0].tolist()
    torch.manual_seed(7)
    logits = model.generate(**kwargs, return_dict_in_generate=True, output_logits=True).logits[position][row]
    top = logits.topk(2).values
    return f"row {row} differs from token {position} on, top-2 gap {float(top[0] - top[1]):.1e}"


def _examine(outcome: Outcome) -> None:
    """Fills in `outcome`."""
    try:
        model = tiny_model(outcome.name, **outcome.settings)
        references = {case: _generated(model, kwargs) for case, kwargs in _cases().items()}
    except Exception as error:
        outcome.reason = _in_words(error)
        return
    outcome.distinct = len(set(references["padded batch"][0].flatten().tolist()))
    outcome.mode = "crash"
    try:
        same = [_same(model, case, *references[case], outcome) for case in _cases()]
        outcome.identical = all(same)
    except Exception as error:
        outcome.problem = _in_words(error)


def _same(model: PreTrainedModel, case: str, reference: Tensor, state: Tensor, outcome: Outcome) -> bool:
    kwargs = _cases()[case]
    drafter = PartlyRightDrafter(reference.tolist())
    fast = specdec.accelerate(model, drafter=drafter, strict=True, budget=Budget(16, fixed=True))
    if case == "greedy":
        outcome.mode, outcome.reason = fast.capability.mode, fast.capability.reason
    mine, my_state = _generated(fast, kwargs)
    outcome.accepted += fast.report.num_accepted_tokens
    outcome.drafted += fast.report.num_draft_tokens
    if fast.report.fallback and outcome.mode != "plain":
        outcome.notes.append(f"{case}: plain, {fast.report.fallback}")
    if not torch.equal(mine, reference):
        outcome.problem += f"{case}: {_top_two_gap(model, kwargs, mine, reference)}. "
        return False
    if not torch.equal(my_state, state):
        outcome.problem += f"{case}: another state of the random generator. "
        return False
    return True


def examine(name: str, **settings: Any) -> Outcome:
    """Compares one architecture's own `generate` with ours, within a time limit; settings as of `tiny_model`."""
    outcome = Outcome(name, settings)
    started = time.process_time()
    try:
        with _time_limit(SECONDS_EACH), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _examine(outcome)
    except _TooSlow as error:
        outcome.identical, outcome.problem = False, str(error)
        if not outcome.mode:
            outcome.reason = str(error)
    outcome.seconds = time.process_time() - started
    gc.collect()
    return outcome


def _line(outcome: Outcome) -> str:
    text = "; ".join(filter(None, [outcome.problem, outcome.reason, *outcome.notes]))
    return (
        f"{outcome.name:26} {outcome.mode or '-':6} {outcome.verdict:9} {outcome.accepted:4}/{outcome.drafted:<5} "
        f"{outcome.seconds:5.1f} s  {outcome.distinct:3}  {text}"
    )


def _with_window(name: str) -> bool:
    """Whether the architecture's tiny model has attention windows, or the like."""
    try:
        return tiny_config(name).to_dict() != tiny_config(name, LONGER_WINDOW).to_dict()
    except Exception:
        return False


def _examine_all(runs: Sequence[tuple[str, dict[str, Any]]], record_property: Report) -> list[Outcome]:
    """Examines one after another, and reports a table that is printed at the end of the session."""
    verbosity, threads = logging.get_verbosity(), torch.get_num_threads()
    logging.set_verbosity(logging.CRITICAL)
    torch.set_num_threads(1)
    outcomes = []
    try:
        for name, settings in runs:
            outcomes.append(examine(name, **settings))
    finally:
        logging.set_verbosity(verbosity)
        torch.set_num_threads(threads)
    identical = Counter(outcome.mode for outcome in outcomes if outcome.identical)
    counts = ", ".join(f"{identical[mode]} {mode}" for mode in MODES)
    verdicts = Counter(outcome.verdict for outcome in outcomes)
    summary = f"{len(outcomes)} runs, identical: {counts}; wrong: {verdicts['WRONG']}; left out: {verdicts['left out']}"
    record_property("table", "\n".join([*map(_line, outcomes), summary]))
    return outcomes


def _wrong(outcomes: list[Outcome]) -> str:
    return "\n".join(_line(outcome) for outcome in outcomes if outcome.verdict == "WRONG")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_architecture_generates_the_same(record_property: Report) -> None:
    outcomes = _examine_all([(name, {}) for name in NAMES], record_property)
    assert not _wrong(outcomes), _wrong(outcomes)
    identical = Counter(outcome.mode for outcome in outcomes if outcome.identical)
    assert identical["tree"] + identical["chain"] >= MIN_IDENTICAL


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_windows_longer_than_the_probe(record_property: Report) -> None:
    outcomes = _examine_all(
        [(name, {"window": LONGER_WINDOW}) for name in NAMES if _with_window(name)], record_property
    )
    assert not _wrong(outcomes), _wrong(outcomes)


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.0, 1.5], "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}


@pytest.mark.slow
@pytest.mark.parametrize("limit", [10, 13, 20, 30, 60], ids=lambda limit: f"limit {limit}")
def test_lengths_at_which_a_model_changes(limit: int, record_property: Report) -> None:
    """Some models treat all tokens otherwise once there are many: before, within and after the prompt's end."""
    longrope = LONGROPE | {"original_max_position_embeddings": limit}
    yarn = YARN | {"original_max_position_embeddings": limit}
    runs: list[tuple[str, dict[str, Any]]] = [
        ("llama", {"rope_parameters": longrope}),
        ("phi3", {"rope_parameters": longrope, "original_max_position_embeddings": limit}),
        ("llama", {"rope_parameters": YARN | {"rope_type": "dynamic"}, "max_position_embeddings": limit}),
        ("llama", {"rope_parameters": yarn}),
        ("ministral3", {"rope_parameters": yarn | {"llama_4_scaling_beta": 0.5}}),
        ("llama4_text", {"floor_scale": limit, "attn_scale": 4.0}),
    ]
    outcomes = _examine_all(runs, record_property)
    assert not _wrong(outcomes), _wrong(outcomes)
