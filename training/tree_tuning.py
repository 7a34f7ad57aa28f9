"""Accuracy of heads on the target's own tokens, times of its passes on this device, and the best tree for both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from specdec.api import accelerate
from specdec.budget import Budget
from specdec.common.provenance import hardware
from specdec.drafters.medusa import MedusaDrafter, default_accuracies
from specdec.heads import HeadCalibration, MedusaHeads
from specdec.heads.tree_choice import best_tree, expected_tokens, measured_tokens
from specdec.training.hidden_states import FinalHiddenStates
from specdec.training.losses import IGNORED, medusa_targets
from specdec.tree import NODE_BUCKETS

LOGIT_VALUES = 2**24
"""Logits that are computed at once."""
TIMED_TOKENS = 16
"""Tokens generated per trial."""
TIMED_PROMPT = 512
"""Longest prompt, in tokens, of a timed generation."""
TRIALS = 3
"""Generations per size; the fastest counts."""


@dataclass(frozen=True)
class Candidate:
    """The best tree of one size.

    Args:
        nodes: Its size, the root included; 1 is plain decoding.
        tree: Paths of ranks.
        expected: Tokens per pass if heads are right independently of each other.
        measured: Tokens per pass on the measured positions.
        default: The same of the tree that heads without a calibration use.
        seconds: Time of a pass, the drafting included.
    """

    nodes: int
    tree: list[list[int]]
    expected: float
    measured: float
    default: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Measured tokens per pass over its time."""
        return self.measured / self.seconds


@dataclass(frozen=True)
class Tuning:
    """The outcome.

    Args:
        calibration: To be saved beside the heads.
        candidates: Trees by size, plain decoding first.
        chosen: The tree with the most tokens per second.
        draft_seconds: Time of one draft.
    """

    calibration: HeadCalibration
    candidates: list[Candidate]
    chosen: Candidate
    draft_seconds: float


def tune(
    model: Any,
    heads: MedusaHeads,
    examples: Sequence[Mapping[str, Any]],
    *,
    num_ranks: int = 10,
    max_nodes: int = 64,
) -> Tuning:
    """Finds the tree of ranks with the most tokens per second on this device, at batch size 1.

    Args:
        model: The target.
        heads: Bound to it; their calibration is replaced.
        examples: Texts that the target wrote, with `input_ids` and, true where the target wrote, `supervised`.
        num_ranks: Length of each head's list.
        max_nodes: Largest tree: 2, 4, ... 128.

    Raises:
        ValueError: The examples are too short, or the model cannot verify drafts.
    """
    num_heads = heads.config.num_heads
    ranks = measure_ranks(model, heads, examples, num_ranks)
    accuracies = [[float((ranks[:, head] == rank).mean()) for rank in range(num_ranks)] for head in range(num_heads)]
    heads.calibration = HeadCalibration(accuracies)
    seconds, draft_seconds, takes_trees = time_passes(model, heads, examples, max_nodes)

    def tree_of(scores: list[list[float]], nodes: int) -> list[list[int]]:
        return best_tree(scores if takes_trees else [[head[0]] for head in scores], nodes)

    candidates: list[Candidate] = []
    for size in [n for n in NODE_BUCKETS if n <= max_nodes]:
        tree, default = tree_of(accuracies, size), tree_of(default_accuracies(num_heads, num_ranks), size)
        nodes = len(tree) + 1
        if candidates and nodes <= candidates[-1].nodes:
            break  # no longer path, no further rank
        candidates.append(
            Candidate(
                nodes,
                tree,
                expected_tokens(accuracies, tree),
                measured_tokens(ranks, tree),
                measured_tokens(ranks, default),
                float(np.interp(np.log2(nodes), np.log2(list(seconds)), list(seconds.values())))
                + (draft_seconds if nodes > 1 else 0.0),
            )
        )
    if len(candidates) == 1:
        raise ValueError(f"the heads are never right on {len(ranks)} positions; were they trained for this model?")
    chosen = max(candidates[1:], key=lambda candidate: candidate.tokens_per_second)
    machine = hardware()
    device = ", ".join(machine["gpus"]) if model.device.type == "cuda" else "{cpu}, {threads} threads".format(**machine)
    heads.calibration = HeadCalibration(accuracies, chosen.tree, len(ranks), seconds, device)
    return Tuning(heads.calibration, candidates, chosen, draft_seconds)


