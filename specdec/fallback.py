"""Every answer to "why is this call not speculated on?", and the warnings that tell it."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from specdec import kv_cache, sampling
from specdec.call import Call
from specdec.common.provenance import versions
from specdec.compat import (
    CACHE,
    PREFILL_ONLY,
    TESTED,
    TOKEN_TYPES,
    has_default_cache,
    has_own_loop,
    is_handed_in,
    token_types,
)
from specdec.kv_cache import ATTENTION_LAYER_TYPES
from specdec.passes.capability import Capability
from specdec.passes.cuda_graphs.fingerprint import out_of_sight
from specdec.passes.tensor_parallel import is_sharded
from specdec.rows import stopping
from specdec.target import DECODE_KWARGS_HANDLED, CausalLM, cache_layer_types, unwrapped

if TYPE_CHECKING:  # drafters ask for the length limits of their models, and settings know drafters
    from specdec.settings import Settings

NO_CACHE = "the model keeps no kv cache that could be rolled back"
SWITCHING_ROPE = ("longrope", "dynamic")
"""Rotary embeddings whose frequencies depend on the largest position of the pass."""


class FallbackWarning(UserWarning):
    """The model's own `generate` did the work, because the call cannot be speculated on."""


class UnexpectedFallbackWarning(FallbackWarning):
    """The same for a model that should take drafts: most likely the installed versions do not fit together."""


# --- before `generate` prepares the call ------------------------------------------------------------------------------


def before_generate(model: Any, kwargs: dict[str, Any]) -> str | None:
    """Why a call must not even be tried with a custom decoding method, or None.

    Args:
        model: The wrapped model.
        kwargs: Arguments of `generate`.
    """
    for name in ("assistant_model", "prompt_lookup_num_tokens", "token_healing"):
        if kwargs.get(name) or getattr(kwargs.get("generation_config"), name, None):
            return f"{name} is given"
    model = unwrapped(model)
    if getattr(model.config, "is_encoder_decoder", False):
        return "the model is an encoder-decoder"
    config = copy.copy(model.generation_config)
    for name in vars(config):  # as `generate` merges them
        given = kwargs.get(name), getattr(kwargs.get("generation_config"), name, None)
        setattr(config, name, next((value for value in given if value is not None), getattr(config, name)))
    if reason := _of_mode(config):
        return reason
    if has_own_loop(model):
        return f"{type(model).__name__} has a sampling loop of its own"
    if getattr(model.generation_config, "stop_strings", None) and not stop_strings(kwargs):
        return "stop_strings are set in the model's generation_config; pass them to generate()"
    return None


def stop_strings(kwargs: dict[str, Any]) -> Any:
    """Stop strings among the arguments of `generate`."""
    return kwargs.get("stop_strings") or getattr(kwargs.get("generation_config"), "stop_strings", None)


def _of_mode(config: GenerationConfig) -> str | None:
    mode = config.get_generation_mode()
    if mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return None
    return f"the decoding method is {mode.value.replace('_', ' ')}"


# --- of the prepared call ---------------------------------------------------------------------------------------------


def obstacle(call: Call, settings: Settings) -> str | None:
    """Why a call cannot be speculated on, whatever the model can do; or None."""
    if call.synced_gpus:
        return "several processes must run the same number of passes (synced_gpus)"
    return (
        _of_inputs(call)
        or _of_outputs(call)
        or _of_batch(call)
        or _of_steps(call, settings)
        or of_processes(call.model, _needs_more(call, settings))
    )


def _of_inputs(call: Call) -> str | None:
    prepare = vars(call.model).get("prepare_inputs_for_generation")
    if prepare is not None and getattr(prepare, "__self__", None) is not call.model:
        # Prompt-learning adapters do: virtual tokens come in that nobody is told of.
        return "the model's inputs are prepared by something else, such as an adapter with virtual tokens"
    if reason := _of_mode(call.config):
        return reason
    if has_own_loop(call.model):
        return f"{type(call.model).__name__} has a sampling loop of its own"
    if not call.model_kwargs.get("use_cache", True):
        return "use_cache is False"
    past = call.model_kwargs.get(CACHE)
    if past is None:
        return NO_CACHE
    if not kv_cache.supports(past):
        return f"the kv cache is a {type(past).__name__}, not a DynamicCache"
    tensors = [
        name
        for name, value in call.model_kwargs.items()
        if isinstance(value, Tensor) and name not in DECODE_KWARGS_HANDLED | PREFILL_ONLY | {*TOKEN_TYPES}
    ]
    if tensors:
        return f"the model is given {', '.join(tensors)}"
    if token_types(call.model_kwargs) is None:
        return "the model is given token types that differ from row to row"
    if call.input_ids.ndim != 2:
        return f"input_ids have {call.input_ids.ndim} dimensions"
    return None


