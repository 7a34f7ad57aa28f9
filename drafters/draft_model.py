"""A small model that drafts for a large one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field, fields
from typing import Any, Literal, get_args
from weakref import ref

from specdec.drafters.base import DraftContext, Drafter, DraftSession
from specdec.drafters.small_model.calibration import Calibration
from specdec.drafters.small_model.loading import SELF, BoundModel, bind_draft_model
from specdec.drafters.small_model.pipelined import check_pipeline
from specdec.drafters.small_model.session import DraftModelSession, NoDrafts, compile_kernels
from specdec.drafters.tokenizers.draft_vocabulary import Use

Mode = Literal["chain", "dynamic", "paced"]
REMOVED = {"auto": "dynamic", "static": "dynamic"}
"""Growths of earlier versions, and what does their work now."""
DEPTHS: dict[Mode, int] = {"chain": 12, "dynamic": 6, "paced": 32}
"""Levels at most where `max_depth` is None."""


@dataclass(eq=False)
class DraftModelDrafter(Drafter):
    """Proposes what a smaller model would say.

    "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192). The draft model reads each token
    once: it keeps its own kv cache in step with the target's, takes over the accepted drafts with the keys and values
    that they got when they were drafted, and feeds the others along with the next root. A draft grows level by level,
    one forward each, while one more level should raise the tokens per second (`calibration.is_worth_a_level`):

    - `"chain"`: one token after the other, until one is doubtful (that one is kept).
    - `"dynamic"`: a tree. The likeliest nodes of each level are fed, and of all nodes the likeliest are proposed;
      "EAGLE-2" (arXiv 2406.16858, sections 4.1 and 4.2).
    - `"paced"`: every token of some confidence opens a branch, branches grow in proportion to their confidence, and the
      draft ends when none is above a threshold that adjusts itself; "LLMCad" (arXiv 2309.04255, sections 3.2 and 3.3).

    With `pipelined=True` drafts are paced, and while accelerate loads weights of the target that are offloaded to the
    CPU or the disk, drafting continues below the tree under verification, for the next step; it never runs while the
    target computes. What was drafted after the tokens that the target picks is used, the rest is dropped (in a batch
    all of it, unless every row can continue). There is no gain with a target that is not offloaded, which a warning
    says, with drafts drawn at random, across vocabularies, or with a draft model that cannot see trees.

    Under sampling drafts are coupled with the target's own noise `e`: the draft model, of distribution `q`, proposes
    the largest `q / e`, among which is what the target will pick if it is of the same mind. The output depends on the
    target's distribution and `e` alone, so it is that of plain decoding all the same.

    Args:
        draft_model: A causal LM, its folder or hub name, or `"self"`: the target's own first layers, weights shared.
        growth: `"chain"`, `"dynamic"` or `"paced"`.
        layers: How many layers `"self"` has; a quarter of the target's by default.
        max_nodes: Largest tree, the root included.
        max_depth: Levels at most; None for what suits the growth.
        top_k: Children of a node that are looked at, unless the growth is a chain's.
        beam: Nodes fed per level of a dynamic tree.
        min_confidence: Of chains and dynamic trees: nothing follows a token whose whole path is accepted less often.
        coupled: Use the target's noise under sampling. Without, the likeliest tokens are proposed.
        prior_weight: How many counted lists the draft model's own probabilities are worth.
        memory: Lists after which a count is worth 1/e.
        pipelined: Draft on while weights of an offloaded target are loading. Makes the growth `"paced"`.
        compiled: Compile the draft model's passes ahead of time, which takes some seconds before the first call
            (less where it was done before): for small models, which spend most of a pass outside their arithmetic.
        cuda_graphs: On a GPU, replay the draft model's passes as CUDA graphs; not together with the two above.
        tokenizer: The draft model's, its folder or hub name; None for the one that lies beside its weights.
        target_tokenizer: The same for the target.
        vocabulary: How their tokens go together. `"auto"` goes by what the tokenizers hold: `"shared"`, one vocabulary,
            padding aside; else `"intersection"`, trees of the tokens that both have, if nearly all of the prompt's
            tokens are such; else `"text"`, chains that are re-encoded for the target. Without tokenizers, vocabularies
            of about one size are taken for one.
        acceptances: Not used any more; refused.
    """

    name = "draft-model"
    needs_step_seconds = True

    draft_model: Any = None
    growth: Mode = "dynamic"
    layers: int | None = None
    max_nodes: int = 64
    max_depth: int | None = None
    top_k: int = 6
    beam: int = 8
    min_confidence: float = 0.2
    coupled: bool = True
    prior_weight: float = 10.0
    memory: float = 300.0
    pipelined: bool = False
    compiled: bool = False
    cuda_graphs: bool = True
    tokenizer: Any = None
    target_tokenizer: Any = None
    vocabulary: Use = "auto"
    acceptances: InitVar[Any] = None
    _bound: BoundModel | None = field(init=False, repr=False, default=None)

    def __post_init__(self, acceptances: Any) -> None:
        if acceptances is not None:
            raise ValueError(
                f"acceptances={acceptances!r} shaped the trees of growth='static', which is gone: trees follow what is "
                "accepted; leave it out, and use growth='dynamic'"
            )
        self._check_settings()
        if self.pipelined:
            self.growth = "paced"
        self._lock = threading.Lock()
        self._target: Callable[[], Any] = lambda: None
        self._calibration = Calibration(self.prior_weight, self.memory)

    @property
    def depth(self) -> int:
        """Levels of a draft at most."""
        return self.max_depth or DEPTHS[self.growth]

    def fresh(self) -> DraftModelDrafter:
        """Shares the draft model; drafts are as deep as they may be, as measured times do not count.

        Raises:
            ValueError: `pipelined=True`, which drafts for as long as weights are loading.
        """
        if self.pipelined:
            raise ValueError(
                "pipelined=True cannot be used with deterministic=True: it drafts for as long as weights are loading; "
                "leave one of them out"
            )
        new = copy.copy(self)
        new._lock, new._calibration = threading.Lock(), Calibration(self.prior_weight, self.memory)
        new.needs_step_seconds = False
        return new

    def settings(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        for key in ("draft_model", "tokenizer", "target_tokenizer"):
            if not isinstance(value := values[key], str | None):
                values[key] = getattr(value, "name_or_path", "") or type(value).__name__
        return values

    def bind(self, model: Any) -> None:
        with self._lock:
            if self._bound is not None and self._target() is model:
                return
            # A loaded model is kept for the next target; the target's own layers are not.
            loaded = None if self._bound is None or self.draft_model == SELF else self._bound.model
            bound = bind_draft_model(self, loaded, model)
            if self.pipelined:
                check_pipeline(bound.model, model)
            self._calibration = Calibration(self.prior_weight, self.memory)
            self._bound, self._target = bound, ref(model)
        compile_kernels()

    def start(self, context: DraftContext) -> DraftSession:
        with self._lock:
            bound, calibration, target = self._bound, self._calibration, self._target()
        if bound is None:
            raise ValueError("bind(model) comes before anything is drafted; specdec.accelerate does so")
        texts = bound.texts_of(context)
        if texts is None:
            return NoDrafts()
        return DraftModelSession(self, bound, calibration, texts, context, target)

    def _check_settings(self) -> None:
        """Raises a ValueError for a hyper-parameter out of range."""
        for name, value, known in (("growth", self.growth, Mode), ("vocabulary", self.vocabulary, Use)):
            if value not in get_args(known):
                names = ", ".join(map(repr, get_args(known)))
                instead = f" (growth={value!r} is gone: {REMOVED[value]!r} does its work)" if value in REMOVED else ""
                raise ValueError(f"{name}={value!r} is not known; use one of {names}{instead}")
        if self.pipelined and self.growth == "chain":
            raise ValueError("pipelined=True goes with growth='paced' only, not 'chain'; leave growth out")
        if self.layers is not None and self.draft_model != SELF:
            raise ValueError(f"layers={self.layers} has a meaning with draft_model='self' only; leave it out")
        for name, least in (("max_nodes", 1), ("top_k", 1), ("beam", 1), ("prior_weight", 0.01), ("memory", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.max_depth is not None and self.max_depth < 1:
            raise ValueError(f"max_depth={self.max_depth} must be at least 1, or None for what suits the growth")
        if not 0 <= self.min_confidence < 1:
            raise ValueError(f"min_confidence={self.min_confidence} must be at least 0 and below 1")
