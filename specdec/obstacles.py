"""Calls of `generate` that cannot be speculated on."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from specdec import kv_cache, sampling
from specdec.compat import CACHE
from specdec.rows import stopping
from specdec.target import DECODE_KWARGS_HANDLED, CausalLM

NO_CACHE = "the model keeps no kv cache that could be rolled back"


def foreign_inputs(model: CausalLM) -> str | None:
    """Prompt-learning adapters prepare the model's inputs themselves: virtual tokens come in that nobody is told of."""
    prepare = vars(model).get("prepare_inputs_for_generation")
    if prepare is None or getattr(prepare, "__self__", None) is model:
        return None
    return "the model's inputs are prepared by something else, such as an adapter with virtual tokens"


def impossible(
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
) -> str | None:
    """Why a call cannot be speculated on, or None."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"the decoding method is {mode.value.replace('_', ' ')}"
    if not model_kwargs.get("use_cache", True):
        return "use_cache is False"
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        return "attentions or hidden states of every pass are wanted"
    past = model_kwargs.get(CACHE)
    if past is None:
        return NO_CACHE
    if not kv_cache.supports(past):
        return f"the kv cache is a {type(past).__name__}, not a DynamicCache"
    tensors = [
        name for name, value in model_kwargs.items() if isinstance(value, Tensor) and name not in DECODE_KWARGS_HANDLED
    ]
    if tensors:
        return f"the model is given {', '.join(tensors)}"
    if input_ids.ndim != 2:
        return f"input_ids have {input_ids.ndim} dimensions"
    if len(input_ids) > 1 and not stopping.pads_finished_rows(criteria):
        return "rows that stop would go on generating until all have stopped, because there is no end-of-sequence token"
    if len(input_ids) > 1 and (names := sampling.not_row_wise(processors) + stopping.not_row_wise(criteria)):
        return f"{', '.join(names)} may look at the whole batch, whose rows are at different positions"
    return None