@torch.no_grad()
def measure_ranks(
    model: Any, heads: MedusaHeads, examples: Iterable[Mapping[str, Any]], num_ranks: int = 10
) -> NDArray[np.int64]:
    """Ranks of the target's own tokens in the heads' lists, at positions where every head has one.

    Args:
        model: The target.
        heads: Bound to it.
        examples: As for `tune`.
        num_ranks: Length of each head's list.

    Returns:
        `[positions, heads]`, -1 for a token that is not listed.

    Raises:
        ValueError: There is no such position.
    """
    hidden_states, num_heads = FinalHiddenStates(model), heads.config.num_heads
    vocab = heads.config.num_logits
    chunk = max(1, LOGIT_VALUES // (num_heads * vocab))
    found = []
    for example in examples:
        ids = torch.tensor([example["input_ids"]], device=model.device)
        supervised = torch.tensor([example["supervised"]], device=model.device)
        segments, positions = torch.ones_like(ids), torch.arange(ids.shape[1], device=ids.device)[None]
        targets = medusa_targets(ids, supervised, segments, num_heads)[:, 0]  # [heads + 1, length]
        known = (targets != IGNORED).all(0)
        if not bool(known.any()):
            continue
        hidden = hidden_states(ids, segments, positions)[0, known]
        wanted = targets[1:, known]
        for states, tokens in zip(hidden.split(chunk), wanted.split(chunk, dim=1), strict=True):
            listed = heads.tokens(heads(states).topk(min(num_ranks, vocab), dim=-1).indices)
            is_it = listed == tokens.to(heads.device)[..., None]
            rank = torch.where(is_it.any(-1), is_it.int().argmax(-1), -1)  # [heads, positions]
            found.append(rank.T.cpu().numpy().astype(np.int64))
    if not found:
        raise ValueError(f"no answer has the {num_heads + 1} tokens that {num_heads} heads need; let them be longer")
    return np.concatenate(found)


def time_passes(
    model: Any, heads: MedusaHeads, examples: Sequence[Mapping[str, Any]], max_nodes: int
) -> tuple[dict[int, float], float, bool]:
    """Times short generations with trees of each size.

    Returns:
        Seconds of a pass by number of nodes, seconds of a draft, and whether the model takes branching trees.

    Raises:
        ValueError: The model cannot verify drafts.
    """
    ids = torch.tensor([list(examples[0]["input_ids"])[:TIMED_PROMPT]], device=model.device)
    seconds, drafts = {}, []
    for nodes in [n for n in NODE_BUCKETS if n <= max_nodes]:
        fast = accelerate(model, MedusaDrafter(heads, nodes), strict=True, budget=Budget(nodes, fixed=True))
        if fast.capability.mode == "plain":
            raise ValueError(f"this model cannot verify drafts: {fast.capability.reason}")
        times = []
        for _ in range(TRIALS):
            fast.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TIMED_TOKENS,
                min_new_tokens=TIMED_TOKENS, do_sample=False,
            )  # fmt: skip
            if fast.report.fallback:
                raise ValueError(f"this call cannot verify drafts: {fast.report.fallback}")
            passes = fast.report.num_target_passes - 1  # without the prefill
            phases = fast.report.seconds
            times.append((phases["target"] + phases["verify"] + phases["commit"]) / passes)
            drafts.append(phases["draft"] / passes)
        seconds[nodes] = min(times)
    # A larger tree cannot be faster; where it seems so, the smaller one's time had noise.
    least = np.minimum.accumulate(list(seconds.values())[::-1])[::-1].tolist()
    return dict(zip(seconds, least, strict=True)), min(drafts[TRIALS:], default=0.0), fast.capability.mode == "tree"
