"""LLMCad (arXiv 2309.04255): drafts paced by confidence, and drafting while the target's weights are loaded.

Section 3.2 is `choose_branches`, 3.3 `adjusted`, and 3.4, the pipeline, `LoadWindows` and `subtrees_after`.
"""

from __future__ import annotations

import functools
import mmap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from specdec.drafters.base import Step
from specdec.drafters.small_model.calibration import LevelTimes
from specdec.drafters.small_model.growth import DraftNodes, child_of
from specdec.kernels import Floats, Ints, kernel
from specdec.target import CausalLM

OPENING_SCORE = 0.3
"""P(accepted | parent accepted) from which on a token opens a branch of its own; raise it for fewer branches."""
WIDTH = 8
"""Branches served by one forward at most."""
FIRST_THRESHOLD = 0.01
"""Confidence, a path product, below which the first draft of a call ends."""
LEAST_THRESHOLD, LARGEST_THRESHOLD = 1e-4, 0.1
"""Bounds of that confidence later on."""
AHEAD_WIDTH = 4
"""Nodes per level that is drafted ahead: the outcomes of the target's pass are many."""
LEAST_SHARE = 0.75
"""A level is begun while at least this share of its time is left of a load; raise it to make the target wait less."""
FIGURES = ("num_levels_ahead", "num_drafts_ahead", "num_drafts_ahead_used")
SECONDS = ("load_seconds", "overlapped_seconds", "waiting_seconds")


# --- pacing -----------------------------------------------------------------------------------------------------------


def adjusted(threshold: float, num_drafted: int, num_accepted: int) -> float:
    """The confidence below which the next draft ends: LLMCad's alpha (section 3.3), mended.

    Halved when all was right, so that drafts grow longer; else `threshold / T**((N_all - N_ok) / N_all)`. The paper
    prints this with a `T` that it does not define, and with which the threshold would have to grow. Here `T` is the
    accepted share, one token added to both counts: `(1 + N_ok) / (1 + N_all)`. It lies between 0 and 1, so that every
    error raises the threshold, the more the earlier it came.

    Args:
        threshold: The one so far.
        num_drafted: `N_all`: tokens of the likeliest path, or of the accepted one where that is longer.
        num_accepted: `N_ok`: accepted tokens.
    """
    if num_drafted < 1:
        return threshold
    if num_accepted >= num_drafted:
        threshold *= 0.5
    else:
        share = (1 + num_accepted) / (1 + num_drafted)
        threshold /= share ** ((num_drafted - num_accepted) / num_drafted)
    return min(max(threshold, LEAST_THRESHOLD), LARGEST_THRESHOLD)


def outcome(step: Step) -> tuple[int, int]:
    """What became of a step's trees, whose nodes stand best first: `N_all` and `N_ok` of `adjusted`, over all rows."""
    drafted = 0
    for parents, accepted in zip(step.tree.host_parents, step.accepted, strict=True):
        length, end = 0, 0
        for node, parent in enumerate(parents):
            if parent == end and node > 0:
                length, end = length + 1, node
        drafted += max(length, accepted)
    return drafted, sum(step.accepted)


def least_proposed(nodes: DraftNodes, size: int) -> float:
    """Path product that a node of some row needs to be among its best `size`."""
    rows = zip(nodes.paths, nodes.counts, strict=True)
    return min(float(np.partition(row[:count], -size)[-size]) if count > size else 0.0 for row, count in rows)


@kernel
def _branches(nodes: DraftNodes, row: int, opening_score: float, least: float, max_depth: int) -> tuple[Floats, Floats]:
    """`C_x` and `T_x` of the branch that ends in each node of a row, `[nodes]`; 0 where none does that may grow."""
    count = nodes.counts[row]
    confidence, given = np.zeros(count), np.zeros(count)
    for node in range(1, count):
        is_end = nodes.fed[row, node] < 0 and nodes.depths[row, node] < max_depth
        is_branch = nodes.ranks[row, node] == 0 or nodes.scores[row, node] >= opening_score
        if not is_end or not is_branch or nodes.paths[row, node] < least:
            continue
        confidence[node] = nodes.paths[row, node]
        first = node
        while first > 0 and nodes.ranks[row, first] == 0:
            first = nodes.parents[row, first]
            given[node] += first > 0  # the root belongs to no branch
    return confidence, given


