"""The probe: what can be shown to a model in one forward, found out by trying."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig

from specdec.compat import CACHE, cache_layers
from specdec.kv_cache import ATTENTION_LAYER_TYPES
from specdec.passes import capability_store
from specdec.passes.attention.base import TreeAttention
from specdec.passes.attention.choice import AttentionLike, backend_of, candidates
from specdec.passes.chain_target import ChainTarget
from specdec.passes.cuda_graphs.fingerprint import changes, out_of_sight
from specdec.passes.masks import MaskFormat
from specdec.passes.probe import Trial, branching, chain, first_problem, is_passing, prompts_of
from specdec.passes.tolerance import floor_of, remember_noise, typical_noise
from specdec.target import CausalLM, TreeTarget, accepts, input_device

Mode = Literal["tree", "chain", "plain"]
MODES: tuple[Mode, ...] = ("tree", "chain", "plain")


@dataclass(frozen=True)
class Capability:
    """How a model can be run ahead.

    Args:
        mode: `"tree"`: branching trees in one forward. `"chain"`: one branch, rolled back by the model's own kind of
            cache. `"plain"`: not at all; the model's own `generate` does the work.
        reason: Why, in words.
        mask_format: How the model takes tree masks; None unless `mode` is `"tree"`.
        attention: What computes tree attention: the first of the candidates that is right for this model.
        rejected: Backends that were tried before, and why they are not used.
        rounding: How far logits of a wide pass are from those of passes over one token, root mean square, in units of
            logits; None where not tried.
        cuda_graphs: Whether steps are replayed as CUDA graphs, and why not, in words; empty where it is not told.
        compiled: Whether passes are compiled, and why not, in words; empty where that is not asked for.
    """

    mode: Mode
    reason: str
    mask_format: MaskFormat | None = None
    attention: str = "model"
    rejected: Mapping[str, str] = field(default_factory=dict)
    rounding: float | None = None
    cuda_graphs: str = ""
    compiled: str = ""

    def __str__(self) -> str:
        text = f"{self.mode}: {self.reason}"
        if self.attention != "model":
            text += f"; attention by {self.attention}"
        text += "".join(f"; not by {name} ({why})" for name, why in self.rejected.items())
        text += f"; CUDA graphs: {self.cuda_graphs}" if self.cuda_graphs else ""
        return text + (f"; compiled: {self.compiled}" if self.compiled else "")

    def attention_of(self, model: CausalLM, wanted: AttentionLike) -> str:
        """In words, what computes attention over trees, and why.

        Args:
            model: The target.
            wanted: What the caller said.
        """
        implementation = model.config.get_text_config(decoder=True)._attn_implementation
        text = f"the model's own ({implementation})" if self.attention == "model" else self.attention
        if wanted != "auto":
            text += f"; demanded by attention={wanted!r}"
        elif input_device(model).type == "cpu":
            text += "; on a CPU nothing else is tried"
        return text + "".join(f"; not by {name} ({why})" for name, why in self.rejected.items())

    def backend(self) -> TreeAttention | None:
        """Computes tree attention; None for what the model was loaded with."""
        return backend_of(self.attention)


BATCH_DEPENDENT = (
    "logits depend on what else is in a pass, as where activations are quantised by one scale: tokens would be "
    "approximate up to quantisation; capability='tree' or 'chain' takes that as it is"
)

_KNOWN: WeakKeyDictionary[CausalLM, dict[Any, Capability]] = WeakKeyDictionary()


def check_mode(mode: str) -> None:
    """Refuses what `probe` does not know.

    Raises:
        ValueError: `mode` is neither `"auto"` nor one of `MODES`.
    """
    if mode not in ("auto", *MODES):
        raise ValueError(f"capability={mode!r} is not known; use 'auto' or one of {', '.join(map(repr, MODES))}")


def probe(model: CausalLM, mode: str = "auto", attention: AttentionLike = "auto") -> Capability:
    """Tells how `model` can be run ahead, by comparing a tiny tree with the same paths run one token at a time.

    Nine passes: a tree of five nodes goes through the public forward in several left-padded rows that differ in some
    tokens; rows keep different paths, and a second tree follows. Tokens that are not before a node must leave its
    logits bit for bit as they are, others must move them, and all logits must be those of plain decoding up to the
    model's own rounding noise: the difference between its prefill and its passes over one token. If so, trees it is;
    if not, the same is tried with a chain; if that is wrong too, plain decoding is left. The answer is kept per model,
    attention implementation and dtype.

    Args:
        model: The target.
        mode: `"auto"`, or a mode to take without trying.
        attention: `"auto"`, or the name of a backend of tree attention.

    Raises:
        ValueError: `mode` is not known, or trees or a backend are demanded of layers that have no place for them.
    """
    check_mode(mode)
    found = _found(model, mode, attention)
    if attention not in ("auto", "model") and found.mode != "tree":
        raise ValueError(
            f"attention={attention!r} cannot be used with {type(model).__name__}: {found.reason}; use attention='auto'"
        )
    return found


def _found(model: CausalLM, mode: str, attention: AttentionLike) -> Capability:
    """What is demanded, or known, or found out by trying."""
    if mode in ("plain", "chain"):
        return Capability(cast(Mode, mode), "demanded by the caller")
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    names = tuple(candidates(attention, implementation, input_device(model)))
    key = (mode, names, implementation, model.dtype, changes(model))
    known = _KNOWN.setdefault(model, {})
    if key not in known:
        if mode == "tree":  # nothing is tried
            return known.setdefault(key, _demanded_tree(model, names))
        file = capability_store.file_of(model, key)
        if stored := capability_store.read(file, model, names):
            return known.setdefault(key, stored)
        try:
            found = _probe(model, names)
        except Exception as error:
            if not is_passing(error):
                raise
            return Capability("plain", f"the probe failed, and is tried again: {type(error).__name__}: {error}")
        if found.mode == "plain" and (what := out_of_sight(model)):  # which may have met another batch than its own
            return replace(found, reason=f"{found.reason} (with {what})")
        known[key] = found
        if known[key].mode != "plain":
            capability_store.write(file, model, known[key])
    return known[key]


def _demanded_tree(model: CausalLM, names: tuple[str, ...]) -> Capability:
    formats, problem = _mask_formats(model)
    if problem:
        raise ValueError(f"capability='tree' cannot be used with {type(model).__name__}: {problem}")
    return Capability("tree", "demanded by the caller", formats[0], names[0])


def _mask_formats(model: CausalLM) -> tuple[list[MaskFormat], str | None]:
    """Ways to hand this model a tree mask, the likeliest first, or why there is none."""
    try:
        layers = cache_layers(model.config.get_text_config(decoder=True))
    except Exception as error:  # configs of remote code may lack what transformers reads
        return [], f"its layers cannot be told from its config ({type(error).__name__}: {error})"
    kinds = tuple(dict.fromkeys(kind for kind, _ in layers if kind != "dummy"))
    if other := set(kinds) - ATTENTION_LAYER_TYPES:
        return [], f"it has {', '.join(sorted(other))} layers"
    if missing := [name for name in ("attention_mask", "position_ids") if not accepts(model, name)]:
        return [], f"its forward takes no {' and no '.join(missing)}"
    reach: dict[str, set[int]] = {"sliding_attention": set(), "chunked_attention": set()}
    for kind, settings in layers:
        if kind in reach:
            reach[kind].add(settings["sliding_window"])
    if any(len(values) > 1 for values in reach.values()):
        return [], "its layers have windows of different lengths"
    window, chunk = (next(iter(values), None) for values in reach.values())
    additive = model.config.get_text_config(decoder=True)._attn_implementation == "eager"
    options = itertools.product((len(kinds) > 1, False), (additive, not additive))
    formats = [MaskFormat(add, by_type, kinds, window, chunk) for by_type, add in options]
    return list(dict.fromkeys(f for f in formats if f.by_layer_type or len(kinds) == 1)), None


def _probe(model: CausalLM, names: tuple[str, ...]) -> Capability:
    """Tries a prompt, and a second one where the first leaves a doubt.

    Raises:
        Exception: One that may pass, such as a lack of memory.
    """
    with kept_generators(model):
        state = torch.get_rng_state()
        found, is_doubtful = _tried(model, names, seed=0)
        if is_doubtful:
            found, _ = _tried(model, names, seed=1)
        draws = not torch.equal(torch.get_rng_state(), state)
    if draws and any(module.training for module in model.modules()):
        return Capability("plain", "its passes draw random numbers, as dropout in training mode does")
    return found


@contextmanager
def kept_generators(model: CausalLM) -> Iterator[None]:
    """Restores the random generators: models in training mode draw in each pass."""
    device = input_device(model)
    devices = [device] if device.type not in ("cpu", "meta") else []
    kind = device.type if devices else "cuda"
    with torch.random.fork_rng(devices=devices, device_type=kind):
        yield


def _tried(model: CausalLM, names: tuple[str, ...], seed: int) -> tuple[Capability, bool]:
    """What one prompt tells, and whether it was a close call."""
    found: list[tuple[Capability, bool]] = []

    def inside(
        model: CausalLM,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor:
        model_kwargs = {k: v for k, v in model_kwargs.items() if k not in ("synced_gpus", "streamer")}
        found.append(_compare(Trial(model, input_ids, generation_config, model_kwargs, seed), names))
        return input_ids

    ids, mask = prompts_of(model.config.get_text_config(decoder=True).vocab_size, seed)
    try:
        with torch.no_grad():
            model.generate(
                ids.to(input_device(model)),
                attention_mask=mask.to(input_device(model)),
                max_new_tokens=16,
                do_sample=False,
                num_beams=1,
                return_dict_in_generate=False,
                custom_generate=inside,
            )
    except Exception as error:
        if is_passing(error):
            raise
        return Capability("plain", f"the probe failed: {type(error).__name__}: {error}"), False
    return found[0]


def _compare(trial: Trial, names: tuple[str, ...]) -> tuple[Capability, bool]:
    if trial.model_kwargs.get(CACHE) is None:
        return Capability("plain", "it keeps no cache that transformers can hand to it"), False
    trial.run_reference()
    if trial.depends_on_batch():
        return Capability("plain", BATCH_DEPENDENT), False
    formats, problem = _mask_formats(trial.model)
    is_doubtful, dtype = False, trial.model.dtype
    for mask_format in formats:
        problems: dict[str, str] = {}
        for name in names:
            trial.begin()
            arguments = trial.model, trial.generation_config, trial.fresh_kwargs(), mask_format
            target = TreeTarget(*arguments, attention=backend_of(name))
            failed = first_problem(partial(branching, target, trial))
            if failed is None:
                own = trial.noise if trial.largest > floor_of(dtype) else trial.largest
                remember_noise(trial.model, dtype, max(own, typical_noise(dtype)))
                rounding = max(trial.largest, typical_noise(dtype)) * trial.spread
                reason = "a branching tree gives the logits of plain decoding"
                found = Capability("tree", reason, mask_format, name, problems, rounding)
                return found, trial.is_doubtful
            problems[name] = failed
            is_doubtful |= trial.is_doubtful
        problem = "; ".join(f"{name}: {why}" if len(names) > 1 else why for name, why in problems.items())
    trial.begin()
    chains = ChainTarget(trial.model, trial.generation_config, trial.fresh_kwargs())
    chain_problem = first_problem(partial(chain, chains, trial))
    rounding = max(trial.noise if chain_problem else trial.largest, typical_noise(dtype)) * trial.spread
    if chain_problem is None:
        return Capability("chain", f"no branching trees: {problem}", rounding=rounding), is_doubtful
    reason = f"no branching trees: {problem}; no chains: {chain_problem}"
    return Capability("plain", reason, rounding=rounding), is_doubtful
