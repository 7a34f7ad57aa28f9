"""Replays recorded answers through a drafter: what it would gain, without a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from specdec.drafters.base import DraftContext, Drafter, Step
from specdec.tree import TokenTree

Record = Mapping[str, Sequence[int]]
"""`{"prompt": [ids], "answer": [ids]}`"""


@dataclass
class ReplayReport:
    """What a drafter did on recorded answers; counts in vLLM's words, as in `SpeculationReport`.

    Args:
        drafter: The drafter's name.
        settings: Its hyper-parameters.
        max_nodes: Largest tree that was asked for, the root included.
        num_records: Answers replayed.
        num_target_passes: Target passes there would have been after the prefill.
        num_drafts: Drafts: one per pass, except where one token was left to generate.
        num_draft_tokens: Nodes proposed, roots excepted.
        num_accepted_tokens: Draft tokens that were the recorded ones.
        num_accepted_tokens_per_pos: How many drafts had at least 1, 2, ... tokens accepted.
        num_generated_tokens: Tokens these passes gave: accepted ones and one more each.
        draft_seconds: Time of each `propose`, `[drafts]`.
        expected_accepted_tokens: Accepted tokens by the drafter's own scores; None if it gives none.
    """

    drafter: str
    settings: dict[str, Any]
    max_nodes: int
    num_records: int = 0
    num_target_passes: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    num_generated_tokens: int = 0
    draft_seconds: list[float] = field(default_factory=list, repr=False)
    expected_accepted_tokens: float | None = None

    @property
    def tokens_per_pass(self) -> float:
        """Tokens a target pass gives on average; 1 is plain decoding."""
        return self.num_generated_tokens / max(self.num_target_passes, 1)

    @property
    def acceptance_per_pos(self) -> list[float]:
        """Share of drafts whose 1st, 2nd, ... token was accepted."""
        return [count / self.num_drafts for count in self.num_accepted_tokens_per_pos]

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON; of the draft times their mean and 99th percentile."""
        figures = asdict(self)
        seconds = figures.pop("draft_seconds") or [0.0]
        return figures | {
            "tokens_per_pass": self.tokens_per_pass,
            "acceptance_per_pos": self.acceptance_per_pos,
            "mean_draft_seconds": float(np.mean(seconds)),
            "p99_draft_seconds": float(np.percentile(seconds, 99)),
        }

    def __rich__(self) -> Table:
        found = self.to_dict()
        shown = {
            "tokens per pass": f"{self.tokens_per_pass:.2f}",
            "generated tokens": f"{self.num_generated_tokens:,}",
            "target passes": f"{self.num_target_passes:,}",
            "draft tokens per draft": f"{self.num_draft_tokens / max(self.num_drafts, 1):.1f}",
            "accepted tokens": f"{self.num_accepted_tokens:,}",
            "acceptance per position (first 8)": " ".join(f"{r:.2f}" for r in self.acceptance_per_pos[:8]) or "-",
            "mean draft time": f"{found['mean_draft_seconds'] * 1e6:.0f} µs",
            "p99 draft time": f"{found['p99_draft_seconds'] * 1e6:.0f} µs",
        }
        if self.expected_accepted_tokens is not None:
            shown["accepted, by the drafter's scores"] = f"{self.expected_accepted_tokens:,.0f}"
        table = Table(title=f"Replay of {self.num_records} answers, drafter {self.drafter}, {self.max_nodes} nodes")
        table.add_column("figure")
        table.add_column("value", justify="right")
        for name, value in shown.items():
            table.add_row(name, value)
        return table

    def count(self, tree: TokenTree, accepted: int, seconds: float) -> None:
        """Counts one draft of one row."""
        self.num_drafts += 1
        self.num_draft_tokens += int(tree.is_real.sum()) - 1
        self.num_accepted_tokens += accepted
        self.draft_seconds.append(seconds)
        per_pos = self.num_accepted_tokens_per_pos
        per_pos.extend([0] * (accepted - len(per_pos)))
        for position in range(accepted):
            per_pos[position] += 1
        if tree.scores is not None:
            paths = [1.0]
            for parent, score in zip(tree.parents[0, 1:].tolist(), tree.scores[0, 1:].tolist(), strict=True):
                paths.append(paths[parent] * score if parent >= 0 else 0.0)
            self.expected_accepted_tokens = (self.expected_accepted_tokens or 0.0) + float(sum(paths[1:]))


