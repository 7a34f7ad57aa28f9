"""What a user calls: `accelerate`, `speculate` and `SpeculativeModel`."""

from __future__ import annotations

import copy
import functools
import inspect
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from transformers.generation import GenerationMixin, StoppingCriteriaList, StopStringCriteria

from specdec.budget import Budget
from specdec.budgeting.profiles import Tuning, load_profile, save_profile, tune
from specdec.drafters.base import Drafter
from specdec.drafters.by_name import DrafterLike, resolve_drafter
from specdec.fallback import before_generate, stop_strings
from specdec.generation import Speculation
from specdec.inspection.explain import explain
from specdec.passes.attention.choice import AttentionLike
from specdec.passes.capability import Capability
from specdec.passes.compiled.passes import CompileMode
from specdec.passes.cuda_graphs.store import GraphMode
from specdec.report import SpeculationReport
from specdec.session import Session, Tokens
from specdec.settings import Memory, Settings
from specdec.target import unwrapped
from specdec.verifiers.base import Verifier
from specdec.verifiers.by_name import resolve_verifier
from specdec.warm_up import warm_up

RETURN_SELF = frozenset({"to", "cuda", "cpu", "eval", "train", "float", "half", "bfloat16", "requires_grad_"})


def accelerate(
    model: Any,
    drafter: DrafterLike = "auto",
    verifier: str | Verifier = "exact",
    strict: bool = False,
    *,
    max_nodes: int = 64,
    capability: str = "auto",
    attention: AttentionLike = "auto",
    budget: Budget | None = None,
    cuda_graphs: GraphMode = "auto",
    compiled: CompileMode = False,
    deterministic: bool = False,
    memory: Memory = "process",
) -> SpeculativeModel:
    """Wraps a causal LM so that `generate()` gives the same tokens sooner.

    Args:
        model: A transformers causal LM, or a PEFT model around one. It is not changed.
        drafter: A name (`"auto"`, `"lookahead"`, ...), a `Drafter`, a smaller model with the same tokenizer, a list of
            these to be merged, or None for no drafting.
        verifier: `"exact"` or a `Verifier`.
        strict: Raise a drafter's errors instead of going on without it.
        max_nodes: Largest token tree per target pass, root included: 1, 2, 4, ... 128.
        capability: `"auto"` to find out by a probe how the model can be run ahead, or `"tree"`, `"chain"`, `"plain"`.
        attention: What computes attention over trees: `"auto"` (on a GPU `"triton"`, or `"sdpa"` where that cannot do
            what the model needs; elsewhere `"model"`), `"model"`, `"sdpa"`, `"triton"` or `"flash"`.
        budget: Takes the place of the budget that `max_nodes` would make.
        cuda_graphs: Replay whole steps as CUDA graphs: `"auto"` where that is possible, True to demand it, False for
            never. `"eager"` runs the same step of static shapes without capturing it, on any device, for tests.
        compiled: Compile the model's passes ahead of time, which takes minutes once per model and machine. `"auto"`:
            use what was compiled before, else compile in the background while eager passes run; see docs/compiled.md.
        deterministic: Choose drafts and tree sizes by the call's own text alone, not by the clock nor by what earlier
            calls taught: the same call gives the same tokens in every process, in bfloat16 and float16 too; see
            docs/exactness.md.
        memory: How long drafters remember outputs: `"process"`, for later calls of this wrapper, whoever makes them
            (Lookahead keeps up to 256 MiB), or `"call"`, so that no call is told of another one's text. Wrappers never
            share what they remember, unless they are given the same `Drafter`.

    Returns:
        A stand-in for `model`, with `generate`, `report`, `capability`, `drafter` and `verifier`.

    Raises:
        TypeError: `model` is not a transformers model, or drafter or verifier are of no known kind.
        ValueError: A name or a setting is not known, or the model cannot generate.
    """
    _check_model(model)
    settings = _settings(
        drafter,
        verifier,
        strict,
        max_nodes=max_nodes,
        budget=budget,
        capability=capability,
        attention=attention,
        cuda_graphs=cuda_graphs,
        compiled=compiled,
        deterministic=deterministic,
        memory=memory,
    )
    fast = _stand_in(type(model).__name__)(model, Speculation(settings))
    fast.speculation.bind(unwrapped(model))
    warm_up()
    return fast


def speculate(
    drafter: DrafterLike = "auto",
    verifier: str | Verifier = "exact",
    strict: bool = False,
    *,
    streamer: Any = None,
    trace: bool = False,
    **settings: Any,
) -> Speculation:
    """The same as `accelerate`, for transformers' own hook: `model.generate(..., custom_generate=speculate(...))`.

    Args:
        drafter: As for `accelerate`.
        verifier: As for `accelerate`.
        strict: As for `accelerate`.
        streamer: `generate` does not hand its streamer to a custom method; pass it here, and not there.
        trace: Note in `report.trace` which pass and which source each token came from.
        settings: The other arguments of `accelerate`.

    Returns:
        A callable to pass as `custom_generate`. Keep it and pass it again to let the drafter remember; `.report` tells
        about its last call.
    """
    return Speculation(_settings(drafter, verifier, strict, **settings), streamer, trace)


