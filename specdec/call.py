"""One call of a decoding method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from specdec.compat import CACHE, is_handed_in
from specdec.target import CausalLM


@dataclass(frozen=True)
class Call:
    """What `generate` hands to its decoding method.

    Args:
        model: The target.
        input_ids: The prompts, `[batch, prompt]`.
        processors: Logits processors, those of the generation config included.
        criteria: Stopping criteria, those of the generation config included.
        config: As prepared by `generate`.
        model_kwargs: Masks, positions, the cache, whatever else the forward takes.
        synced_gpus: All processes must run the same number of passes.
        streamer: Takes the tokens; None for none.
        is_traced: The report is to have a trace.
    """

    model: CausalLM
    input_ids: Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    model_kwargs: dict[str, Any]
    synced_gpus: bool = False
    streamer: Any = None
    is_traced: bool = False

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return len(self.input_ids)

    @property
    def keeps_scores(self) -> bool:
        """Whether scores or logits of each position are returned."""
        return bool(self.config.return_dict_in_generate and (self.config.output_scores or self.config.output_logits))

    @property
    def keeps_cache(self) -> bool:
        """Whether the caller will look at the kv cache afterwards."""
        return bool(self.config.return_dict_in_generate) or is_handed_in(self.model_kwargs.get(CACHE))
