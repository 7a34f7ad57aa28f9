"""A whole step as one graph: target pass, processing, selection, the accepted path, commit."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as lp

from specdec.drafting import GuardedDrafter
from specdec.passes.cuda_graphs.store import StaticStore
from specdec.passes.cuda_graphs.target import StaticTarget
from specdec.passes.cuda_graphs.transfers import Download
from specdec.passes.near_ties import NearTies
from specdec.report import SpeculationReport
from specdec.sampling import SCORE_ONLY, Sampler
from specdec.step import Outcome, Step, unpack
from specdec.target import TargetModel
from specdec.tree import TokenTree, padded_width
from specdec.verifiers.base import Acceptance, Verifier

CAPTURABLE = SCORE_ONLY - {lp.TopHLogitsWarper, lp.EtaLogitsWarper}
"""Processors whose launches depend on shapes alone. Eta's checks its distribution on the host."""
MOST_SUPPRESSED = 32
"""Suppressed tokens in a captured step: `torch.isin` sorts longer lists, and the host waits to learn their length."""
EVIDENCE = 64
"""Logits of each node that a replay is compared by, besides its outcome."""
FEW_LEVELS = 16
"""Levels of a tree, the root's included, for which noise is kept ready; deeper trees have as many as nodes."""


def not_whole(step: Step) -> str | None:
    """Why verification must come after the captured target pass, instead of being captured with it; or None."""
    if "follow" not in vars(type(step.verifier)):  # a subclass may do anything
        return f"the verifier {step.verifier.name!r} is none of a fixed sequence of launches"
    if step.sampler.keep_scores:
        return "scores or logits are wanted"
    if others := [type(p).__name__ for p in step.sampler.processors if not _is_capturable(p)]:
        return f"{', '.join(others)} must see each node's own prefix, or read values on the host"
    return None


def _is_capturable(processor: Any) -> bool:
    is_long = isinstance(processor, lp.SuppressTokensLogitsProcessor) and (
        processor.suppress_tokens.numel() > MOST_SUPPRESSED
    )
    return type(processor) in CAPTURABLE and not is_long


