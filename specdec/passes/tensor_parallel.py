"""The processes of a tensor-parallel model: they must all run the same passes, or they wait for each other for ever."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from specdec.tree import TokenTree

NO_TREE, FAILED = -1, -2
"""In place of a number of nodes: the first process has no draft, or has raised."""


def is_sharded(model: Any) -> bool:
    """Whether each process holds a part of the model's weights (`tp_plan`)."""
    return (getattr(model, "tp_size", None) or 1) > 1


def check_whole(model: Any, what: str) -> None:
    """Drafting is done by the first process alone, so what drafts cannot have its weights in all of them.

    Raises:
        ValueError: The model is tensor-parallel.
    """
    if is_sharded(model):
        raise ValueError(
            f"{what} cannot be spread over processes (tp_plan); use Lookahead, Token Recycling, or a draft model that "
            "is loaded whole"
        )


@dataclass(frozen=True)
class Ranks:
    """What the first process decides is what all of them do.

    How large a tree pays depends on measured times, and those differ from process to process. So the first one drafts,
    and the others are told its trees.

    Args:
        device: Where the processes exchange tensors.
    """

    device: torch.device

    @classmethod
    def of(cls, model: Any) -> Ranks | None:
        """None for a model that one process runs alone."""
        return cls(model.device) if is_sharded(model) else None

    @property
    def is_first(self) -> bool:
        """Whether this process decides."""
        return dist.get_rank() == 0

    def share(self, draft: Callable[[], TokenTree | None], rows: int, max_nodes: int) -> TokenTree | None:
        """The first process's tree, without scores in the other ones; None where it has no draft token.

        Args:
            draft: Makes this process's tree. An error of the first one's is told to the others, which wait for it.
            rows: Rows that still generate.
            max_nodes: The largest number of nodes.

        Raises:
            RuntimeError: In the other processes, where the first one raised.
        """
        told = torch.full((2, rows, max_nodes + 1), NO_TREE)
        tree = error = None
        try:
            tree = draft()
        except BaseException as raised:
            error = raised
            told[:, :, 0] = FAILED
        if tree is not None:
            told[:, :, 0] = tree.num_nodes
            told[0, :, 1 : tree.num_nodes + 1] = tree.tokens.cpu()
            told[1, :, 1 : tree.num_nodes + 1] = tree.parents.cpu()
        told = told.to(self.device)
        dist.broadcast(told, 0)
        if error is not None:
            raise error
        if self.is_first:
            return tree
        told = told.cpu()
        nodes = int(told[0, 0, 0])
        if nodes == FAILED:
            raise RuntimeError("the first process, which drafts for all, has failed; see its error")
        return None if nodes < 0 else TokenTree(told[0, :, 1 : nodes + 1], told[1, :, 1 : nodes + 1])
