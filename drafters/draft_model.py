"""A small model that drafts for a large one."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any
from weakref import ref

import numpy as np
import torch

from specdec.drafters.base import DraftContext, Drafter, DraftSession, Step
from specdec.drafters.small_model import branch_pace
from specdec.drafters.small_model.call import MAX_CANDIDATES, DraftCall, Growth, compile_kernels
from specdec.drafters.small_model.captured import captured_pass
from specdec.drafters.small_model.depth import WIDTHS, Pace
from specdec.drafters.small_model.growth import DraftNodes, least_product, write_trees
from specdec.drafters.small_model.learning import Learned, learned
from specdec.drafters.small_model.lists import DraftLists, Kind
from specdec.drafters.small_model.loading import (
    SELF,
    capability_of,
    load_draft_model,
    load_vocabularies,
    longest_sequence,
)
from specdec.drafters.small_model.passes import ChainPasses, DraftPasses, TreePasses, warmed_up
from specdec.drafters.small_model.pipelined import LoadWindows, Pacing, adjust_threshold, check_pipeline, paced_growth
from specdec.drafters.small_model.settings import Mode, check_settings
from specdec.drafters.tokenizers.draft_vocabulary import RowTexts, Use
from specdec.kernels import Floats, Ints
from specdec.target import embedding_rows
from specdec.tree import TokenTree

DEPTHS: dict[str, int] = {"auto": 32, "chain": 12, "static": 6, "dynamic": 6, "paced": 32}
"""Levels at most, unless `max_depth` is given."""
UNMEASURED_DEPTH = 8
"""Levels of an automatic draft while nothing is known of the target's time."""
NUM_CLASSES = 16
"""Classes of the draft model's probability, over which its hits are counted."""
NUM_RANK_CLASSES = 3
DRAWN_CHILDREN = 3
"""Children of a node at most where they are drawn at random: each costs a node of the tree, likely or not."""


