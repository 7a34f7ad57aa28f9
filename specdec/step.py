"""One step of the loop on the device: target pass, verification, and the one transfer to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.drafting import GuardedDrafter
from specdec.kernels import Ints
from specdec.passes.near_ties import NearTies
from specdec.report import SpeculationReport
from specdec.sampling import Sampler
from specdec.target import TargetModel
from specdec.tree import TokenTree
from specdec.verifiers.base import Verifier


@dataclass(frozen=True)
class Outcome:
    """What became of a tree, on the host.

    Args:
        accepted: Per row the accepted draft nodes, from the root's child down.
        tokens: Per row the accepted tokens and then the next one.
        top_tokens: What the target holds likeliest behind each node, `[rows, nodes, count]`; see `Drafter`.
        near_ties: Per row and token whether it was a near-tie; None where they are not looked for.
    """

    accepted: list[list[int]]
    tokens: list[list[int]]
    top_tokens: Ints
    near_ties: list[list[bool]] | None = None


@dataclass
class Step:
    """Runs trees through the target and verifies them.

    Args:
        target: Runs the tree.
        verifier: Accepts a path.
        sampler: Picks the target's tokens.
        drafter: Tells how many of the target's likeliest tokens it wants to know.
        report: Takes the time.
        near_ties: What a near-tie is; None: they are not looked for.
    """

    target: TargetModel
    verifier: Verifier
    sampler: Sampler
    drafter: GuardedDrafter
    report: SpeculationReport
    near_ties: NearTies | None = None

    def run(self, tree: TokenTree, rows: Sequence[int]) -> Outcome:
        """Target pass and verification.

        Args:
            tree: On the host, or where the drafter has made it, `[rows, nodes]`.
            rows: Index in the whole batch of each row of the tree.
        """
        with self.report.timed("target"):
            placed = self.target.place(tree)
            logits = self.target.forward(placed)  # [B, N, V]
        with self.report.timed("verify"):
            return self.verify(placed, logits, rows, tree.num_nodes)

    def verify(self, tree: TokenTree, logits: Tensor, rows: Sequence[int], num_nodes: int | None = None) -> Outcome:
        """Verification alone, with one transfer.

        Args:
            tree: On the device.
            logits: `[batch, nodes, vocab]`.
            rows: See `run`.
            num_nodes: Nodes from here on are padding; None: there are none.
        """
        acceptance = self.verifier.verify(tree, logits, self.sampler, rows)
        top_tokens = self.drafter.top_tokens(logits, acceptance.nodes)  # [B, N, count]
        parts = [acceptance.num_accepted[:, None], acceptance.nodes, acceptance.tokens]
        if top_tokens is not None:
            parts.append(top_tokens.flatten(1))
        if self.near_ties is not None:
            parts.append(self.near_ties.find(self.sampler, acceptance))
        packed: Ints = torch.cat([part.to(acceptance.nodes.device) for part in parts], 1).cpu().numpy()
        return unpack(packed, acceptance.nodes.shape[1], tree.num_nodes, num_nodes, self.near_ties is not None)


def unpack(packed: Ints, depth: int, width: int, num_nodes: int | None = None, has_near_ties: bool = False) -> Outcome:
    """An outcome from one array: how many were accepted, nodes, tokens, top tokens of each node, near-ties.

    Args:
        packed: `[rows, 2 + 2 * depth + width * count]`, with near-ties `1 + depth` columns more.
        depth: Places for accepted nodes.
        width: Nodes of the tree, padding included.
        num_nodes: Nodes whose top tokens matter; None: all.
        has_near_ties: Whether near-ties are there.
    """
    end = packed.shape[1] - (1 + depth if has_near_ties else 0)
    rows = packed[:, : 2 + 2 * depth].tolist()
    nodes = [row[1 : 1 + row[0]] for row in rows]
    tokens = [row[1 + depth : 2 + depth + row[0]] for row in rows]
    top_tokens = packed[:, 2 + 2 * depth : end].reshape(len(packed), width, -1)
    near_ties = None
    if has_near_ties:
        marks = packed[:, end:].astype(bool).tolist()
        near_ties = [row[: len(kept)] for row, kept in zip(marks, tokens, strict=True)]
    return Outcome(nodes, tokens, top_tokens[:, :num_nodes], near_ties=near_ties)