class Selection:
    """What follows the target pass in a captured step, up to the commit and one array for the host.

    Args:
        store: Buffers.
        target: Whose cache is committed in.
        sampler: Processors and noise.
        follow: The verifier's `Verifier.follow`.
        near_ties: What a near-tie is; None: they are not looked for.
    """

    def __init__(
        self,
        store: StaticStore,
        target: StaticTarget,
        sampler: Sampler,
        follow: Callable[[TokenTree, Tensor], Acceptance],
        near_ties: NearTies | None = None,
    ) -> None:
        self.store = store
        self.follow = follow
        self.near_ties = near_ties
        self.target = target
        self.sampler = sampler
        self.levels = 1
        """Levels of the tree at most, the root's included."""
        self.num_top_tokens = 0
        self._settings = _settings(sampler.processors)

    def key(self) -> Hashable:
        return self.sampler.noise is not None, self.levels, self.num_top_tokens, self._settings, self.near_ties

    def kept(self) -> Any:
        return self.sampler.processors

    def outputs(self, batch: int, nodes: int) -> list[Tensor]:
        evidence = self.store.kept("evidence", (batch, nodes))
        return [self.packed(batch, nodes)] + ([] if evidence is None else [evidence])

    def packed(self, batch: int, nodes: int) -> Tensor:
        """See `unpack`; `[batch, columns]`."""
        depth = nodes if nodes > 1 else 0
        near_ties = 0 if self.near_ties is None else 1 + depth
        return self.store.buffer("packed", (batch, 2 + 2 * depth + nodes * self.num_top_tokens + near_ties))

    def noise(self, batch: int) -> Tensor:
        """The draws of each row's next positions, `[batch, levels, vocab]`."""
        assert self.sampler.noise is not None
        shape = batch, max(self.levels, FEW_LEVELS), self.sampler.noise.vocab
        return self.store.buffer("noise", shape, torch.float32, fill=1.0)

    def run(self, tree: TokenTree, logits: Tensor, lengths: Tensor) -> None:
        batch, nodes = tree.tokens.shape
        # A wrong step may pick the right tokens; some of the logits tell.
        self.store.keep("evidence", (batch, nodes), logits[..., :: -(-logits.shape[-1] // EVIDENCE)])
        scores = self.sampler.process_flat(tree, logits.float())
        if self.sampler.noise is not None:
            rows = self.store.counting(batch)[:, None]
            scores = torch.softmax(scores, dim=-1) / self.noise(batch)[rows, tree.depths]
        acceptance = self.follow(tree, scores.argmax(-1))
        parts = [acceptance.num_accepted[:, None], acceptance.nodes, acceptance.tokens]
        if self.num_top_tokens:
            parts.append(logits.topk(self.num_top_tokens).indices.flatten(1))
        if self.near_ties is not None:
            parts.append(self.near_ties.find_among(scores, acceptance, self.sampler.noise is not None))
        self.packed(batch, nodes).copy_(torch.cat(parts, 1))
        self._commit(acceptance.nodes[:, : min(nodes, self.levels) - 1], lengths)

    def _commit(self, nodes: Tensor, lengths: Tensor) -> None:
        """Moves the accepted nodes, `[batch, depth]` with -1 behind the end, to behind the committed slots."""
        if nodes.shape[1] == 0:
            return
        places = self.store.counting(nodes.shape[1] + 1)[1:]
        target = lengths[:, None] + places
        source = lengths[:, None] + torch.where(nodes >= 0, nodes, places)
        self.target.cache.move(self.store.counting(len(nodes))[:, None], source, target)


@dataclass
class _Started:
    """A step under way.

    Args:
        rows: Its rows.
        num_nodes: Width of its tree.
        download: Its outcome.
    """

    rows: list[int]
    num_nodes: int
    download: Download


@dataclass
class CapturedStep(Step):
    """Runs whole steps as graphs, as far as the call allows; otherwise the target pass alone is one.

    Without a drafter, and while drafting rests, a step needs nothing from the host that is not known beforehand, but
    for where rows end. So the next one is started before the tokens of the last one are waited for; if a row has ended,
    it was for nothing.
    """

    target: StaticTarget
    selection: Selection | None = field(init=False, default=None)
    _ahead: _Started | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        if (follow := self.verifier.follow) is not None and not_whole(self) is None:
            self.selection = Selection(self.target.store, self.target, self.sampler, follow, self.near_ties)

    def run(self, tree: TokenTree, rows: Sequence[int]) -> Outcome:
        started, self._ahead = self._ahead, None
        if self.selection is None or not self.target.is_static:
            return super().run(tree, rows)
        with self.report.timed("target"):
            if started is None or started.rows != rows or tree.num_nodes > 1:
                started = self._start(tree, rows)
            if started is not None and self._may_run_ahead(tree, rows):
                self._ahead = self._start(tree, rows, after=started)
        if started is None:
            self.selection = None
            return super().run(tree, rows)
        with self.report.timed("verify"):
            packed = started.download.wait()[self.target.places]
        self.target.is_committed = True
        depth = started.num_nodes if started.num_nodes > 1 else 0
        return unpack(packed, depth, started.num_nodes, tree.num_nodes, self.near_ties is not None)

    def _may_run_ahead(self, tree: TokenTree, rows: Sequence[int]) -> bool:
        sequences, cache = self.sampler.sequences, self.target.cache
        # A buffer of hidden states holds those of one step.
        is_plain = tree.num_nodes == 1 and self.drafter.sits_out and self.target.hidden_states is None
        return is_plain and min(map(sequences.room, rows)) > 1 and cache.width + 2 <= cache.capacity

    def _start(self, tree: TokenTree, rows: Sequence[int], after: _Started | None = None) -> _Started | None:
        """Launches a step; None if it cannot be had.

        Args:
            tree: To verify.
            rows: Its rows.
            after: The step under way whose token is the tree's root, not known to the host yet.
        """
        assert self.selection is not None
        tree = tree.padded_to(padded_width(tree.num_nodes))
        nodes, batch = tree.num_nodes, self.target.cache.batch_size
        self.selection.levels = FEW_LEVELS if nodes > FEW_LEVELS > tree.deepest else nodes
        if after is None:
            self.selection.num_top_tokens = self.drafter.num_top_tokens
        self.target.make_room(nodes)
        ahead = 0 if after is None else 1
        self._send_noise(rows, tree.deepest + 1, ahead)
        roots = None if after is None else self.selection.packed(batch, nodes)[:, 1]
        if not self.target.launch(tree, self.selection, roots, ahead):
            return None
        download = Download(self.selection.packed(batch, nodes))
        self._draw_ahead(rows, 2 * (tree.deepest + 1) + ahead)
        return _Started(list(rows), nodes, download)

    def _send_noise(self, rows: Sequence[int], levels: int, ahead: int) -> None:
        """Copies the draws of the next positions of each row to where the step reads them."""
        noise = self.sampler.noise
        if noise is None:
            return
        assert self.selection is not None
        buffer = self.selection.noise(self.target.cache.batch_size)
        for place, row in zip(self.target.places, rows, strict=True):
            first = self.sampler.sequences.num_generated(row) + ahead
            draws = [noise.at(first + level, row) for level in range(levels)]
            torch.stack(draws, out=buffer[place, :levels])

    def _draw_ahead(self, rows: Sequence[int], levels: int) -> None:
        """Makes draws while the device is busy; those that no step needs are taken back at the end of the call."""
        if self.sampler.noise is not None:
            self.sampler.noise.draw(max(map(self.sampler.sequences.num_generated, rows)) + levels)


def step_for(
    target: TargetModel,
    verifier: Verifier,
    sampler: Sampler,
    drafter: GuardedDrafter,
    report: SpeculationReport,
    near_ties: NearTies | None = None,
) -> Step:
    """The step for a target: captured where its passes are static."""
    if isinstance(target, StaticTarget):
        return CapturedStep(target, verifier, sampler, drafter, report, near_ties=near_ties)
    return Step(target, verifier, sampler, drafter, report, near_ties)


def _settings(processors: Any) -> Hashable:
    """Processors with equal settings launch the same work."""

    def value(of: Any) -> Any:
        return (str(of.dtype), of.tolist()) if isinstance(of, Tensor) else of

    return tuple((type(p), repr(sorted((name, value(v)) for name, v in vars(p).items()))) for p in processors)
