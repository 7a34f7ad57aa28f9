"""The methods of a benchmark: transformers' own, drafting off, and drafters."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from specdec.api import SpeculativeModel, accelerate
from specdec.benchmark.baselines import HF_GENERATE, hf_methods
from specdec.benchmark.compiled import COMPILED, CompiledGenerate
from specdec.benchmark.measuring import Method
from specdec.benchmark.settings import Part
from specdec.budget import Budget
from specdec.drafters import DRAFTERS
from specdec.drafters.base import Drafter
from specdec.drafters.by_name import DrafterLike, resolve_drafter
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.verifiers.base import Verifier
from specdec.verifiers.by_name import resolve_verifier

AT_SIZE = ", {} nodes"
"""Behind a contender's name, where it is measured at several sizes of the tree."""


@dataclass(frozen=True)
class Contender:
    """A drafter to be measured.

    Args:
        name: For tables.
        make: Returns a new drafter, or a drafter's name. It is called for each run, outside the clock, so that no
            prompt profits from what the drafter saw of another one, or of itself in another repeat.
        verifier: A name or a verifier.
        optional: It is left out, with the reason, where it cannot run.
        max_nodes: Largest token tree per target pass.
        compiled: Whether the target's passes are compiled, and the draft model's where it is asked by name.
    """

    name: str
    make: Callable[[], DrafterLike]
    verifier: str | Verifier = "exact"
    optional: bool = False
    max_nodes: int = 64
    compiled: bool = False

    @classmethod
    def named(cls, drafter: str, draft_model: Any = None, optional: bool = False) -> Contender:
        """A drafter by its name, with its own settings.

        Args:
            drafter: A name in `DRAFTERS`.
            draft_model: What a drafter that asks a draft model takes.
            optional: See the class.

        Raises:
            ValueError: The name is not known, or the draft model is missing.
        """
        if drafter not in DRAFTERS:
            raise ValueError(f"drafter {drafter!r} is not known; use one of {', '.join(map(repr, DRAFTERS))}")
        make: Callable[[], DrafterLike] = DRAFTERS[drafter]
        if issubclass(DRAFTERS[drafter], DraftModelDrafter):
            if draft_model is None:
                raise ValueError(f"drafter {drafter!r} needs a draft model; pass draft_model=...")

            def make() -> DrafterLike:
                return DraftModelDrafter(draft_model)

        return cls(f"specdec {drafter.replace('-', ' ')}", make, optional=optional)

    def method(self, model: Any, part: str) -> Method:
        """How to run it in a part of the benchmark."""
        verifier = resolve_verifier(self.verifier)

        def prepare() -> SpeculativeModel:
            budget = Budget(self.max_nodes, owner=(self.name, part))
            return accelerate(model, self._drafter(), verifier=self.verifier, budget=budget, compiled=self.compiled)

        return Method(self.name, prepare, optional=self.optional, guarantee=verifier.guarantee)

    def _drafter(self) -> Drafter | None:
        drafter = resolve_drafter(self.make())
        if self.compiled and isinstance(drafter, DraftModelDrafter):
            drafter.compiled = True
        return drafter

    def described(self) -> dict[str, Any]:
        """Everything that decides its figures, ready for JSON."""
        drafter, verifier = self._drafter(), resolve_verifier(self.verifier)
        found = {
            "name": self.name,
            "drafter": drafter.name if drafter is not None else None,
            "settings": drafter.settings() if drafter is not None else {},
            "verifier": verifier.name,
            "verifier_settings": vars(verifier),
            "max_nodes": self.max_nodes,
            "compiled": self.compiled,
        }
        # A name for what has no value in JSON, such as a model.
        plain: dict[str, Any] = json.loads(json.dumps(found, default=lambda value: type(value).__name__))
        return plain


def all_that_apply(draft_model: Any = None) -> list[Contender]:
    """Every drafter by name; those that cannot run with a model will be left out, with the reason."""
    names = [
        name for name, kind in DRAFTERS.items() if draft_model is not None or not issubclass(kind, DraftModelDrafter)
    ]
    names.sort(key=lambda name: name == "auto")  # it merges the others, so it comes behind them
    return [Contender.named(name, draft_model, optional=True) for name in names]


def as_contenders(drafters: Sequence[str | Contender] | None, draft_model: Any) -> list[Contender]:
    """Contenders from what a caller passes.

    Raises:
        TypeError: A drafter in place of what makes it.
        ValueError: A name is not known, or used twice.
    """
    if drafters is None:
        return all_that_apply(draft_model)
    contenders: list[Contender] = []
    for drafter in drafters:
        if isinstance(drafter, str):
            drafter = Contender.named(drafter, draft_model)
        if not isinstance(drafter, Contender):
            raise TypeError(
                f"drafters must hold names or Contender(name, make), not {drafter!r:.100}: a drafter that is used for "
                "several prompts would remember them"
            )
        contenders.append(drafter)
    names = [contender.name for contender in contenders]
    if len(set(names)) < len(names):
        raise ValueError(f"drafters have the same name: {', '.join(names)}; give each a name of its own")
    return contenders


def at_sizes(contenders: Sequence[Contender], max_nodes: Sequence[int]) -> list[Contender]:
    """Each contender at each size of the tree; named after it where there are several."""
    if len(max_nodes) < 2:
        return [
            replace(contender, max_nodes=nodes)
            for contender in contenders
            for nodes in max_nodes or (contender.max_nodes,)
        ]
    return [replace(c, name=f"{c.name}{AT_SIZE.format(n)}", max_nodes=n) for c in contenders for n in max_nodes]


def and_compiled(contenders: Sequence[Contender]) -> list[Contender]:
    """The contenders, and then each of them compiled; where that cannot be had it is left out, with the reason."""
    return [*contenders, *(replace(c, name=f"{c.name}, compiled", compiled=True, optional=True) for c in contenders)]


def methods_of(
    model: Any,
    contenders: Sequence[Contender],
    part: Part,
    draft_model: Any = None,
    assisted_kwargs: dict[str, Any] | None = None,
    compiled: CompiledGenerate | None = None,
) -> list[Method]:
    """All methods of a part; plain `generate`, which the others are compared with, is the first.

    Args:
        model: The target.
        contenders: Drafting off, and the drafters.
        part: Of the benchmark. When sampling, transformers' own speculation keeps the distribution, but draws other
            tokens.
        draft_model: For transformers' assisted generation.
        assisted_kwargs: What that needs besides.
        compiled: The model's own `generate` at its fastest; None to leave it out.
    """
    theirs = [
        replace(method, guarantee="distribution") if part.temperature > 0 and method.name != HF_GENERATE else method
        for method in hf_methods(model, draft_model, assisted_kwargs)
    ]
    if compiled is not None:
        theirs.insert(1, Method(COMPILED, compiled.prepare, optional=True))
    return [*theirs, *(contender.method(model, part.name) for contender in contenders)]