def _of_outputs(call: Call) -> str | None:
    config = call.config
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        return "attentions or hidden states of every pass are wanted"
    return None


def _of_batch(call: Call) -> str | None:
    if call.batch == 1:
        return None
    if not stopping.pads_finished_rows(call.criteria):
        return "rows that stop would go on generating until all have stopped, because there is no end-of-sequence token"
    if names := sampling.not_row_wise(call.processors) + stopping.not_row_wise(call.criteria):
        return f"{', '.join(names)} may look at the whole batch, whose rows are at different positions"
    return None


def _of_steps(call: Call, settings: Settings) -> str | None:
    if settings.verifier.judges_steps and call.batch > 1 and is_handed_in(call.model_kwargs.get(CACHE)):
        return "steps are written row after row, which a kv cache of several rows does not allow"
    return None


def _needs_more(call: Call, settings: Settings) -> bool:
    """Whether the verifier needs more of a draft than its tree: distributions that it was drawn from, or steps."""
    draws = settings.verifier.guarantee == "distribution" and call.config.do_sample
    return bool(draws or settings.verifier.judges_steps)


def of_processes(model: Any, needs_more: bool) -> str | None:
    """Why a tensor-parallel model cannot be speculated on, or None.

    Args:
        model: The target.
        needs_more: The verifier needs more of a draft than its tree.
    """
    if not is_sharded(model):
        return None
    if model.tp_size != dist.get_world_size():
        return f"the model is spread over {model.tp_size} of {dist.get_world_size()} processes, not over all"
    return "of a draft, its tree alone is shared between processes (tp_plan)" if needs_more else None


# --- of what the model can do -----------------------------------------------------------------------------------------


def limit(call: Call, settings: Settings, capability: Capability) -> str | None:
    """Why what the probe has found does not serve this call, or None."""
    if capability.mode == "plain":
        return capability.reason
    longest = call.config.max_length + settings.budget.max_nodes
    if (end := length_limit(call.model)) and longest > end[0]:
        return f"beyond {end[0]} tokens, draft tokens included, {end[1]}"
    if capability.mode == "tree":
        return None
    if settings.drafter is None:
        return capability.reason
    if call.batch > 1 and call.keeps_cache:
        return "the kv cache of a batch is wanted back, and rows leave it as they end"
    if call.batch > 1 and (what := out_of_sight(call.model)):
        return f"{what} may treat rows differently, and on chains rows leave the batch as they end"
    return None


def length_limit(model: CausalLM) -> tuple[int, str] | None:
    """Up to how many tokens a pass over many tokens is the same as many passes, and what changes beyond; or None.

    What the probe finds out holds for short sequences. These are the known cases, of any architecture of transformers,
    in which longer ones behave otherwise.
    """
    config = model.config.get_text_config(decoder=True)
    limits = [*_rope_limits(config)]
    if getattr(config, "attn_temperature_tuning", False) and hasattr(config, "floor_scale"):
        limits.append((int(config.floor_scale), "attention is scaled by the slot in the kv cache"))
    if "local" in getattr(config, "attention_layers", ()):
        limits.append((config.window_size, "layers have a window that their kv cache does not tell of"))
    return min(limits, default=None)


def _rope_limits(config: Any) -> list[tuple[int, str]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    found = []
    for rope in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        if (kind := rope.get("rope_type")) in SWITCHING_ROPE:
            length = rope.get("original_max_position_embeddings")
            length = length or getattr(config, "original_max_position_embeddings", None)
            found.append((int(length or config.max_position_embeddings), f"{kind} rotary embeddings change"))
    return found


def takes_drafts(model: CausalLM) -> bool:
    """Whether nothing in a model's config and signature explains why it cannot be run ahead.

    True for models whose layers all attend to a kv cache that transformers makes for them.
    """
    try:
        kinds = set(cache_layer_types(model))
    except Exception:  # configs of remote code may lack what transformers reads
        return False
    # By part of the name, as versions of transformers name it differently.
    takes_cache = any("cache" in name or "past" in name for name in inspect.signature(model.forward).parameters)
    return kinds <= ATTENTION_LAYER_TYPES | {"dummy"} and takes_cache and has_default_cache(model)


def remedy(model: CausalLM) -> str:
    """What to do about a model that should take drafts and does not."""
    installed = ", ".join(f"{name} {version or '(unknown)'}" for name, version in versions().items())
    oldest, newest = TESTED
    return (
        f"{type(model).__name__} has attention layers only and should take drafts; these versions may not fit "
        f"together: {installed}. Install transformers {oldest} to {newest}, which specdec is tested with, or a newer "
        "specdec. If the model itself is the cause, capability='plain' says so and ends this warning."
    )