@kernel
def choose_branches(
    nodes: DraftNodes, opening_score: float, least: float, max_depths: Ints, num_fed: int, level: Ints
) -> int:
    """Takes the ends of the branches that are to be served next, by fair queueing (section 3.2).

    A branch is a run of best tokens; any other token of a score of `opening_score` or more opens one. Its confidence
    `C_x` is the path product of its end, and `T_x` counts the tokens it was given. Of `M` tokens given to all,
    `M * C_x / sum(C)` are its due, and the branch that lacks most is next. As many are served at once as come in turn
    before one of them comes again.

    Args:
        nodes: `fed` of those taken is set.
        opening_score: See above.
        least: Branches of less confidence are not continued.
        max_depths: Largest depth of a node, `[rows]`: nodes there are not fed.
        num_fed: Nodes fed so far, padding included.
        level: Written: the nodes taken, then -1, `[rows, width]`.

    Returns:
        How many nodes the widest row has.
    """
    widest = 0
    for row in range(level.shape[0]):
        level[row, :] = -1
        confidence, given = _branches(nodes, row, opening_score, least, max_depths[row])
        all_given, all_confidence = given.sum(), confidence.sum()
        taken = 0
        while taken < level.shape[1]:
            best, most = -1, -np.inf
            for node in range(1, len(confidence)):
                if confidence[node] > 0:
                    lack = (all_given + 1) * confidence[node] / all_confidence - given[node]
                    if lack > most:
                        best, most = node, lack
            if best < 0 or nodes.fed[row, best] >= 0:
                break
            nodes.fed[row, best] = num_fed + taken
            level[row, taken] = best
            given[best] += 1
            all_given += 1
            taken += 1
        widest = max(widest, taken)
    return widest


# --- what was drafted ahead -------------------------------------------------------------------------------------------


class Subtrees(NamedTuple):
    """What is left of a draft below the tokens that the target has chosen.

    Args:
        nodes: The nodes below the new roots.
        places: Per row the places among the nodes fed so far of those that are kept, then -1, `[rows, kept]`.
        parents: Place of each one's parent among those kept, -1 at the root and at padding, `[rows, kept]`.
    """

    nodes: DraftNodes
    places: Ints
    parents: Ints


def subtrees_after(nodes: DraftNodes, known: Ints, counts: Ints) -> Subtrees | None:
    """The drafts after the chosen tokens, or None where some row's last token did not go through the draft model.

    Args:
        nodes: What was drafted.
        known: The tokens after the root, `[rows, tokens]`.
        counts: How many there are, `[rows]`.
    """
    roots = []
    for row, count in enumerate(counts):
        node = 0
        for token in known[row, :count]:
            node = child_of(nodes, row, node, token) if node >= 0 else -1
        if node < 1 or nodes.fed[row, node] < 0:
            return None
        roots.append(node)
    below = DraftNodes.of_roots(np.zeros(len(roots), np.int64), nodes.tokens.shape[1])
    places, parents = np.full_like(nodes.fed, -1), np.full_like(nodes.fed, -1)
    most = max([_move_subtree(nodes, row, root, below, places, parents) for row, root in enumerate(roots)])
    return Subtrees(below, places[:, :most], np.ascontiguousarray(parents[:, :most]))


def _move_subtree(nodes: DraftNodes, row: int, root: int, below: DraftNodes, places: Ints, parents: Ints) -> int:
    """Writes one row of `Subtrees`; returns how many places it keeps."""
    moved = np.full(nodes.counts[row], -1)
    moved[root] = 0
    for node in range(root + 1, len(moved)):
        if moved[nodes.parents[row, node]] >= 0:
            moved[node] = moved.max() + 1
    kept = np.flatnonzero(moved >= 0)
    count = below.counts[row] = len(kept)
    sources: tuple[Any, ...] = nodes[:-1]
    targets: tuple[Any, ...] = below[:-1]
    for old, new in zip(sources, targets, strict=True):
        new[row, :count] = old[row, kept]
    below.parents[row, :count] = moved[nodes.parents[row, kept]]
    below.depths[row, :count] -= nodes.depths[row, root]
    below.paths[row, :count] /= nodes.paths[row, root]
    below.parents[row, 0], below.scores[row, 0] = -1, 1.0
    fed = np.flatnonzero(below.fed[row, :count] >= 0)
    fed = fed[np.argsort(below.fed[row, fed])]
    places[row, : len(fed)] = below.fed[row, fed]
    below.fed[row, fed] = np.arange(len(fed))
    parents[row, 1 : len(fed)] = below.fed[row, below.parents[row, fed[1:]]]
    return len(fed)


# --- the pipeline -----------------------------------------------------------------------------------------------------


def offload_hooks(model: CausalLM) -> Iterator[Any]:
    """The hooks with which accelerate loads a module's weights before its forward."""
    for module in model.modules():
        yield from _parts(getattr(module, "_hf_hook", None))


def _parts(hook: Any) -> Iterator[Any]:
    if hasattr(hook, "hooks"):  # a sequence of hooks
        for part in hook.hooks:
            yield from _parts(part)
    elif getattr(hook, "offload", False) and hasattr(hook, "weights_map"):
        yield hook


