"""The methods that the benchmark and the demo compare: transformers' own, drafting off, and drafters."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, StaticCache

from specdec.api import SpeculativeModel, accelerate
from specdec.benchmark.measuring import Method
from specdec.budget import Budget
from specdec.compat import CACHE
from specdec.drafters import DRAFTERS
from specdec.drafters.base import Drafter
from specdec.drafters.by_name import DrafterLike, resolve_drafter
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.verifiers.base import Verifier
from specdec.verifiers.by_name import resolve_verifier

HF_GENERATE = "HF generate"
COMPILED = "HF generate, compiled"
HF_LOOKUP = "HF prompt lookup"
HF_ASSISTED = "HF assisted"
OFF = "specdec off"


@dataclass(frozen=True)
class Contender:
    """A drafter to be measured.

    Args:
        name: For tables.
        make: Returns a new drafter, or a drafter's name. Called for each run, outside the clock, so that no prompt
            profits from what the drafter saw of another one, or of itself in another repeat.
        verifier: A name or a verifier.
        optional: Leave it out, with the reason, where it cannot run.
        max_nodes: Largest token tree per target pass.
        compiled: Compile the target's passes, and the draft model's if it is asked for by name.
        whole: Verify each draft whole, whether that pays or not.
    """

    name: str
    make: Callable[[], DrafterLike]
    verifier: str | Verifier = "exact"
    optional: bool = False
    max_nodes: int = 64
    compiled: bool = False
    whole: bool = False

    @classmethod
    def named(cls, drafter: str, draft_model: Any = None, optional: bool = False) -> Contender:
        """A drafter by its name, with its default settings.

        Args:
            drafter: A name in `DRAFTERS`.
            draft_model: For a drafter that uses one.
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

    def method(self, model: Any, part: str = "") -> Method:
        """How to run it on a model; what the budget learns in one part of a benchmark is not used in another."""
        verifier = resolve_verifier(self.verifier)

        def prepare() -> SpeculativeModel:
            budget = Budget(self.max_nodes, self.whole, owner=(self.name, part))
            return accelerate(model, self._drafter(), verifier=self.verifier, budget=budget, compiled=self.compiled)

        return Method(self.name, prepare, optional=self.optional, guarantee=verifier.guarantee)

    def _drafter(self) -> Drafter | None:
        drafter = resolve_drafter(self.make())
        if self.compiled and isinstance(drafter, DraftModelDrafter):
            drafter.compiled = True
        return drafter

    def described(self) -> dict[str, Any]:
        """All settings that decide its figures, ready for JSON."""
        drafter, verifier = self._drafter(), resolve_verifier(self.verifier)
        found = {
            "drafter": drafter.name if drafter is not None else None,
            "settings": drafter.settings() if drafter is not None else {},
            "verifier": verifier.name,
            "verifier_settings": vars(verifier),
            "max_nodes": self.max_nodes,
            "compiled": self.compiled,
        }
        # A type's name for what has no value in JSON, such as a model.
        plain: dict[str, Any] = json.loads(json.dumps(found, default=lambda value: type(value).__name__))
        return plain


def contenders_of(
    drafters: Sequence[str | Contender] | None,
    draft_model: Any = None,
    max_nodes: Sequence[int] = (),
    compiled: bool = False,
) -> list[Contender]:
    """Drafting off and the drafters, at each tree size, and then all of them compiled if asked for.

    Args:
        drafters: Names or contenders; None for all, of which those that cannot run will be left out.
        draft_model: For drafters that use one.
        max_nodes: Tree sizes; none for each contender's own.
        compiled: Whether to add each one with compiled passes.

    Raises:
        TypeError: A drafter in place of what makes it.
        ValueError: A name is not known, or used twice.
    """
    if drafters is None:
        usable = {n: kind for n, kind in DRAFTERS.items() if draft_model or not issubclass(kind, DraftModelDrafter)}
        names = sorted(usable, key=lambda name: name == "auto")  # it merges the others, so it comes last
        drafters = [Contender.named(name, draft_model, optional=True) for name in names]
    found: list[Contender] = []
    for drafter in drafters:
        if isinstance(drafter, str):
            drafter = Contender.named(drafter, draft_model)
        if not isinstance(drafter, Contender):
            raise TypeError(
                f"drafters must hold names or Contender(name, make), not {drafter!r:.100}: a drafter that is used for "
                "several prompts would remember them"
            )
        found.append(drafter)
    if len({contender.name for contender in found}) < len(found):
        raise ValueError(f"drafters have the same name: {', '.join(c.name for c in found)}; give each its own")
    if len(max_nodes) > 1:
        found = [replace(c, name=f"{c.name}, {nodes} nodes", max_nodes=nodes) for c in found for nodes in max_nodes]
    elif max_nodes:
        found = [replace(c, max_nodes=max_nodes[0]) for c in found]
    found.insert(0, Contender(OFF, lambda: None))
    if compiled:
        found += [replace(c, name=f"{c.name}, compiled", compiled=True, optional=True) for c in found]
    return found


