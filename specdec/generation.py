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

from specdec.budget import Budget
from specdec.call import Call
from specdec.common.copies import new_locks
from specdec.compat import decoding_method, pad_token, runs_in_step, runs_other_method, token_types
from specdec.decoding import Decoder
from specdec.drafters.base import NO_NEEDS, Drafter
from specdec.drafting import CallFacts, GuardedDrafter
from specdec.fallback import NO_CACHE, UnexpectedFallbackWarning, limit, obstacle, remedy, takes_drafts
from specdec.fallback import FallbackWarning as FallbackWarning
from specdec.inspection.trace import Trace
from specdec.passes.capability import Capability, probe
from specdec.passes.chain_target import ChainTarget
from specdec.passes.compiled.auto import begin_passes, describe_compiled
from specdec.passes.cuda_graphs.fingerprint import out_of_sight
from specdec.passes.cuda_graphs.step import step_for
from specdec.passes.cuda_graphs.store import StaticStore, acquire, check_demand, describe
from specdec.passes.cuda_graphs.target import StaticTarget
from specdec.passes.hidden_states import FINAL, HiddenStates
from specdec.passes.near_ties import HALF, NearTies, gap_of
from specdec.passes.tensor_parallel import Ranks
from specdec.passes.whole_batch import WholeBatchTarget
from specdec.report import SpeculationReport
from specdec.rows.draws import NoiseQueue
from specdec.rows.output import output_of
from specdec.rows.sequences import Sequences
from specdec.rows.stopping import StopRule
from specdec.rows.streaming import StreamFeeder
from specdec.sampling import Sampler
from specdec.settings import Settings
from specdec.target import CacheNotFilledError, CausalLM, TargetModel, TreeTarget, embedding_rows
from specdec.verifiers.base import Verifier