def _settings(
    drafter: DrafterLike,
    verifier: str | Verifier,
    strict: bool,
    *,
    max_nodes: int = 64,
    budget: Budget | None = None,
    **others: Any,
) -> Settings:
    """Settings of the arguments of `accelerate`."""
    return Settings(resolve_drafter(drafter), resolve_verifier(verifier), strict, budget or Budget(max_nodes), **others)


@functools.cache
def _stand_in(name: str) -> type[SpeculativeModel]:
    """The class of stand-ins for models whose class has this name: programs look models up by that."""
    return type(name, (SpeculativeModel,), {"__module__": SpeculativeModel.__module__})


def _check_model(model: Any) -> None:
    if isinstance(model, SpeculativeModel):
        raise TypeError("this model is accelerated already; pass its .model to wrap it another way")
    if isinstance(model, str):
        raise TypeError(f"model={model!r} is a name; load it first: AutoModelForCausalLM.from_pretrained({model!r})")
    if not hasattr(model, "generate") or not hasattr(model, "config"):
        raise TypeError(f"model must be a transformers causal LM, not {type(model).__name__}")
    inner = unwrapped(model)
    can_generate = getattr(inner, "can_generate", lambda: True)
    if not can_generate():
        raise ValueError(
            f"{type(model).__name__} cannot generate text; load a causal LM, "
            "for instance with AutoModelForCausalLM.from_pretrained(...)"
        )
    if not isinstance(inner, GenerationMixin):
        raise TypeError(
            f"model is a {type(model).__name__}, whose generate() is not that of transformers; pass the transformers "
            "model inside it"
        )
    parameters = inspect.signature(model.generate).parameters
    if "custom_generate" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise TypeError(
            f"generate() of {type(model).__name__} takes {', '.join(parameters)} only, so that no decoding method can "
            f"be handed to it; pass the {type(inner).__name__} inside it"
        )


