"""What a user calls: `accelerate`, `speculate` and `SpeculativeModel`."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedModel
from transformers.generation import GenerationMixin, StoppingCriteriaList, StopStringCriteria

from specdec.budget import Budget
from specdec.budgeting.profiles import Tuning, load_profile, save_profile, tune
from specdec.drafters import DRAFTERS, AutoDrafter, DraftModelDrafter, MergedDrafter
from specdec.drafters.base import Drafter
from specdec.drafters.published import published_drafter
from specdec.generation import Speculation
from specdec.inspection.explain import explain
from specdec.passes.attention.choice import AttentionLike, check_attention
from specdec.passes.capability import Capability, check_mode
from specdec.passes.compiled.passes import CompileMode, check_compile_mode
from specdec.passes.cuda_graphs.store import GraphMode, check_graph_mode
from specdec.passes.near_ties import check_guard
from specdec.report import SpeculationReport
from specdec.target import unwrapped
from specdec.verifiers import VERIFIERS
from specdec.verifiers.base import Verifier
from specdec.warm_up import warm_up

DrafterLike = str | Drafter | PreTrainedModel | Sequence[str | Drafter | PreTrainedModel] | None
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
    near_tie_guard: bool | float = False,
    budget: Budget | None = None,
    cuda_graphs: GraphMode = "auto",
    compiled: CompileMode = False,
    deterministic: bool = False,
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
        attention: What computes attention over trees: `"auto"` (on a GPU the fastest that is installed, elsewhere the
            model's own), `"model"`, `"sdpa"`, `"flex"`, `"triton"`, `"flash"`, or a list to choose of by measurement.
        near_tie_guard: Let a pass over one token decide where the two best tokens are closer than a wide pass rounds:
            for bfloat16 and float16, see docs/exactness.md for how far that goes. True: closer than what was measured
            on this model; a number is the gap of logits.
        budget: Takes the place of the budget that `max_nodes` would make.
        cuda_graphs: Replay whole steps as CUDA graphs: `"auto"` where that is possible, True to demand it, False for
            never. `"eager"` runs the same step of static shapes without capturing it, on any device, for tests.
        compiled: Compile the model's passes ahead of time, which takes minutes once per model and machine. `"auto"`:
            use what was compiled before, else compile in the background while eager passes run; see docs/compiled.md.
        deterministic: Choose drafts and tree sizes by the call's own text alone, not by the clock nor by what earlier
            calls taught: the same call gives the same tokens in every process, in bfloat16 and float16 too; see
            docs/exactness.md.

    Returns:
        A stand-in for `model`, with `generate`, `report`, `capability`, `drafter` and `verifier`.

    Raises:
        TypeError: `model` is not a transformers model, or drafter or verifier are of no known kind.
        ValueError: A name or a setting is not known, or the model cannot generate.
    """
    _check_model(model)
    speculation = _speculation(
        drafter,
        verifier,
        strict,
        max_nodes,
        capability,
        attention,
        near_tie_guard,
        budget,
        cuda_graphs,
        compiled,
        deterministic,
    )
    fast = SpeculativeModel(model, speculation)
    fast.speculation.bind(unwrapped(model))
    warm_up()
    return fast


def speculate(
    drafter: DrafterLike = "auto",
    verifier: str | Verifier = "exact",
    strict: bool = False,
    *,
    max_nodes: int = 64,
    capability: str = "auto",
    attention: AttentionLike = "auto",
    near_tie_guard: bool | float = False,
    budget: Budget | None = None,
    cuda_graphs: GraphMode = "auto",
    compiled: CompileMode = False,
    deterministic: bool = False,
    streamer: Any = None,
    trace: bool = False,
) -> Speculation:
    """The same as `accelerate`, for transformers' own hook: `model.generate(..., custom_generate=speculate(...))`.

    Arguments are those of `accelerate`, and:

    Args:
        streamer: `generate` does not hand its streamer to a custom method; pass it here, and not there.
        trace: Note in `report.trace` which pass and which source each token came from.

    Returns:
        A callable to pass as `custom_generate`. Keep it and pass it again to let the drafter remember; `.report` tells
        about its last call.
    """
    speculation = _speculation(
        drafter,
        verifier,
        strict,
        max_nodes,
        capability,
        attention,
        near_tie_guard,
        budget,
        cuda_graphs,
        compiled,
        deterministic,
    )
    speculation.streamer, speculation.is_traced = streamer, trace
    return speculation


