"""The probe: what can be shown to a model in one forward, found out by trying."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

from specdec.attention.choice import AttentionChoice, AttentionLike, candidates, choice_for
from specdec.chain_target import ChainTarget
from specdec.compat import CACHE, cache_layers, next_inputs, prefill
from specdec.kv_cache import ATTENTION_LAYER_TYPES
from specdec.masks import MaskFormat
from specdec.rounding import differ
from specdec.target import CausalLM, TargetModel, TreeTarget, accepts, input_device
from specdec.tree import TokenTree

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
        attention: Backends that compute tree attention rightly for this model; of several the fastest is used.
        rejected: Backends that were tried too, and why they are not used.
        rounding: How far the logits of a wide pass were from those of passes over one token; None where not tried.
        cuda_graphs: Whether steps are replayed as CUDA graphs, and why not, in words; empty where it is not told.
        compiled: Whether passes are compiled, and why not, in words; empty where that is not asked for.
    """

    mode: Mode
    reason: str
    mask_format: MaskFormat | None = None
    attention: tuple[str, ...] = ("model",)
    rejected: Mapping[str, str] = field(default_factory=dict)
    rounding: float | None = None
    cuda_graphs: str = ""
    compiled: str = ""

    def __str__(self) -> str:
        text = f"{self.mode}: {self.reason}"
        if self.attention != ("model",):
            text += f"; attention by {', '.join(self.attention)}"
        text += "".join(f"; not by {name} ({why})" for name, why in self.rejected.items())
        text += f"; CUDA graphs: {self.cuda_graphs}" if self.cuda_graphs else ""
        return text + (f"; compiled: {self.compiled}" if self.compiled else "")

    def attention_of(self, model: CausalLM, wanted: AttentionLike) -> str:
        """In words, what computes attention over trees, and why.

        Args:
            model: The target.
            wanted: What the caller said.
        """
        choice = self.choice(model)
        implementation = model.config.get_text_config(decoder=True)._attn_implementation
        text = f"the model's own ({implementation})" if choice is None else choice.explanation()
        if wanted != "auto":
            text += f"; demanded by attention={wanted!r}"
        elif choice is None and input_device(model).type == "cpu":
            text += "; on a CPU nothing else is tried"
        return text + "".join(f"; not by {name} ({why})" for name, why in self.rejected.items())

    def choice(self, model: CausalLM) -> AttentionChoice | None:
        """What computes tree attention; None for what the model was loaded with."""
        return None if self.attention == ("model",) else choice_for(model, self.attention)


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

    A tree of seven nodes over two left-padded rows goes through the public forward; one row keeps a path of three
    nodes, the other only the root, and a second tree follows. If all logits are those of plain decoding, trees it is;
    if not, the same is tried with a chain; if that is wrong too, plain decoding is left. The answer is kept per model,
    attention implementation and dtype.

    Args:
        model: The target.
        mode: `"auto"`, or a mode to take without trying.
        attention: `"auto"`, or the name of a backend of tree attention, or several names to choose of.

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
    key = (mode, names, implementation, model.dtype, model.training)
    known = _KNOWN.setdefault(model, {})
    if key not in known:
        known[key] = _demanded_tree(model, names) if mode == "tree" else _probe(model, names)
    return known[key]