def hf_methods(
    model: Any, draft_model: Any = None, draft_kwargs: Mapping[str, Any] | None = None, is_sampled: bool = False
) -> list[Method]:
    """What transformers itself offers; plain `generate`, which the others are compared with, is the first.

    Args:
        model: The target.
        draft_model: For assisted generation, which is left out without one.
        draft_kwargs: Further arguments of assisted generation, see `assisted_kwargs`.
        is_sampled: When sampling, transformers' speculation keeps the distribution but draws other tokens.
    """
    guarantee = "distribution" if is_sampled else "token-identical"
    methods = [
        Method(HF_GENERATE, lambda: model),
        Method(HF_LOOKUP, lambda: model, {"prompt_lookup_num_tokens": 10}, optional=True, guarantee=guarantee),
    ]
    if draft_model is not None:
        kwargs = {"assistant_model": draft_model, **(draft_kwargs or {})}
        methods.append(Method(HF_ASSISTED, lambda: model, kwargs, optional=True, guarantee=guarantee))
    return methods


def assisted_kwargs(tokenizer: Any, draft_tokenizer: Any) -> dict[str, Any]:
    """What `generate` needs for a draft model with another tokenizer; nothing if both have the same vocabulary."""
    if tokenizer.get_vocab() == draft_tokenizer.get_vocab():
        return {}
    return {"tokenizer": tokenizer, "assistant_tokenizer": draft_tokenizer}


@dataclass
class CompiledGenerate:
    """`model.generate` at its fastest: one static kv cache for all prompts, and a forward compiled by torch.

    `prepare`, which is outside the clock, compiles the first time and empties the cache each time.

    Args:
        model: The target. It is not changed: what is compiled belongs to `generate`.
        rows: Prompts per call.
        longest: Tokens of the longest prompt.
        arguments: Those of `generate` that all methods are given.
    """

    model: Any
    rows: int
    longest: int
    arguments: Mapping[str, Any]
    seconds: float = 0.0
    """What compiling took, the first run included."""
    _cache: StaticCache | None = field(default=None, repr=False)

    def method(self) -> Method:
        """As a method of the benchmark; left out where it cannot be compiled."""
        return Method(COMPILED, self.prepare, optional=True)

    def prepare(self) -> CompiledGenerate:
        """Makes it ready for a run."""
        if self._cache is None:
            started = perf_counter()
            length = self.longest + self.arguments["max_new_tokens"] + 1
            self._cache = StaticCache(config=self.model.config.get_text_config(decoder=True), max_cache_len=length)
            ids = torch.ones((self.rows, self.longest), dtype=torch.int64, device=self.model.device)
            self.generate(ids, attention_mask=torch.ones_like(ids), **self.arguments)
            self.seconds = perf_counter() - started
        self._cache.reset()
        return self

    def generate(self, ids: Tensor, **kwargs: Any) -> Any:
        """`model.generate` with the cache, compiled."""
        config = CompileConfig()
        config._compile_all_devices = True  # type: ignore[assignment]  # on the CPU too
        return self.model.generate(ids, **{CACHE: self._cache}, compile_config=config, **kwargs)
