"""What `accelerate` and `speculate` were told, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from specdec.budget import Budget
from specdec.drafters import DRAFTERS, AutoDrafter, DraftModelDrafter, MergedDrafter
from specdec.drafters.base import Drafter
from specdec.passes.attention.choice import AttentionLike, check_attention
from specdec.passes.capability import check_mode
from specdec.passes.compiled.passes import CompileMode, check_compile_mode
from specdec.passes.cuda_graphs.store import GraphMode, check_graph_mode
from specdec.passes.near_ties import check_guard
from specdec.verifiers import VERIFIERS
from specdec.verifiers.base import Verifier

DrafterLike = str | Drafter | PreTrainedModel | Sequence[str | Drafter | PreTrainedModel] | None


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
    near_tie_guard: bool | float = False
    cuda_graphs: GraphMode = "auto"
    compiled: CompileMode = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        check_mode(self.capability)
        check_attention(self.attention)
        check_graph_mode(self.cuda_graphs)
        check_compile_mode(self.compiled)
        check_guard(self.near_tie_guard, self.verifier)
        if self.deterministic and self.compiled == "auto":
            raise ValueError(
                "compiled='auto' cannot be used with deterministic=True: passes round differently once they are "
                "compiled, whenever that is; use compiled=True or compiled=False"
            )

    @classmethod
    def of(
        cls,
        drafter: DrafterLike = "auto",
        verifier: str | Verifier = "exact",
        strict: bool = False,
        *,
        max_nodes: int = 64,
        budget: Budget | None = None,
        **others: Any,
    ) -> Settings:
        """Settings as a user writes them: drafter and verifier may be names. Arguments are those of `accelerate`."""
        drafter, verifier = resolve_drafter(drafter), resolve_verifier(verifier)
        return cls(drafter, verifier, strict, budget or Budget(max_nodes), **others)


def resolve_drafter(drafter: Any) -> Drafter | None:
    """A drafter from its name, one that asks a draft model, one that merges several, or the drafter itself.

    Raises:
        ValueError: The name is not known, or a list is empty or has None in it.
        TypeError: It is neither a name nor a drafter.
    """
    if drafter is None or isinstance(drafter, Drafter):
        return drafter
    if isinstance(drafter, PreTrainedModel):
        return DraftModelDrafter(drafter)
    if isinstance(drafter, str):
        if drafter not in DRAFTERS:
            known = ", ".join(map(repr, DRAFTERS))
            raise ValueError(f"drafter={drafter!r} is not known; use one of {known}, a Drafter, or None for none")
        return DRAFTERS[drafter]()
    if isinstance(drafter, Sequence):
        return _merged(drafter)
    if isinstance(drafter, type) and issubclass(drafter, Drafter):
        raise TypeError(f"drafter={drafter.__name__} is a class; pass an instance: {drafter.__name__}()")
    raise TypeError(
        f"drafter must be a name ({', '.join(map(repr, DRAFTERS))}), a Drafter, a list of these or None, "
        f"not {drafter!r:.200}"
    )


def _merged(drafters: Sequence[Any]) -> Drafter | None:
    """One drafter out of several."""
    if len(drafters) == 1:
        return resolve_drafter(drafters[0])
    if not drafters:
        raise ValueError("drafter=[] is empty; give at least one drafter, or None for none")
    others = [resolve_drafter(drafter) for drafter in drafters if drafter != "auto"]
    sources = [drafter for drafter in others if drafter is not None]
    if len(sources) < len(others):
        raise ValueError(f"drafter={list(drafters)!r:.200} has None in it; leave it out")
    return MergedDrafter(sources) if len(sources) == len(drafters) else AutoDrafter(more=sources)


def resolve_verifier(verifier: Any) -> Verifier:
    """A verifier from its name, or the verifier itself.

    Raises:
        ValueError: The name is not known.
        TypeError: It is neither a name nor a verifier.
    """
    if isinstance(verifier, Verifier):
        return verifier
    if isinstance(verifier, str):
        if verifier not in VERIFIERS:
            known = ", ".join(map(repr, VERIFIERS))
            raise ValueError(f"verifier={verifier!r} is not known; use one of {known}, or a Verifier")
        return VERIFIERS[verifier]()
    if isinstance(verifier, type) and issubclass(verifier, Verifier):
        raise TypeError(f"verifier={verifier.__name__} is a class; pass an instance: {verifier.__name__}()")
    raise TypeError(f"verifier must be a name ({', '.join(map(repr, VERIFIERS))}) or a Verifier, not {verifier!r}")