def read_pages(weights: Iterable[Tensor]) -> None:
    """Reads weights that are mapped from a file: else this would happen in the forward, where nothing is drafted."""
    for tensor in weights:
        if tensor.device.type == "cpu" and type(tensor) is nn.Parameter and tensor.is_contiguous():
            tensor.detach().view(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()


def check_pipeline(draft_model: CausalLM, target: CausalLM) -> None:
    """Checks that a draft model can run while the target's weights are loading.

    Raises:
        ValueError: The draft model consists of the target's own modules, which wait for these very weights.
    """
    theirs = {id(module) for module in target.modules()}
    if any(id(module) in theirs for module in draft_model.modules()):
        raise ValueError(
            "pipelined=True cannot be used with a draft model that shares modules with the target, such as 'self': it "
            "would wait for the weights while which it is to draft; pass a draft model of its own, or leave it out"
        )
    if next(offload_hooks(target), None) is None:
        warnings.warn(
            f"pipelined=True brings nothing with this {type(target).__name__}: accelerate has offloaded none of its "
            "weights, so that there is no loading to draft in; the output is the same",
            stacklevel=3,
        )


class LoadWindows:
    """Lets the draft model run while weights of the target are being loaded, and at no other time.

    Between `open` and `close` each load of some length goes to a thread of its own, and until it has ended the thread
    that asked for it drafts, level by level. Then the target's module computes, in the same thread. So the draft
    model's cache has one owner, and never is anything drafted while the target computes. Only the `pre_forward` of
    accelerate's hooks is replaced, on the hook objects, and put back by `close`.

    Args:
        target: The model whose weights are loaded.
        times: Of the draft's levels.
    """

    def __init__(self, target: CausalLM, times: LevelTimes) -> None:
        self.times = times
        self.hooks = list(offload_hooks(target))
        self.counts: dict[str, float] = dict.fromkeys(FIGURES, 0) | dict.fromkeys(SECONDS, 0.0)
        self._replaced: list[Any] = []
        self._work: Callable[[], bool] | None = None
        self._error: Exception | None = None
        self._loaded_at = 0.0
        self._loaded_bytes = 0
        self._levels = 0
        self._loader = ThreadPoolExecutor(1, "specdec-load") if self.hooks else None

    def open(self, work: Callable[[], bool], went_on: bool) -> None:
        """Uses loads from now on.

        Args:
            work: Drafts one level further; False where there is none.
            went_on: What was drafted in the last windows was used.
        """
        self.counts["num_drafts_ahead_used"] += went_on and self._levels > 0
        self._levels, self._work = 0, work
        for hook in self.hooks:
            if "pre_forward" not in vars(hook):  # else another call is at it, and this one does without
                hook.pre_forward = functools.partial(self._load, hook, hook.pre_forward)
                self._replaced.append(hook)

    def close(self) -> None:
        """Puts everything back; may be called again.

        Raises:
            Exception: What went wrong in drafting ahead: the target's pass was not disturbed by it.
        """
        self._work = None
        for hook in self._replaced:
            vars(hook).pop("pre_forward", None)
        self._replaced.clear()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def finish(self) -> None:
        """Like `close`, at the end of a call; an error of the last step matters no more."""
        self._error = None
        self.close()
        if self._loader is not None:
            self._loader.shutdown()

    def figures(self) -> dict[str, Any]:
        """What drafting ahead did in this call.

        Levels drafted during loads, drafts before whose end some were, and those of them that the next step used;
        seconds of loading, those in which something was drafted, and those for which loaded weights waited for a level.
        """
        return {name: round(value, 6) for name, value in self.counts.items()}

    def _load(self, hook: Any, pre_forward: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Takes the place of a hook's `pre_forward`, and drafts as long as that takes."""
        size = sum(part.numel() * part.element_size() for part in module.parameters(recurse=hook.place_submodules))
        expected = size * self.counts["load_seconds"] / self._loaded_bytes if self._loaded_bytes else 0.0
        least = LEAST_SHARE * self.times.typical

        def load(is_grad_enabled: bool = torch.is_grad_enabled()) -> Any:  # set per thread
            begun = time.perf_counter()
            with torch.set_grad_enabled(is_grad_enabled):
                out = pre_forward(module, *args, **kwargs)
                read_pages(module.parameters(recurse=hook.place_submodules))
            self._loaded_at = time.perf_counter()
            self._loaded_bytes += size
            self.counts["load_seconds"] += self._loaded_at - begun
            return out

        if self._work is None or self._loader is None or least == 0.0 or expected < least:
            return load()
        begun = time.perf_counter()
        future: Future[Any] = self._loader.submit(load)
        try:
            while not future.done() and expected - (time.perf_counter() - begun) >= least and self._draft():
                pass
        finally:
            drafted_at = time.perf_counter()
            wait([future])
        self.counts["overlapped_seconds"] += min(drafted_at, self._loaded_at) - begun
        self.counts["waiting_seconds"] += max(0.0, drafted_at - self._loaded_at)
        return future.result()

    def _draft(self) -> bool:
        try:
            if self._work is not None and self._work():
                self.counts["num_levels_ahead"] += 1
                self.counts["num_drafts_ahead"] += self._levels == 0
                self._levels += 1
                return True
        except Exception as error:  # raised at the next step: the target's pass must not end in the middle
            self._error = error
        self._work = None
        return False