def _demanded_tree(model: CausalLM, names: tuple[str, ...]) -> Capability:
    formats, problem = _mask_formats(model)
    if problem:
        raise ValueError(f"capability='tree' cannot be used with {type(model).__name__}: {problem}")
    return Capability("tree", "demanded by the caller", formats[0], names)


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
    found: list[Capability] = []

    def inside(
        model: CausalLM,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor:
        model_kwargs = {k: v for k, v in model_kwargs.items() if k not in ("synced_gpus", "streamer")}
        found.append(_compare(_Trial(model, input_ids, generation_config, model_kwargs), names))
        return input_ids

    vocab = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.tensor([[11 + 7 * i for i in range(9)], [13 + 5 * i for i in range(9)]]) % vocab
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
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
        return Capability("plain", f"the probe failed: {type(error).__name__}: {error}")
    return found[0]


@dataclass
class _Trial:
    """The probe's prompt as `generate` prepared it, and its reference logits."""

    model: CausalLM
    input_ids: Tensor
    generation_config: GenerationConfig
    model_kwargs: dict[str, Any]
    rounding: float = 0.0

    def fresh_kwargs(self) -> dict[str, Any]:
        config = self.model.config.get_text_config(decoder=True)
        return {**self.model_kwargs, CACHE: DynamicCache(config=config)}

    def plain(self, tokens: Tensor) -> Tensor:
        """Logits of plain decoding fed with given tokens, `[batch, steps] -> [batch, steps, vocab]`."""
        kwargs = self.fresh_kwargs()
        ids = self.input_ids
        outputs = prefill(self.model, ids, self.generation_config, kwargs)
        steps = []
        for column in tokens.split(1, dim=1):
            ids = torch.cat([ids, column], dim=1)
            kwargs, inputs = next_inputs(self.model, ids, outputs, kwargs)
            outputs = self.model(**inputs, return_dict=True)
            steps.append(outputs.logits[:, -1].float())
        return torch.stack(steps, dim=1)

    def differs(self, mine: Tensor, reference: Tensor) -> bool:
        """Whether logits differ by more than rounding."""
        self.rounding = max(self.rounding, float((mine.float() - reference).abs().max()))
        return differ(mine, reference, self.model.dtype)


def _compare(trial: _Trial, names: tuple[str, ...]) -> Capability:
    if trial.model_kwargs.get(CACHE) is None:
        return Capability("plain", "it keeps no cache that transformers can hand to it")
    device = trial.input_ids.device
    vocab = trial.model.config.get_text_config(decoder=True).vocab_size
    r, a, b, c, d, e, f, x, y, z = ((17 + 9 * i) % vocab for i in range(10))
    first, second = [r, a, b, c, d, e, f], [x, y, z]
    runs = [
        [[r, a, c, f, f], [r, a, c, f, f]],
        [[r, a, d, x, y], [r, x, y, y, y]],
        [[r, b, e, e, e], [r, b, e, e, e]],
        [[r, a, d, x, z], [r, x, z, z, z]],
        [[r, x, y, y, y], [r, x, y, y, y]],
    ]
    reference = [trial.plain(torch.tensor(run, device=device)) for run in runs]
    formats, problem = _mask_formats(trial.model)
    for mask_format in formats:
        problems, rounding = {}, 0.0
        for name in names:
            trial.rounding = 0.0
            attention = None if name == "model" else choice_for(trial.model, (name,))
            kwargs = trial.fresh_kwargs()
            target = TreeTarget(trial.model, trial.generation_config, kwargs, mask_format, attention=attention)
            problems[name] = _first_problem(_branching(target, trial, first, second, reference), trial)
            rounding = rounding if problems[name] else max(rounding, trial.rounding)
        right = tuple(name for name in names if problems[name] is None)
        if right:
            rejected = {name: why for name, why in problems.items() if why is not None}
            reason = "a branching tree gives the logits of plain decoding"
            return Capability("tree", reason, mask_format, right, rejected, rounding)
        problem = "; ".join(f"{name}: {why}" if len(names) > 1 else str(why) for name, why in problems.items())
    trial.rounding = 0.0
    chain = ChainTarget(trial.model, trial.generation_config, trial.fresh_kwargs())
    chain_problem = _first_problem(_chain(chain, trial, [r, a, c], [x, y], reference), trial)
    if chain_problem is None:
        return Capability("chain", f"no branching trees: {problem}", rounding=trial.rounding)
    return Capability("plain", f"no branching trees: {problem}; no chains: {chain_problem}")


def _first_problem(steps: Callable[[], Iterator[tuple[str, Tensor, Tensor]]], trial: _Trial) -> str | None:
    try:
        for what, mine, reference in steps():
            if trial.differs(mine, reference):
                return f"{what} differ from plain decoding's"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def _branching(
    target: TargetModel, trial: _Trial, first: list[int], second: list[int], reference: list[Tensor]
) -> Callable[[], Iterator[tuple[str, Tensor, Tensor]]]:
    def steps() -> Iterator[tuple[str, Tensor, Tensor]]:
        target.prefill(trial.input_ids)
        tree = TokenTree.from_rows([first] * 2, [[-1, 0, 0, 1, 1, 2, 3]] * 2).to(trial.input_ids.device)
        logits = target.forward(tree)
        yield "a tree's logits", logits[:, [0, 1, 3, 6]], reference[0][:, :4]
        yield "a tree's logits", logits[:1, [0, 1, 4]], reference[1][:1, :3]
        yield "a tree's logits", logits[:, [0, 2, 5]], reference[2][:, :3]
        target.commit([[0, 1, 4], [0]])
        tree = TokenTree.from_rows([second] * 2, [[-1, 0, 0]] * 2).to(trial.input_ids.device)
        logits = target.forward(tree)
        for branch, run in ((1, reference[1]), (2, reference[3])):
            yield "logits after a commit", logits[0, [0, branch]], run[0, 3:5]
            yield "logits after a rollback", logits[1, [0, branch]], run[1, 1:3]

    return steps


def _chain(
    target: TargetModel, trial: _Trial, first: list[int], second: list[int], reference: list[Tensor]
) -> Callable[[], Iterator[tuple[str, Tensor, Tensor]]]:
    def steps() -> Iterator[tuple[str, Tensor, Tensor]]:
        device = trial.input_ids.device
        target.prefill(trial.input_ids)
        past = target.past
        if past is None or not past.is_croppable:
            raise NotImplementedError("its cache holds states that cannot be rolled back")
        logits = target.forward(TokenTree.from_rows([first] * 2, [[-1, 0, 1]] * 2).to(device))
        yield "a chain's logits", logits, reference[0][:, :3]
        target.commit([[0], [0]])
        logits = target.forward(TokenTree.from_rows([second] * 2, [[-1, 0]] * 2).to(device))
        yield "logits after a rollback", logits, reference[4][:, 1:3]

    return steps