def replay(drafter: Drafter, records: Iterable[Record], max_nodes: int = 64) -> ReplayReport:
    """Lets a drafter propose along recorded answers, as if a target wrote them, one call per record.

    At each step the longest path of the tree that equals the answer is accepted, and one more token is committed. The
    answer's first token counts as the prefill's. What the drafter keeps between calls it keeps here, so the order of
    the records matters.

    Args:
        drafter: The drafter; one that needs the target's hidden states cannot be replayed.
        records: Token ids by `prompt` and `answer`.
        max_nodes: Largest tree asked for, the root included.

    Raises:
        ValueError: For a record that is not of this form, `max_nodes` below 1, or a drafter that needs hidden states.
    """
    if max_nodes < 1:
        raise ValueError(f"max_nodes must be at least 1 (the root only), got {max_nodes}; 64 is usual")
    if drafter.needs_hidden_states:
        raise ValueError(
            f"drafter {drafter.name!r} needs the target's hidden states, which recorded answers do not hold; "
            "measure it with `specdec bench` or `specdec tune-tree`"
        )
    report = ReplayReport(drafter.name, drafter.settings(), max_nodes)
    for number, record in enumerate(records):
        prompt, answer = (_token_ids(record, key, f"record {number}") for key in ("prompt", "answer"))
        if len(answer):
            report.num_records += 1
            _replay_one(drafter, prompt, answer, max_nodes, report)
    return report


def _token_ids(record: Any, key: str, where: str) -> NDArray[np.int32]:
    ids = np.asarray(record.get(key) if isinstance(record, Mapping) else None)
    if ids.ndim != 1 or (ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= 2**31)):
        raise ValueError(
            f"{where}: {key!r} must be a list of token ids in 0 <= id < 2**31; record "
            '{"prompt": [ids], "answer": [ids]} with the target\'s own tokenizer'
        )
    return ids.astype(np.int32)


def _replay_one(
    drafter: Drafter, prompt: NDArray[np.int32], answer: NDArray[np.int32], max_nodes: int, report: ReplayReport
) -> None:
    sequence = np.concatenate([prompt, answer])

    def context(length: int) -> DraftContext:
        return DraftContext([0], [sequence[:length]], [len(prompt)], [max(len(sequence) - length - 1, 0)])

    session = drafter.start(context(len(prompt)))
    length = len(prompt) + 1
    while length < len(sequence):
        accepted = 0
        if len(sequence) - length > 1:
            before = context(length)
            began = perf_counter_ns()
            tree = session.propose(before, max_nodes)
            seconds = (perf_counter_ns() - began) * 1e-9
            accepted = _accepted(tree, sequence[length:-1])
            report.count(tree, accepted, seconds)
            after = length + accepted + 1
            session.observe(context(after), Step([0], tree, [accepted], new_tokens=[sequence[length:after]]))
        length += accepted + 1
        report.num_target_passes += 1
        report.num_generated_tokens += accepted + 1
    session.finish(context(length))


def _accepted(tree: TokenTree, answer: NDArray[np.int32]) -> int:
    """How many tokens of the answer are a path from the root of the only row."""
    tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
    children = {(parent, token): node for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)) if node}
    node = 0
    for depth, token in enumerate(answer.tolist()):
        node = children.get((node, token), -1)
        if node < 0:
            return depth
    return len(answer)
