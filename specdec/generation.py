"""Between transformers' `generate()` and the decoding loop."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specdec.budget import Budget
from specdec.compat import CACHE, decoding_method, eos_tokens, is_handed_in, pad_token
from specdec.decoding import Decoder
from specdec.drafters.base import NO_NEEDS, Drafter
from specdec.drafting import CallFacts, GuardedDrafter
from specdec.fallback import FallbackWarning as FallbackWarning
from specdec.fallback import UnexpectedFallbackWarning, remedy, takes_drafts
from specdec.inspection.trace import Trace
from specdec.obstacles import NO_CACHE, foreign_inputs, impossible
from specdec.passes.attention.choice import AttentionLike
from specdec.passes.capability import Capability, probe
from specdec.passes.chain_target import ChainTarget
from specdec.passes.compiled.auto import begin_passes, describe_compiled
from specdec.passes.compiled.passes import CompileMode
from specdec.passes.cuda_graphs.step import step_for
from specdec.passes.cuda_graphs.store import GraphMode, acquire, check_demand, describe
from specdec.passes.cuda_graphs.target import StaticTarget
from specdec.passes.hidden_states import HiddenStates
from specdec.passes.length_limits import length_limit
from specdec.passes.near_ties import HALF, NearTies, gap_of
from specdec.passes.tensor_parallel import Ranks, obstacle
from specdec.report import SpeculationReport
from specdec.rows.draws import NoiseQueue
from specdec.rows.sequences import Sequences
from specdec.rows.stopping import StopRule
from specdec.rows.streaming import StreamFeeder
from specdec.sampling import Sampler
from specdec.target import CacheNotFilledError, CausalLM, TargetModel, TreeTarget, embedding_rows
from specdec.verifiers.base import Verifier


class Speculation:
    """A decoding method for `model.generate(custom_generate=...)`.

    `generate` prepares everything as always (arguments, processors, criteria, masks, cache) and then calls this in
    place of its own sampling loop.

    Args:
        drafter: What guesses, or None.
        verifier: What accepts.
        budget: How large a tree may be.
        strict: Raise a drafter's errors.
        capability: `"auto"`, or how to run the target.
        attention: `"auto"`, or what computes attention over trees.
        near_tie_guard: Let passes over one token decide near-ties; a number is the gap of one.
        cuda_graphs: See `accelerate`.
        compiled: See `accelerate`.
        deterministic: See `accelerate`.
    """

    def __init__(
        self,
        drafter: Drafter | None,
        verifier: Verifier,
        budget: Budget,
        strict: bool,
        capability: str,
        attention: AttentionLike = "auto",
        near_tie_guard: bool | float = False,
        cuda_graphs: GraphMode = "auto",
        compiled: CompileMode = False,
        deterministic: bool = False,
    ) -> None:
        self.drafter = drafter
        self.verifier = verifier
        self.budget = budget
        self.strict = strict
        self.capability = capability
        self.attention = attention
        self.near_tie_guard = near_tie_guard
        self.cuda_graphs = cuda_graphs
        self.compiled = compiled
        self.deterministic = deterministic
        self._is_fresh = False
        self.streamer: Any = None
        self.is_traced = False
        self.report = self._new_report()
        self._warned: set[str] = set()

    def bind(self, model: CausalLM) -> None:
        """Prepares the drafter for a target and for the verifier.

        Raises:
            ValueError: They do not go together.
        """
        if self.drafter is not None:
            self.drafter.bind(model)
            self.drafter.fit(self.verifier)
        elif self.verifier.judges_steps:
            raise ValueError(
                f"verifier={self.verifier.name!r} judges reasoning steps, and drafter=None writes none; use "
                "drafter=SpecReasonDrafter(draft_model) with it, or verifier='exact'"
            )

    def _fresh(self) -> Speculation:
        """Decodes one call by nothing that is measured, and nothing that earlier calls taught."""
        one = copy.copy(self)
        one._is_fresh = True
        one.drafter = None if self.drafter is None else self.drafter.fresh()
        one.budget = self.budget.fresh()
        return one

    def _new_report(self) -> SpeculationReport:
        name = self.drafter.name if self.drafter else "none"
        return SpeculationReport(name, self.verifier.name, self.verifier.guarantee)

    def capability_of(self, model: CausalLM) -> Capability:
        """How a model is run ahead."""
        found = probe(model, self.capability, self.attention)
        compiled = describe_compiled(model, found, self.compiled)
        graphs = describe(model, self.cuda_graphs) if found.mode == "tree" else ""
        return replace(found, cuda_graphs=graphs, compiled=compiled)

    def begin_fallback(self, reason: str, unexpected_of: CausalLM | None = None) -> None:
        """Starts a report of a call that the model's own `generate` does, and warns once per reason.

        Args:
            reason: Why, in words.
            unexpected_of: The model, where the reason lies in how it ran and not in what the caller asked for.
        """
        self.report = self._new_report()
        self.report.fallback, self.report.capability = reason, "plain"
        if reason not in self._warned:
            self._warned.add(reason)
            text, category = f"generating without speculation: {reason}. The result is the same.", FallbackWarning
            if unexpected_of is not None and takes_drafts(unexpected_of):
                text, category = f"{text} {remedy(unexpected_of)}", UnexpectedFallbackWarning
            warnings.warn(text, category, stacklevel=3)

    @torch.no_grad()
    def __call__(
        self,
        model: CausalLM,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        trace: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """The decoding method; arguments as `generate` passes them to its own sampling loop, and `trace`."""
        streamer = streamer if streamer is not None else self.streamer
        self.bind(model)
        if self.deterministic and not self._is_fresh:
            one = self._fresh()
            prepared = model, input_ids, logits_processor, stopping_criteria, generation_config
            try:
                return one(*prepared, synced_gpus, streamer, trace, **model_kwargs)
            finally:
                self.report, self.budget = one.report, one.budget
        _check_ids(model, input_ids)
        reason = foreign_inputs(model) or impossible(
            generation_config, model_kwargs, input_ids, logits_processor, stopping_criteria
        )
        if synced_gpus:
            reason = "several processes must run the same number of passes (synced_gpus)"
        draws = self.verifier.guarantee == "distribution" and generation_config.do_sample
        reason = reason or obstacle(model, draws or self.verifier.judges_steps)
        capability = probe(model, self.capability, self.attention) if reason is None else Capability("plain", reason)
        is_unexpected = capability.mode == "plain" and self.capability == "auto" and reason in (None, NO_CACHE)
        if self.deterministic:  # among several backends the fastest would be measured
            capability = replace(capability, attention=capability.attention[:1])
        keep_cache = _keeps_cache(generation_config, model_kwargs)
        longest = generation_config.max_length + self.budget.max_nodes
        if capability.mode != "plain" and (limit := length_limit(model)) and longest > limit[0]:
            capability = Capability("plain", f"beyond {limit[0]} tokens, draft tokens included, {limit[1]}")
        if capability.mode == "chain" and keep_cache and len(input_ids) > 1:
            capability = Capability("plain", "the kv cache of a batch is wanted back, and rows leave it as they end")
        if capability.mode == "chain" and self.verifier.judges_steps and len(input_ids) > 1:
            capability = Capability(
                "plain", "rows keep the same number of tokens per step, and steps are judged by row"
            )
        prepared = (model, input_ids, logits_processor, stopping_criteria, generation_config)
        rest = synced_gpus, streamer, model_kwargs
        if capability.mode == "plain" or (capability.mode == "chain" and self.drafter is None):
            return self._plain(capability.reason, is_unexpected, *prepared, *rest)
        self.report = self._new_report()
        self.report.capability = capability.mode
        target = self.target_for(model, generation_config, model_kwargs, capability, keep_cache, input_ids.device)
        try:
            is_traced = trace or self.is_traced
            return self._speculate(target, input_ids, logits_processor, stopping_criteria, streamer, is_traced)
        except CacheNotFilledError as error:
            return self._plain(str(error), True, *prepared, *rest)
        finally:
            if capability.mode == "tree":
                self.report.attention = capability.attention_of(model, self.attention)
            target.close()

    def target_for(
        self,
        model: CausalLM,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
        capability: Capability,
        keep_cache: bool,
        device: torch.device,
    ) -> TargetModel:
        """The model as this call runs it: on trees, captured if possible, or on chains."""
        if capability.mask_format is None:
            begin_passes(model, capability, self.compiled)  # tells why not
            check_demand(self.cuda_graphs, f"it runs on chains, because {capability.reason}")
            return ChainTarget(model, config, model_kwargs)
        nodes = self.budget.max_nodes if self.drafter else 1
        compiled = begin_passes(model, capability, self.compiled)
        attention = None if compiled is not None else capability.choice(model)
        arguments = model, config, model_kwargs, capability.mask_format, keep_cache, nodes, attention
        store = acquire(model, self.cuda_graphs, device)
        target: TreeTarget
        if isinstance(store, str):
            if (self.cuda_graphs, device.type) != ("auto", "cpu"):  # where nobody expects them nothing is said
                self.report.cuda_graphs = f"none, because {store}"
            target = TreeTarget(*arguments)
        else:
            target = StaticTarget(*arguments, store)
        target.compiled = compiled
        target.manner += "" if compiled is None or compiled.is_eager else ", compiled"
        return target

    def _plain(
        self,
        reason: str,
        is_unexpected: bool,
        model: CausalLM,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool,
        streamer: Any,
        model_kwargs: dict[str, Any],
    ) -> Any:
        """The model's own decoding method."""
        self.begin_fallback(reason, model if is_unexpected else None)
        method = decoding_method(model, generation_config.get_generation_mode())
        extra = {"streamer": streamer} if streamer is not None else {}
        output = method(
            model,
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            **extra,
            **model_kwargs,
        )
        sequences = output if isinstance(output, Tensor) else output.sequences
        new = sequences.shape[1] - input_ids.shape[1]
        self.report.num_target_passes = new
        self.report.num_row_passes = self.report.num_generated_tokens = new * len(sequences)
        return output

    def _speculate(
        self,
        target: TargetModel,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        streamer: Any,
        is_traced: bool,
    ) -> Any:
        """Runs the loop and wraps up its result as `generate` would."""
        config, report = target.generation_config, self.report
        sequences = Sequences(input_ids, target.model_kwargs.get("attention_mask"), config.max_length)
        if is_traced:
            prompts = [sequences.real(row).tolist() for row in range(len(sequences))]
            report.trace = Trace(prompts, f"{report.drafter}, verifier {report.verifier}", report.guarantee)
        noise = NoiseQueue(len(input_ids), input_ids.device) if config.do_sample else None
        keep_scores = bool(config.return_dict_in_generate and (config.output_scores or config.output_logits))
        pad = pad_token(config)
        sampler = Sampler(processors, config.do_sample, sequences, noise, keep_scores)
        is_sampled_from = self.verifier.guarantee == "distribution" and config.do_sample
        near_ties = self._near_ties(target)
        sampler.keeps_margins = near_ties is not None
        ranks = Ranks.of(target.model) if self.drafter is not None else None
        drafts = ranks is None or ranks.is_first
        drafter = self._guarded_drafter(self.drafter if drafts else None, target, sampler, is_sampled_from)
        self.budget.begin(target.model, drafter.kind(), config.do_sample, target.manner)
        decoder = Decoder(
            target=target,
            drafter=drafter,
            step=step_for(target, self.verifier, sampler, drafter, report, near_ties),
            sampler=sampler,
            stop=StopRule(criteria, sequences),
            budget=self.budget,
            sequences=sequences,
            streamer=StreamFeeder(streamer, sequences, pad),
            report=report,
            ranks=ranks,
        )
        try:
            with target.hidden_states.taken() if target.hidden_states else nullcontext():
                decoder.run(input_ids)
        finally:
            generated = [sequences.num_generated(row) for row in range(len(sequences))]
            report.num_generated_tokens = sum(generated)
            if self.compiled:
                report.compiled = self.capability_of(target.model).compiled
            if isinstance(target, StaticTarget):
                report.cuda_graphs = target.store.describe()
            if noise is not None and not is_sampled_from:  # else the next call would repeat draws of the verifier
                noise.restore(max(generated))
        past = target.finish(sequences, pad)
        output = sequences.output(pad)
        if not config.return_dict_in_generate:
            return output
        fields: dict[str, Any] = {"sequences": output, CACHE: past}
        if keep_scores:
            scores, logits = _by_position(decoder.kept_scores)
            fields |= {"scores": scores if config.output_scores else None}
            fields |= {"logits": logits if config.output_logits else None}
        return GenerateDecoderOnlyOutput(**fields)

    def _near_ties(self, target: TargetModel) -> NearTies | None:
        """What a near-tie is in this call; None where none are looked for."""
        is_wanted = self.near_tie_guard is not False or target.model.dtype in HALF
        if not is_wanted or self.verifier.guarantee != "token-identical":
            return None
        config = target.generation_config
        temperature = (config.temperature or 1.0) if config.do_sample else 1.0
        gap = self.near_tie_guard
        if isinstance(gap, bool):
            # Where a mode is demanded nothing was tried.
            rounding = self.capability_of(target.model).rounding or probe(target.model).rounding
            gap = gap_of(rounding or 0.0)
        gap /= temperature
        self.report.near_tie_gap = gap
        return NearTies(gap, self.near_tie_guard is not False)

    def _guarded_drafter(
        self, drafter: Drafter | None, target: TargetModel, sampler: Sampler, is_sampled_from: bool
    ) -> GuardedDrafter:
        """The drafter, with what it may know of the target."""
        of_call = sampler.sequences.device, len(sampler.sequences), sampler.noise is not None
        needs = NO_NEEDS if drafter is None else drafter.needs(*of_call)
        if needs.hidden_states:
            target.hidden_states = HiddenStates(target.model)
        facts = CallFacts(
            vocab_size=embedding_rows(target.model),
            strict=self.strict,
            num_top_tokens=needs.top_tokens,
            hidden_states=target.hidden_states,
            sampler=sampler,
            is_sampled_from=is_sampled_from,
            is_judged=self.verifier.judges_steps,
            asks_target=self.verifier.asks_target,
            end_tokens=frozenset(eos_tokens(target.generation_config)),
        )
        return GuardedDrafter(drafter, self.report, facts, self.budget)


def _check_ids(model: CausalLM, input_ids: Tensor) -> None:
    """Token ids out of range end a CUDA process without a word of the cause."""
    known = embedding_rows(model)
    if input_ids.numel() and (int(input_ids.min()) < 0 or int(input_ids.max()) >= known):
        raise ValueError(
            f"input_ids hold token ids from {int(input_ids.min())} to {int(input_ids.max())}, but the model knows "
            f"0 to {known - 1}; were they made by another model's tokenizer?"
        )


def _by_position(rows: list[list[tuple[Tensor, Tensor]]]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Scores and logits per generated position, `[batch, vocab]` each; zeros where a row had ended."""
    empty = (torch.zeros_like(rows[0][0][0]), torch.zeros_like(rows[0][0][1]))
    positions = [[row[t] if t < len(row) else empty for row in rows] for t in range(max(map(len, rows)))]
    scores, logits = (tuple(torch.stack([row[i] for row in rows]) for rows in positions) for i in (0, 1))
    return scores, logits


def _keeps_cache(config: GenerationConfig, model_kwargs: dict[str, Any]) -> bool:
    return bool(config.return_dict_in_generate) or is_handed_in(model_kwargs.get(CACHE))