@dataclass(eq=False)
class DraftModelDrafter(Drafter):
    """Proposes what a smaller model would say.

    The draft model reads each token once: it keeps its own kv cache in step with the target's, takes over the accepted
    drafts with the keys and values that they got when they were drafted, and feeds the others along with the next root.
    A draft grows level by level, one forward each:

    - `"chain"`: one token after the other, until one is doubtful (that one is kept).
    - `"static"`: a tree of a fixed shape, the best for given acceptances by rank; "Sequoia: Scalable and Robust
      Speculative Decoding" (arXiv 2402.12374, section 3.1).
    - `"dynamic"`: the likeliest nodes of each level are gone on from, and of all nodes the likeliest are proposed;
      "EAGLE-2" (arXiv 2406.16858, sections 4.1 and 4.2).
    - `"auto"`: like that, and before each level it is asked how many nodes, of any level, are worth feeding: by the
      measured times of a level and of the target's passes, and by how often such drafts were accepted of late. A chain
      and no draft at all are possible answers.
    - `"paced"`: every token of some confidence opens a branch, branches grow in proportion to their confidence, and the
      draft ends when none is above a threshold that adjusts itself; "LLMCad" (arXiv 2309.04255, sections 3.2 and 3.3).

    With `pipelined=True` drafts are paced, and while accelerate loads weights of the target that are offloaded to the
    CPU or the disk, drafting goes on behind the tree under verification, for the next step; it never runs while the
    target computes. What was drafted behind the tokens that the target picks is used, the rest is dropped (in a batch
    all of it, unless every row can go on). With a target that is not offloaded there is no gain, which a warning says;
    nor is there one for drafts drawn at random, across vocabularies, or with a draft model that cannot see trees.

    Under sampling drafts are coupled with the target's own noise `e`: the draft model, of distribution `q`, proposes
    the largest `q / e`, among which is what the target will pick if it is of the same mind. The output depends on the
    target's distribution and `e` alone, so it is that of plain decoding all the same.

    Args:
        draft_model: A causal LM, its folder or hub name, or `"self"`: the target's own first layers, weights shared.
        growth: `"auto"`, `"chain"`, `"static"`, `"dynamic"` or `"paced"`.
        layers: How many layers `"self"` has; a quarter of the target's by default.
        max_nodes: Largest tree, the root included.
        max_depth: Levels at most; None for what suits the growth.
        top_k: Children of a node that are looked at, unless the growth is a chain's.
        beam: Nodes fed per level of a dynamic tree.
        acceptances: Of a static tree: P(accepted | parent accepted) by rank, falling.
        min_confidence: Of chains and dynamic trees: nothing follows a token whose whole path is accepted less often.
        coupled: Use the target's noise under sampling. Without, the likeliest tokens are proposed.
        prior_weight: How many counted lists the draft model's own probabilities are worth.
        memory: Lists after which a count is worth 1/e.
        pipelined: Draft on while weights of an offloaded target are loading. Goes with `"paced"`, which it makes of
            `"auto"`.
        compiled: Compile the draft model's passes ahead of time, which takes some seconds before the first call
            (less where it was done before): for small models, which spend most of a pass outside their arithmetic.
        cuda_graphs: On a GPU, replay the draft model's passes as CUDA graphs; not together with the two above.
        tokenizer: The draft model's, its folder or hub name; None for the one that lies beside its weights.
        target_tokenizer: The same for the target.
        vocabulary: How their tokens go together. `"auto"` goes by what the tokenizers hold: `"shared"`, one vocabulary,
            padding aside; else `"intersection"`, trees of the tokens that both have, if nearly all of the prompt's
            tokens are such; else `"text"`, chains that are re-encoded for the target. Without tokenizers, vocabularies
            of about one size are taken for one.
    """

    name = "draft-model"
    needs_step_seconds = True

    draft_model: Any = None
    growth: Mode = "auto"
    layers: int | None = None
    max_nodes: int = 64
    max_depth: int | None = None
    top_k: int = 6
    beam: int = 8
    acceptances: tuple[float, ...] = (0.6, 0.15, 0.07, 0.04)
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
    _model: Any = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.pipelined:
            self.growth = "paced"
        self._pacing = Pacing()
        self._lock = threading.Lock()
        self._thread = threading.local()
        self._target: Callable[[], Any] = lambda: None
        self._decay = float(np.exp(-1.0 / self.memory))
        middles = (np.arange(NUM_CLASSES) + 0.5) / NUM_CLASSES
        self._prior = np.tile(middles**2, (NUM_RANK_CLASSES, 1))
        self._learned = Learned()
        self._drawn_counts: dict[Kind, tuple[Floats, Floats]] = {}

    def fresh(self) -> DraftModelDrafter:
        """Shares the draft model; `growth="auto"` drafts a fixed number of levels, as measured times do not count.

        Raises:
            ValueError: `pipelined=True`, which drafts for as long as weights are loading.
        """
        if self.pipelined:
            raise ValueError(
                "pipelined=True cannot be used with deterministic=True: it drafts for as long as weights are loading; "
                "leave one of them out"
            )
        new = copy.copy(self)
        new._lock, new._thread, new._pacing = threading.Lock(), threading.local(), Pacing()
        new._learned, new._drawn_counts = Learned(), {}
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
            if self._model is not None and self._target() is model:
                return
            # A loaded model is kept for the next target; the target's own layers are not.
            is_own = self._model is None or self.draft_model == SELF
            draft_model = load_draft_model(self.draft_model, self.layers, model) if is_own else self._model
            if draft_model is model:
                draft_model = load_draft_model(draft_model, None, model)  # says what is wrong
            use: Use = "shared" if self.draft_model == SELF else self.vocabulary
            is_named = isinstance(self.draft_model, str)
            vocabularies = load_vocabularies(draft_model, model, use, self.tokenizer, self.target_tokenizer, is_named)
            if self.pipelined:
                check_pipeline(draft_model, model)
                self._pacing = Pacing()
            self._capability = capability_of(draft_model)
            self._compiled = warmed_up(draft_model, self._capability) if self.compiled else None
            self._target_size = embedding_rows(model)
            self._vocabularies = vocabularies
            self._longest = longest_sequence(draft_model)
            self._learned = learned(draft_model, model, self.settings())
            self._drawn_counts = {}
            self._model, self._target = draft_model, ref(model)
        compile_kernels()
        if self.growth == "paced":
            branch_pace.compile_kernels()

    def start(self, context: DraftContext) -> DraftSession:
        if self.pipelined:
            self._thread.windows = LoadWindows(self._target(), self._pacing)
        self._thread.call = self._new_call(context)
        return self

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        if windows := self._windows():
            windows.close()
        call: DraftCall | None = getattr(self._thread, "call", None)
        if call is None or not call.fits(context):
            call = self._thread.call = self._new_call(context)
        nodes = None
        self._thread.seconds = 0.0
        size = max(1, min(max_nodes, self.max_nodes))
        if call is not None:
            tried, hit = self._counts_of(call.lists.kind)
            with self._lock:
                call.follow(context, tried, hit, self._decay)
            longest = call.texts.longest
            if size > 1 and longest < self._longest:
                plan = self._plan(call, context, size, longest)
                if call.texts.is_text:
                    plan = replace(plan, num_children=1)
                nodes = call.grow(context, plan)
                if windows and call.keeps_subtrees:
                    windows.open(call, context, plan, int(min(2 * self._depth(), self._longest - longest)))
        return self._tree(context, call, nodes, size)

    def observe(self, context: DraftContext, step: Step) -> None:
        if windows := self._windows():
            windows.close()
        call: DraftCall | None = getattr(self._thread, "call", None)
        if self.growth == "paced" and call is not None and step.tree.num_nodes > 1:
            known = [ids[at:] for ids, at in zip(context.sequences, call.drafted_at, strict=True)]
            adjust_threshold(self._pacing, step, known)
        if context.step_seconds is None or self.growth != "auto":
            return
        sizes, seconds = context.step_seconds
        spent, self._thread.seconds = getattr(self._thread, "seconds", 0.0), 0.0
        target = float(np.interp(step.tree.num_nodes, sizes, seconds))
        rows, accepted = len(step.rows), sum(step.accepted)
        with self._lock:
            self._pace(context).observe_step(rows, accepted, spent, target, float(seconds[0]))

    def figures(self, context: DraftContext) -> dict[str, Any]:
        windows = self._windows()
        call: DraftCall | None = getattr(self._thread, "call", None)
        figures = call.texts.vocabulary.figures() | call.passes.figures() if call is not None else {}
        return figures | (windows.figures() if windows else {})

    def finish(self, context: DraftContext) -> None:
        self._end_call()
        if windows := self._windows():
            self._thread.windows = None
            windows.finish()

    # --- one call ---

    def _new_call(self, context: DraftContext) -> DraftCall | None:
        """The draft model's side of a call, its prompts read; None where they are too long for it."""
        if self._model is None:
            raise ValueError("bind(model) comes before anything is drafted; specdec.accelerate does so")
        self._end_call()
        vocabulary = self._vocabularies.of_call(context)
        if vocabulary is None or max(map(len, context.sequences)) >= self._longest:
            return None
        if (texts := RowTexts(vocabulary, context.sequences)).longest >= self._longest:
            return None
        kind: type[DraftPasses] = TreePasses if self._capability.mode == "tree" else ChainPasses
        sampler = context.sampler
        target_size = self._target_size
        if sampler is not None and sampler.noise is not None and sampler.noise.vocab:
            target_size = min(target_size, sampler.noise.vocab)
        if texts.is_text:  # neither noise nor processors have a meaning for its tokens
            sampler, target_size = None, self._vocabularies.draft_size
        lists = DraftLists(sampler, self.coupled, context.is_sampled_from, vocabulary, target_size)
        room = min(self._depth() * max(self.beam, int(WIDTHS[-1])), MAX_CANDIDATES)
        is_captured = self.cuda_graphs and not (self.compiled or self.pipelined)
        captured = captured_pass(self._model, self._capability) if is_captured else None
        passes = kind(self._model, self._capability, self._compiled, captured)
        return DraftCall(passes, lists, texts, context, room, keeps_subtrees=self.pipelined)

    def _end_call(self) -> None:
        call: DraftCall | None = getattr(self._thread, "call", None)
        self._thread.call = None
        if call is not None:
            call.passes.close()

    def _windows(self) -> LoadWindows | None:
        """The target's loads in this call, where they are used."""
        windows: LoadWindows | None = getattr(self._thread, "windows", None)
        return windows

    def _tree(self, context: DraftContext, call: DraftCall | None, nodes: DraftNodes | None, size: int) -> TokenTree:
        """The best nodes as a tree, of their roots alone where there are none."""
        rows = len(context.rows)
        if call is None or nodes is None or nodes.counts.max() == 1:
            roots = np.array([sequence[-1] for sequence in context.sequences], np.int64)
            return TokenTree.root_only(torch.from_numpy(roots))
        if call.texts.is_text:
            return call.texts.reencoded(nodes, [int(ids[-1]) for ids in context.sequences], size, self._target_size)
        is_drawn = call.lists.kind == "drawn"
        tokens = np.zeros((rows, size), np.int64)
        parents = np.full((rows, size), -1, np.int64)
        scores = np.zeros((rows, size), np.float32)
        fed = np.full((rows, size), -1, np.int64)
        used = write_trees(nodes, not is_drawn, tokens, parents, scores, fed)
        if not is_drawn:
            return TokenTree.of_arrays(tokens[:, :used], parents[:, :used], scores[:, :used])
        # Without scores, nothing is cut off: leaving out a draw for being unlikely would change the distribution.
        tree = TokenTree(torch.from_numpy(tokens), torch.from_numpy(parents)).first(used)
        return replace(tree, draft_probs=call.lists.probs_of(fed[:, :used]))

    # --- growth ---

    def _plan(self, call: DraftCall, context: DraftContext, size: int, longest: int) -> Growth:
        """How the next proposal grows, none of it deeper than its row or the draft model can go."""
        deepest = min(self._depth(), size - 1, self._longest - longest)
        max_depths = np.array(context.max_depth, np.int64).clip(0, deepest)
        rates, is_drawn = self._rates(call.lists.kind), call.lists.kind == "drawn"
        most = size if is_drawn else MAX_CANDIDATES
        num_children = min(self.top_k, DRAWN_CHILDREN, size - 1) if is_drawn else self.top_k
        is_chain = isinstance(call.passes, ChainPasses)
        if self.growth == "chain":
            return Growth(1, max_depths, rates, lambda _: 1, least_fed_order=self.min_confidence, most=most)
        if self.growth == "dynamic":
            beam, least = 1 if is_chain else self.beam, self.min_confidence
            return Growth(num_children, max_depths, rates, lambda _: beam, least_fed_order=least, most=most)
        if self.growth == "paced":
            growth = Growth(num_children, max_depths, rates, lambda _: 1, most=most)
            return paced_growth(growth, self._pacing, size, is_chain)
        if self.growth == "static":
            least = _least_product(self.acceptances, size - 1, int(deepest))
            return Growth(
                len(self.acceptances),
                max_depths,
                rates,
                lambda _: 1 if is_chain else size,
                acceptances=np.array(self.acceptances),
                least_order=least,
                least_fed_order=least / self.acceptances[0] * (1 - 1e-9),
            )
        return self._automatic(call, context, Growth(num_children, max_depths, rates, lambda _: 1, most=most), size)

    def _automatic(self, call: DraftCall, context: DraftContext, growth: Growth, size: int) -> Growth:
        """Growth as long as it pays; a try of all widths while nothing is known of the times."""
        is_chain = isinstance(call.passes, ChainPasses)
        pace = self._pace(context)
        step_seconds = context.step_seconds
        widths = WIDTHS[:1] if is_chain else WIDTHS
        levels = 0

        def next_width(nodes: DraftNodes) -> int:
            nonlocal levels
            levels += 1
            if step_seconds is None:
                return 0 if levels > UNMEASURED_DEPTH else int(widths[-levels % len(widths)])
            if levels == 1:
                return int(pace.is_worth_it())
            return pace.width(nodes, growth.max_depths, step_seconds, size, widths)

        def measured(nodes: DraftNodes, level: Ints, seconds: float) -> None:
            self._thread.seconds += seconds
            pace.observe_level(nodes, level, seconds)

        return Growth(
            growth.num_children,
            growth.max_depths,
            growth.rates,
            next_width,
            measured,
            any_level=not is_chain,
            most=growth.most,
        )

    def _depth(self) -> int:
        return self.max_depth or DEPTHS[self.growth]

    def _pace(self, context: DraftContext) -> Pace:
        """Batch sizes are told apart by powers of two, and so are calls that sample from those that do not."""
        size = 1 << (len(context.rows) - 1).bit_length()
        is_sampled = context.sampler is not None and context.sampler.noise is not None
        return self._learned.paces.setdefault((size, is_sampled), Pace())

    def _counts_of(self, kind: Kind) -> tuple[Floats, Floats]:
        # Draws at random have another outcome for each different growth: a new drafter repeats them.
        counts = self._drawn_counts if kind == "drawn" else self._learned.counts
        if kind not in counts:
            counts[kind] = np.zeros_like(self._prior), np.zeros_like(self._prior)
        return counts[kind]

    def _rates(self, kind: Kind) -> Floats:
        """P(accepted | parent accepted) by class of rank and of probability."""
        tried, hit = self._counts_of(kind)
        rates: Floats = (hit + self.prior_weight * self._prior) / (tried + self.prior_weight)
        return rates

    # --- settings ---


@functools.lru_cache(maxsize=64)
def _least_product(acceptances: tuple[float, ...], num_nodes: int, max_depth: int) -> float:
    return least_product(acceptances, num_nodes, max_depth)