class SpeculativeModel:
    """A stand-in for a causal LM whose `generate()` speculates. Everything else is the model's own.

    Args:
        model: The wrapped model.
        speculation: How to speculate.
    """

    model: Any
    speculation: Speculation
    _thread: threading.local

    def __init__(self, model: Any, speculation: Speculation) -> None:
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "speculation", speculation)
        object.__setattr__(self, "_thread", threading.local())

    @property
    def drafter(self) -> Drafter | None:
        """What guesses; None when drafting is off. May be set, to whatever `accelerate` takes."""
        return self.speculation.drafter

    @drafter.setter
    def drafter(self, drafter: DrafterLike) -> None:
        self.speculation.change(unwrapped(self.model), drafter=resolve_drafter(drafter))

    @property
    def verifier(self) -> Verifier:
        """What accepts. May be set, to whatever `accelerate` takes."""
        return self.speculation.verifier

    @verifier.setter
    def verifier(self, verifier: str | Verifier) -> None:
        self.speculation.change(unwrapped(self.model), verifier=resolve_verifier(verifier))

    @property
    def report(self) -> SpeculationReport:
        """Report of the last `generate()` call."""
        return self.speculation.report

    @property
    def capability(self) -> Capability:
        """How this model can be run ahead; found out at first use."""
        return self.speculation.capability_of(unwrapped(self.model))

    def explain(self) -> None:
        """Prints what is used, at what size and why, and what each source of drafts has earned in the last call."""
        print(explain(self.speculation))

    def tune(self, prompts: Sequence[Any], max_new_tokens: int = 64, **kwargs: Any) -> Tuning:
        """Measures on prompts of one's own, with and without drafts in turn, and keeps what is learned.

        Args:
            prompts: Token ids, or what a tokenizer returns, as many as there is time for; each may be a batch.
            max_new_tokens: Tokens generated of each.
            kwargs: Other arguments of `generate`, as later calls will have them.

        Returns:
            Tokens and seconds with and without drafts. The random generators are left as they were.
        """
        settings = self.speculation.settings
        plain = accelerate(self.model, None, capability=settings.capability, compiled=settings.compiled)
        return tune(self, plain, prompts, max_new_tokens, **kwargs)

    def save_profile(self, path: str | os.PathLike[str], text: str = "") -> None:
        """Writes step times, costs of sources and acceptance counts to a file, so that a new process starts with them.

        Args:
            path: JSON file; one for each kind of text is best.
            text: What kind of text it was.
        """
        save_profile(self.speculation, self.model, path, text)

    def load_profile(self, path: str | os.PathLike[str]) -> str:
        """Takes up what `save_profile` has written; returns the kind of text.

        Raises:
            ValueError: The file is damaged, or of another model, device, or drafter.
        """
        return load_profile(self.speculation, self.model, path)

    def generate(self, *args: Any, trace: bool = False, **kwargs: Any) -> Any:
        """`model.generate` with the same arguments and the same result, sooner.

        Args:
            args: Those of `model.generate`.
            trace: Note in `report.trace` which pass and which source each token came from.
            kwargs: Those of `model.generate`.
        """
        is_custom = "custom_generate" in kwargs
        if (patched := self._patched()) is not None and (is_custom or getattr(self._thread, "depth", 0) > 0):
            return type(patched).generate(patched, *args, **kwargs)
        if is_custom:
            raise ValueError("custom_generate cannot be combined with specdec.accelerate; call .model.generate instead")
        if len(args) > 1:  # generate(inputs, generation_config, ...)
            names = list(inspect.signature(GenerationMixin.generate).parameters)[1:]
            args, kwargs = args[:1], {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}
        reason = before_generate(self.model, kwargs)
        if reason is not None:
            self.speculation.begin_fallback(reason)
            return self._generate_of_model(*args, **kwargs)
        # `generate` sends a custom method no streamer, tokenizer or synced_gpus, so they are brought in from here.
        synced_gpus = bool(kwargs.get("synced_gpus"))
        decode = partial(self.speculation, synced_gpus=synced_gpus, streamer=kwargs.get("streamer"), trace=trace)
        report = self.speculation.report
        output = self._generate_of_model(*args, custom_generate=decode, **self._with_stop_strings(kwargs))
        if self.speculation.report is report:
            self.speculation.begin_fallback(f"generate() of {type(self.model).__name__} decodes in a way of its own")
        return output

    def _patched(self) -> Any:
        """The model, or the one inside it, whose `generate` is this stand-in's: `model.generate = fast.generate`."""
        models = self.model, unwrapped(self.model)
        return next((m for m in models if getattr(vars(m).get("generate"), "__self__", None) is self), None)

    def _generate_of_model(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `generate`; where this stand-in's is in its place, that comes back here and goes beneath."""
        self._thread.depth = getattr(self._thread, "depth", 0) + 1
        try:
            return self.model.generate(*args, **kwargs)
        finally:
            self._thread.depth -= 1

    def session(self, input_ids: Tokens, attention_mask: Tensor | None = None, **generate_kwargs: Any) -> Session:
        """A text on a live kv cache, to generate, feed, score and roll back; see docs/session.md.

        Args:
            input_ids: The prompts, left-padded, `[batch, prompt]`, or one row's list of ids.
            attention_mask: Zero at padding.
            generate_kwargs: Arguments of every `generate` of the session; `tokenizer=...` for stop strings.

        Returns:
            A context manager that frees the cache at its end.
        """
        verifier, drafter = self.speculation.verifier, self.drafter
        report = SpeculationReport(drafter.name if drafter else "none", verifier.name, verifier.guarantee)
        arguments = input_ids, attention_mask, None, report
        return Session(self.model, self.generate, lambda: self.report, *arguments, **generate_kwargs)

    def _with_stop_strings(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Turns stop strings into the criterion that `generate` would make of them."""
        strings, tokenizer = stop_strings(kwargs), kwargs.get("tokenizer")
        if not strings or tokenizer is None:
            return kwargs  # without a tokenizer generate() says what is missing
        kwargs = {name: value for name, value in kwargs.items() if name != "stop_strings"}
        if kwargs.get("generation_config") is not None:
            kwargs["generation_config"] = copy.deepcopy(kwargs["generation_config"])
            kwargs["generation_config"].stop_strings = None
        criterion = StopStringCriteria(tokenizer, strings)
        kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or []), criterion])
        return kwargs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(object.__getattribute__(self, "model"), name)
        return self._returning_self(value) if name in RETURN_SELF else value

    def _returning_self(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            return self if result is self.model else result

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("model", "speculation"):
            raise AttributeError(f"{name} cannot be replaced; call specdec.accelerate again")
        own = hasattr(SpeculativeModel, name)  # such attributes never reach the model
        (object.__setattr__ if own else setattr)(self if own else self.model, name, value)

    def __copy__(self) -> SpeculativeModel:
        return type(self)(self.model, self.speculation)

    def __deepcopy__(self, memo: dict[int, Any]) -> SpeculativeModel:
        """Copies the model, the settings and what was learned; caches start empty."""
        fast = type(self)(copy.deepcopy(self.model, memo), copy.deepcopy(self.speculation, memo))
        fast.speculation.bind(unwrapped(fast.model))
        return fast

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a SpeculativeModel cannot be pickled; pickle its .model, and call specdec.accelerate on that")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.model)})

    def __repr__(self) -> str:
        name = self.drafter.name if self.drafter else None
        return f"SpeculativeModel({type(self.model).__name__}, drafter={name!r}, verifier={self.verifier.name!r})"
