"""What `accelerate` and `speculate` were told, checked once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from specdec.budget import Budget
from specdec.drafters.base import Drafter
from specdec.passes.attention.choice import AttentionLike, check_attention
from specdec.passes.capability import check_mode
from specdec.passes.compiled.passes import CompileMode, check_compile_mode
from specdec.passes.cuda_graphs.store import GraphMode, check_graph_mode
from specdec.verifiers.base import Verifier

Memory = Literal["process", "call"]
"""How long drafters remember texts."""


@dataclass(frozen=True)
class Settings:
    """How to speculate; see `accelerate` for what each setting means.

    Raises:
        TypeError: A setting is of no known kind.
        ValueError: A setting is not known, or does not go together with another one.
    """

    drafter: Drafter | None
    verifier: Verifier
    strict: bool = False
    budget: Budget = field(default_factory=Budget)
    capability: str = "auto"
    attention: AttentionLike = "auto"
    cuda_graphs: GraphMode = "auto"
    compiled: CompileMode = False
    deterministic: bool = False
    memory: Memory = "process"

    def __post_init__(self) -> None:
        check_mode(self.capability)
        check_attention(self.attention)
        check_graph_mode(self.cuda_graphs)
        check_compile_mode(self.compiled)
        if self.memory not in get_args(Memory):
            raise ValueError(f"memory={self.memory!r} is not known; use 'process' or 'call'")
        if self.deterministic and self.compiled == "auto":
            raise ValueError(
                "compiled='auto' cannot be used with deterministic=True: passes round differently once they are "
                "compiled, whenever that is; use compiled=True or compiled=False"
            )