class Speculation:
    """A decoding method for `model.generate(custom_generate=...)`.

    `generate` prepares everything as always (arguments, processors, criteria, masks, cache) and then calls this in
    place of its own sampling loop.

    Args:
        settings: How to speculate.
        streamer: Takes the tokens of every call that brings no streamer of its own.
        trace: Trace every call.
    """

    def __init__(self, settings: Settings, streamer: Any = None, trace: bool = False) -> None:
        self.settings = settings
        self.streamer = streamer
        self.is_traced = trace
        self.report = self._new_report()
        self.warns = True
        self._warned: set[str] = set()

    @property
    def drafter(self) -> Drafter | None:
        """What guesses; None when drafting is off."""
        return self.settings.drafter

    @property
    def verifier(self) -> Verifier:
        """What accepts."""
        return self.settings.verifier

    @property
    def budget(self) -> Budget:
        """How large a tree may be."""
        return self.settings.budget

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

    def change(self, model: CausalLM, **settings: Any) -> None:
        """Replaces settings, if they go together and fit the model.

        Raises:
            ValueError: They do not; nothing has changed then.
        """
        new = copy.copy(self)
        new.settings = replace(self.settings, **settings)
        new.bind(model)
        self.settings = new.settings

    def __deepcopy__(self, memo: dict[int, Any]) -> Speculation:
        new_locks(self.settings, memo)
        new = Speculation(copy.deepcopy(self.settings, memo), self.streamer, self.is_traced)
        new._warned = set(self._warned)
        return new

    def _fresh(self) -> Speculation:
        """Decodes one call by nothing that drafters remember; a deterministic one by nothing that is measured, too."""
        one = copy.copy(self)
        drafter = None if self.drafter is None else self.drafter.fresh()
        budget = self.budget.fresh() if self.settings.deterministic else self.budget
        one.settings = replace(self.settings, drafter=drafter, budget=budget)
        return one

    def _new_report(self) -> SpeculationReport:
        name = self.drafter.name if self.drafter else "none"
        return SpeculationReport(name, self.verifier.name, self.verifier.guarantee)

    def capability_of(self, model: CausalLM) -> Capability:
        """How a model is run ahead."""
        found = probe(model, self.settings.capability, self.settings.attention)
        compiled = describe_compiled(model, found, self.settings.compiled)
        graphs = describe(model, self.settings.cuda_graphs) if found.mode == "tree" else ""
        return replace(found, cuda_graphs=graphs, compiled=compiled)

    def begin_fallback(self, reason: str, unexpected_of: CausalLM | None = None) -> None:
        """Starts a report of a call that the model's own `generate` does, and warns once per reason.

        Args:
            reason: Why, in words.
            unexpected_of: The model, where the reason lies in how it ran and not in what the caller asked for.
        """
        self.report = self._new_report()
        self.report.fallback, self.report.capability = reason, "plain"
        if self.warns and reason not in self._warned:
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
        prepared = model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs
        call = Call(*prepared, synced_gpus or runs_in_step(model), streamer, trace or self.is_traced)
        self.bind(model)
        is_fresh = self.settings.deterministic or self.settings.memory == "call"
        one = self._fresh() if is_fresh else copy.copy(self)  # calls in other threads have reports of their own
        try:
            if is_fresh:
                one.bind(model)
            return one._run(call)
        finally:
            self.report = one.report
            if is_fresh:
                self.settings = replace(self.settings, budget=one.budget)

    def _run(self, call: Call) -> Any:
        """Speculates if that is possible, else leaves the call to the model."""
        if call.input_ids.device.type != "cpu" and "inputs_embeds" not in call.model_kwargs:
            check_ids(call.model, call.input_ids)
        capability, is_unexpected = self._capability_for(call)
        if capability.mode == "plain":
            return self._plain(call, capability.reason, is_unexpected)
        if self.verifier.judges_steps:
            assert self.drafter is not None
            self.report = self._new_report()
            self.report.capability = capability.mode
            return self.drafter.generate_steps(self, call)
        self.report = self._new_report()
        self.report.capability = capability.mode
        prepared = call.model, call.config, call.model_kwargs, capability
        target = self.target_for(*prepared, call.keeps_cache, call.input_ids.device, call.batch > 1)
        try:
            return self._speculate(target, call)
        except CacheNotFilledError as error:
            return self._plain(call, str(error), True)
        finally:
            if capability.mode == "tree":
                self.report.attention = capability.attention_of(call.model, self.settings.attention)
            target.close()

    def _capability_for(self, call: Call) -> tuple[Capability, bool]:
        """How the target is run in this call, and whether a fallback is unexpected: how it ran is the reason."""
        settings = self.settings
        reason = obstacle(call, settings)
        if reason is not None:
            return Capability("plain", reason), reason == NO_CACHE and settings.capability == "auto"
        capability = probe(call.model, settings.capability, settings.attention)
        is_unexpected = capability.mode == "plain" and settings.capability == "auto"
        reason = limit(call, settings, capability)
        return (capability if reason is None else Capability("plain", reason)), is_unexpected

    def target_for(
        self,
        model: CausalLM,
        config: GenerationConfig,
        model_kwargs: dict[str, Any],
        capability: Capability,
        keep_cache: bool,
        device: torch.device,
        is_batch: bool = False,
    ) -> TargetModel:
        """The model as this call runs it: on trees, captured if possible, or on chains."""
        if capability.mask_format is None:
            begin_passes(model, capability, self.settings.compiled)  # tells why not
            check_demand(self.settings.cuda_graphs, f"it runs on chains, because {capability.reason}")
            return ChainTarget(model, config, model_kwargs)
        nodes = self.budget.max_nodes if self.drafter else 1
        compiled = None if token_types(model_kwargs) else begin_passes(model, capability, self.settings.compiled)
        attention = None if compiled is not None else capability.backend()
        arguments = model, config, model_kwargs, capability.mask_format, keep_cache, nodes, attention
        hidden = out_of_sight(model) if is_batch else None
        if token_types(model_kwargs) or hidden:
            reason = f"{hidden} may treat rows differently" if hidden else "the model is given token types"
            check_demand(self.settings.cuda_graphs, reason)
            store: StaticStore | str = reason
        else:
            store = acquire(model, self.settings.cuda_graphs, device)
        target: TreeTarget
        if isinstance(store, str):
            if (self.settings.cuda_graphs, device.type) != ("auto", "cpu"):  # where nobody expects them nothing is said
                self.report.cuda_graphs = f"none, because {store}"
            target = (WholeBatchTarget if hidden else TreeTarget)(*arguments)
        else:
            target = StaticTarget(*arguments, store)
        target.compiled = compiled
        target.manner += "" if compiled is None or compiled.is_eager else ", compiled"
        return target

    def _plain(self, call: Call, reason: str, is_unexpected: bool) -> Any:
        """The model's own decoding method."""
        mode = call.config.get_generation_mode()
        if runs_other_method(mode):
            raise ValueError(
                f"{mode.value.replace('_', ' ')} cannot be combined with custom_generate, which takes its place; call "
                "generate() without custom_generate, or without the arguments that ask for this decoding method"
            )
        self.begin_fallback(reason, call.model if is_unexpected else None)
        method = decoding_method(call.model, mode)
        extra = {"streamer": call.streamer} if call.streamer is not None else {}
        output = method(
            call.model,
            call.input_ids,
            logits_processor=call.processors,
            stopping_criteria=call.criteria,
            generation_config=call.config,
            synced_gpus=call.synced_gpus,
            **extra,
            **call.model_kwargs,
        )
        sequences = output if isinstance(output, Tensor) else output.sequences
        new = sequences.shape[1] - call.input_ids.shape[1]
        self.report.num_target_passes = new
        self.report.num_row_passes = self.report.num_generated_tokens = new * len(sequences)
        return output

    def _speculate(self, target: TargetModel, call: Call) -> Any:
        """Runs the loop and wraps up its result as `generate` would."""
        sequences = Sequences(call.input_ids, call.model_kwargs.get("attention_mask"), call.config.max_length)
        noise = NoiseQueue(call.batch, call.input_ids.device) if call.config.do_sample else None
        stop = StopRule(call.criteria, sequences)
        sampler = Sampler(call.processors, call.config.do_sample, sequences, noise, call.keeps_scores, stop)
        is_sampled_from = self.verifier.guarantee == "distribution" and call.config.do_sample
        report = self.report
        if call.is_traced:
            prompts = [sequences.real(row).tolist() for row in range(len(sequences))]
            report.trace = Trace(prompts, f"{report.drafter}, verifier {report.verifier}", report.guarantee)
        decoder = self._decoder(target, call, sequences, sampler, stop, is_sampled_from)
        try:
            with target.hidden_states.taken() if target.hidden_states else nullcontext():
                decoder.run(call.input_ids)
        finally:
            generated = [sequences.num_generated(row) for row in range(len(sequences))]
            report.num_generated_tokens = sum(generated)
            if self.settings.compiled:
                report.compiled = self.capability_of(target.model).compiled
            if isinstance(target, StaticTarget):
                report.cuda_graphs = target.store.describe()
            if noise is not None and not is_sampled_from:  # else the next call would repeat draws of the verifier
                noise.restore(max(generated))
        pad = pad_token(call.config)
        past = target.finish(sequences, pad)
        return output_of(call, sequences, sampler, past, getattr(target, "padding_logits", {}), pad)

    def _decoder(
        self,
        target: TargetModel,
        call: Call,
        sequences: Sequences,
        sampler: Sampler,
        stop: StopRule,
        is_sampled_from: bool,
    ) -> Decoder:
        """The loop of one call."""
        near_ties = self._near_ties(target)
        sampler.keeps_margins = near_ties is not None
        ranks = Ranks.of(target.model) if self.drafter is not None else None
        drafts = ranks is None or ranks.is_first
        budget = self.budget.of_call()
        drafter = self._guarded_drafter(self.drafter if drafts else None, target, sampler, is_sampled_from, budget)
        budget.begin(target.model, drafter.kind(), call.config.do_sample, target.manner)
        return Decoder(
            target=target,
            drafter=drafter,
            step=step_for(target, self.verifier, sampler, drafter, self.report, near_ties),
            sampler=sampler,
            stop=stop,
            budget=budget,
            sequences=sequences,
            streamer=StreamFeeder(call.streamer, sequences, pad_token(call.config)),
            report=self.report,
            ranks=ranks,
        )

    def _near_ties(self, target: TargetModel) -> NearTies | None:
        """What a near-tie is in this call; None where none are looked for."""
        if target.model.dtype not in HALF or self.verifier.guarantee != "token-identical":
            return None
        config = target.generation_config
        temperature = (config.temperature or 1.0) if config.do_sample else 1.0
        # Where a mode is demanded nothing was tried.
        rounding = self.capability_of(target.model).rounding or probe(target.model).rounding
        self.report.near_tie_gap = gap_of(rounding or 0.0) / temperature
        return NearTies(self.report.near_tie_gap)

    def _guarded_drafter(
        self,
        drafter: Drafter | None,
        target: TargetModel,
        sampler: Sampler,
        is_sampled_from: bool,
        budget: Budget,
    ) -> GuardedDrafter:
        """The drafter, with what it may know of the target."""
        of_call = sampler.sequences.device, len(sampler.sequences), sampler.noise is not None
        needs = NO_NEEDS if drafter is None else drafter.needs(*of_call)
        if layers := (*needs.layers, *((FINAL,) if needs.hidden_states else ())):
            target.hidden_states = HiddenStates(target.use_replica(), layers)
        facts = CallFacts(
            vocab_size=embedding_rows(target.model),
            strict=self.settings.strict,
            num_top_tokens=needs.top_tokens,
            hidden_states=target.hidden_states,
            sampler=sampler,
            is_sampled_from=is_sampled_from,
        )
        return GuardedDrafter(drafter, self.report, facts, budget)


def check_ids(model: CausalLM, input_ids: Tensor) -> None:
    """Names token ids that no embedding is known for: on a CPU the model raises, elsewhere they end the process.

    Raises:
        IndexError: There are such ids, and the model's config gives them no meaning of their own, as of pictures.
    """
    known, config = embedding_rows(model), model.config
    values = {**vars(config), **vars(config.get_text_config())}.items()
    own = {value for name, value in values if "token" in name and isinstance(value, int)}
    odd = set(input_ids[(input_ids < 0) | (input_ids >= known)].tolist()) - own
    if odd:
        raise IndexError(
            f"input_ids hold token ids from {int(input_ids.min())} to {int(input_ids.max())}, but the model knows "
            f"0 to {known - 1}; were they made by another model's tokenizer?"
        )