def _speculation(
    drafter: DrafterLike,
    verifier: str | Verifier,
    strict: bool,
    max_nodes: int,
    capability: str,
    attention: AttentionLike,
    near_tie_guard: bool | float,
    budget: Budget | None,
    cuda_graphs: GraphMode,
    compiled: CompileMode,
    deterministic: bool,
) -> Speculation:
    check_mode(capability)
    check_attention(attention)
    check_graph_mode(cuda_graphs)
    check_compile_mode(compiled)
    if deterministic and compiled == "auto":
        raise ValueError(
            "compiled='auto' cannot be used with deterministic=True: passes round differently once they are compiled, "
            "whenever that is; use compiled=True or compiled=False"
        )
    drafter, verifier = resolve_drafter(drafter), resolve_verifier(verifier)
    check_guard(near_tie_guard, verifier)
    budget = budget or Budget(max_nodes)
    arguments = drafter, verifier, budget, strict, capability, attention, near_tie_guard, cuda_graphs, compiled
    return Speculation(*arguments, deterministic)


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
        if drafter in DRAFTERS:
            return DRAFTERS[drafter]()
        if "/" in drafter or os.path.isdir(drafter):
            return published_drafter(drafter)
        known = ", ".join(map(repr, DRAFTERS))
        raise ValueError(
            f"drafter={drafter!r} is not known; use one of {known}, the folder or hub name of a draft checkpoint, a "
            "Drafter, or None for none"
        )
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


def _check_model(model: Any) -> None:
    if isinstance(model, SpeculativeModel):
        raise TypeError("this model is accelerated already; pass its .model to wrap it another way")
    if isinstance(model, str):
        raise TypeError(f"model={model!r} is a name; load it first: AutoModelForCausalLM.from_pretrained({model!r})")
    if not hasattr(model, "generate") or not hasattr(model, "config"):
        raise TypeError(f"model must be a transformers causal LM, not {type(model).__name__}")
    can_generate = getattr(model, "can_generate", lambda: True)
    if not can_generate():
        raise ValueError(
            f"{type(model).__name__} cannot generate text; load a causal LM, "
            "for instance with AutoModelForCausalLM.from_pretrained(...)"
        )


def _stop_strings(kwargs: dict[str, Any]) -> Any:
    return kwargs.get("stop_strings") or getattr(kwargs.get("generation_config"), "stop_strings", None)


class SpeculativeModel:
    """A stand-in for a causal LM whose `generate()` speculates. Everything else is the model's own.

    Args:
        model: The wrapped model.
        speculation: How to speculate.
    """

    model: Any
    speculation: Speculation

    def __init__(self, model: Any, speculation: Speculation) -> None:
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "speculation", speculation)

    @property
    def drafter(self) -> Drafter | None:
        """What guesses; None when drafting is off."""
        return self.speculation.drafter

    @property
    def verifier(self) -> Verifier:
        """What accepts."""
        return self.speculation.verifier

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
        plain = accelerate(self.model, None, capability=self.speculation.capability, compiled=self.speculation.compiled)
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
        if "custom_generate" in kwargs:
            raise ValueError("custom_generate cannot be combined with specdec.accelerate; call .model.generate instead")
        if len(args) > 1:  # generate(inputs, generation_config, ...)
            names = list(inspect.signature(GenerationMixin.generate).parameters)[1:]
            args, kwargs = args[:1], {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}
        reason = self._out_of_reach(kwargs)
        if reason is not None:
            self.speculation.begin_fallback(reason)
            return self.model.generate(*args, **kwargs)
        # `generate` sends a custom method neither streamer nor tokenizer, so both are brought in from here.
        decode = partial(self.speculation, streamer=kwargs.get("streamer"), trace=trace)
        return self.model.generate(*args, custom_generate=decode, **self._with_stop_strings(kwargs))

    def _out_of_reach(self, kwargs: dict[str, Any]) -> str | None:
        """Why a call must not even be tried with a custom decoding method, or None."""
        for name in ("assistant_model", "prompt_lookup_num_tokens", "token_healing"):
            if kwargs.get(name) or getattr(kwargs.get("generation_config"), name, None):
                return f"{name} is given"
        if getattr(self.model.config, "is_encoder_decoder", False):
            return "the model is an encoder-decoder"
        if getattr(self.model.generation_config, "stop_strings", None) and not _stop_strings(kwargs):
            return "stop_strings are set in the model's generation_config; pass them to generate()"
        return None

    def _with_stop_strings(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Turns stop strings into the criterion that `generate` would make of them."""
        strings, tokenizer = _stop_strings(kwargs), kwargs.get("tokenizer")
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
        setattr(self.model, name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.model)})

    def __repr__(self) -> str:
        name = self.drafter.name if self.drafter else None
        return f"SpeculativeModel({type(self.model).__name__}, drafter={name!r}, verifier={self.verifier.name!r})"
