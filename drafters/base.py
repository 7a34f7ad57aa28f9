"""What a drafter is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from specdec.tree import TokenTree

if TYPE_CHECKING:
    from specdec.kernels import Floats, Ints
    from specdec.passes.hidden_states import HiddenStates
    from specdec.sampling import Sampler


class DrafterSwitchedOffWarning(RuntimeWarning):
    """A drafter raised in mid-generation. The call goes on without it, and its output is complete."""


@dataclass
class DraftContext:
    """What a drafter may look at when it proposes.

    Only rows that still generate are listed; `rows` names them, so that a drafter can keep state per row.

    Args:
        rows: Index in the batch of each active row.
        sequences: Per active row, every token so far (prompt without padding, then committed tokens), int32. The last
            one is the root. The arrays are views: copy what you keep.
        prompt_lengths: Per active row, how many of these tokens are the prompt.
        max_depth: Per active row, how many draft tokens could still be used before a length limit.
        device: Where the target runs.
        hidden_states: Per active row what the target's output embedding was given when the row's last token was picked,
            `[rows, hidden]`; None unless the drafter `needs_hidden_states`.
        target_states: The target's states at the layers that the drafter `needs_layers` of; see `new_states`.
        sampler: How the target's tokens are picked in this call: its processors, and its noise under sampling. To be
            read only. None where nothing is generated, as in a replay.
        is_sampled_from: The verifier compares the target's distribution with the one that drafts were drawn from:
            they must be drawn at random, and recorded with `draft_probs`.
        step_seconds: Node counts and seconds of the target's passes at this batch size, ascending, `[sizes]` each;
            None while they are not measured, and unless the drafter `needs_step_seconds`.
        strict: Errors are to be raised: a drafter that could go on without a part that fails must not.
    """

    rows: list[int]
    sequences: list[NDArray[np.int32]]
    prompt_lengths: list[int]
    max_depth: list[int]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    hidden_states: torch.Tensor | None = None
    target_states: HiddenStates | None = None
    sampler: Sampler | None = None
    is_sampled_from: bool = False
    step_seconds: tuple[Ints, Floats] | None = None
    strict: bool = False

    def new_states(self, layers: Sequence[int]) -> list[torch.Tensor]:
        """The target's states at the positions that the last pass committed: the prompt's at `start`, then the path's.

        Args:
            layers: In the numbering of `hidden_states`; among those that the drafter `needs_layers` of.

        Returns:
            Per active row, `[positions, layers * hidden]`; the last position is that of the sequence's last token but
            one, as the last one has not been through the target yet.
        """
        assert self.target_states is not None, "the drafter has not said that it needs states of layers"
        of_rows = self.target_states.of_rows(layers)
        return [
            states[1 - len(ids) :] if len(ids) > 1 else states[:0]
            for ids, states in zip(self.sequences, of_rows, strict=True)
        ]


@dataclass
class Step:
    """What a drafter is told after each target pass.

    Args:
        rows: Index in the batch of each row that took part.
        tree: The tree that was verified (cut to what the budget chose, padded to a bucket), on the CPU or the device. A
            source of a merged drafter is shown its own nodes of it, unless it asks for top tokens.
        accepted: Per row, how many draft tokens were accepted.
        top_tokens: What the target holds likeliest behind each node, best first, `[rows, nodes, num_top_tokens]` (fewer
            where the vocabulary is smaller); of no meaning at padding, and -1 at unlikely nodes where that would take
            its time. None unless the drafter asks for it.
        new_tokens: Per row, the tokens that were committed: accepted draft tokens, then the target's own next token
            (fewer where the row ended), int32. The context's sequences end with them.
    """

    rows: list[int]
    tree: TokenTree
    accepted: Sequence[int]
    top_tokens: Ints | None = None
    new_tokens: Sequence[NDArray[np.int32]] = ()


class Needs(NamedTuple):
    """What a drafter wants to know of the target in a call.

    Args:
        hidden_states: Whether contexts are to have `hidden_states`.
        top_tokens: How many of the target's likeliest tokens `Step.top_tokens` is to have per node; 0 for none.
        layers: Whose states contexts are to have, at every committed position; see `DraftContext.new_states`.
    """

    hidden_states: bool
    top_tokens: int
    layers: tuple[int, ...] = ()


NO_NEEDS = Needs(False, 0)


class DraftSession(ABC):
    """A drafter at work in one `generate()` call: what it keeps per row lives here, and nowhere else.

    One drafter may have sessions in several threads at once. A session is used by one thread.
    """

    @abstractmethod
    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        """Proposes at most `max_nodes` nodes per row, the root included, best first.

        Args:
            context: The active rows.
            max_nodes: Upper bound of the tree's width.

        Returns:
            A tree with one row per active row. A row with nothing to propose has its root only.
        """

    def extend(self, context: DraftContext, paths: Sequence[NDArray[np.int32]], max_nodes: int) -> TokenTree | None:
        """Continues other drafters' drafts as if they had been committed. Must not change state.

        Args:
            context: The active rows, as `propose` was last called with.
            paths: Per row the draft tokens to continue from; a row without any needs no proposal.
            max_nodes: Upper bound of the tree's width.

        Returns:
            A tree whose roots are the paths' last tokens; None if this drafter cannot do so.
        """
        return None

    def observe(self, context: DraftContext, step: Step) -> None:
        """Called after each target pass, with the context as it is after the step."""

    def finish(self, context: DraftContext) -> None:
        """Called when the call ends, normally or not; `context` lists all rows."""

    def figures(self, context: DraftContext) -> dict[str, Any]:
        """What a call's report says of the drafter beyond counts of tokens, by name; JSON types only.

        Called once per call, just before `finish`, with the same context.
        """
        return {}

    def sources_of(self, row: int, path: Sequence[int]) -> list[tuple[str, ...]] | None:
        """Which drafters proposed each token of a path of the last proposal, for a trace; called before `observe`.

        Args:
            row: Index among the active rows.
            path: Token ids, the root's child first.

        Returns:
            Names of drafters, one entry per token; None: the drafter that opened the session proposed all.
        """
        return None


class Drafter(DraftSession):
    """Guesses the next tokens as a tree.

    A drafter knows nothing of verification or of the kv cache: a bad guess costs time, never a wrong token. Concrete
    drafters are dataclasses whose fields are their hyper-parameters.

    A drafter holds settings and what outlives a call. One that keeps nothing during a call implements `propose`, and is
    its own session; any other returns a `DraftSession` of its own from `start`.
    """

    name: str = "drafter"
    needs_hidden_states: bool = False
    needs_layers: tuple[int, ...] = ()
    needs_step_seconds: bool = False
    is_stateless: bool = False
    """Proposals depend on the context alone: `propose` may be asked about a context that will never come to be."""
    is_target_free: bool = False
    """Drafts from tokens alone: recorded answers can be replayed without the target, though there is a `bind`."""
    num_top_tokens: int = 0
    """How many of the target's likeliest tokens `Step.top_tokens` is to have per node; 0 for none."""

    def bind(self, model: Any) -> None:
        """Called with the target before any work, and again at each call; drafters that depend on it prepare here.

        Raises:
            ValueError: The drafter does not fit this model.
        """

    def fit(self, verifier: Any) -> None:
        """Called after `bind` with the verifier that is to decide on what is proposed.

        Raises:
            ValueError: They do not go together.
        """
        if verifier.judges_steps:
            raise ValueError(
                f"verifier={verifier.name!r} judges reasoning steps, which drafter {self.name!r} does not write; use "
                "drafter=SpecReasonDrafter(draft_model, drafter=...) with it, or verifier='exact'"
            )

    def needs(self, device: torch.device, rows: int, is_sampled: bool) -> Needs:
        """What this drafter wants to know in the call that is about to begin; called once for each.

        Args:
            device: Where the target runs.
            rows: Of the batch.
            is_sampled: Whether the target's tokens are drawn.
        """
        return Needs(self.needs_hidden_states, self.num_top_tokens, self.needs_layers)

    def start(self, context: DraftContext) -> DraftSession:
        """Called once per `generate()` call, when the prompt is known; returns the call's session."""
        return self

    def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
        """See `DraftSession.propose`. Only for a drafter that is its own session."""
        raise NotImplementedError(f"{type(self).__name__} must implement propose(), or return a session from start()")

    def extend(self, context: DraftContext, paths: Sequence[NDArray[np.int32]], max_nodes: int) -> TokenTree | None:
        """See `DraftSession.extend`."""
        return self.propose(supposed(context, paths), max_nodes) if self.is_stateless else None

    def generate_steps(self, speculation: Any, call: Any) -> Any:
        """Runs a whole call where the verifier judges steps; only for drafters that `fit` such a verifier.

        Args:
            speculation: The decoding method, whose settings and report it uses.
            call: What `generate` has prepared.
        """
        raise NotImplementedError(f"drafter {self.name!r} writes no steps")

    def state_dict(self) -> dict[str, Any]:
        """What was learned of the bound model and is worth keeping for a new process; JSON types, no texts."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict()` of a drafter with the same settings returned. Call after `bind`."""

    def fresh(self) -> Drafter:
        """A drafter of the same settings for one deterministic call, bound to the same target.

        It must propose by the call's text alone: nothing that earlier calls taught, nothing that is measured. A drafter
        that learns across calls overrides this.

        Raises:
            ValueError: The drafter decides by measured time.
        """
        return self

    def settings(self) -> dict[str, Any]:
        """Hyper-parameters by name, for reports."""
        return {}

    def kind(self) -> tuple[Hashable, ...]:
        """Class, settings, and whatever else tells which drafts of one score are accepted about as often."""
        return type(self), str(self.settings())


def supposed(context: DraftContext, paths: Sequence[NDArray[np.int32]]) -> DraftContext:
    """The context as it would be if the tokens of these paths had been committed."""
    return DraftContext(
        rows=context.rows,
        sequences=[np.concatenate([ids, path]) for ids, path in zip(context.sequences, paths, strict=True)],
        prompt_lengths=context.prompt_lengths,
        max_depth=[depth - len(path) for depth, path in zip(context.max_depth, paths, strict=True)],
        device=context.device,
        strict=context.strict,
    )


def check_proposal(tree: TokenTree, context: DraftContext, max_nodes: int, vocab_size: int) -> None:
    """Checks what `propose` returned: an embedding lookup out of range would end a CUDA process.

    Raises:
        TypeError: It is no tree.
        ValueError: It is not one that was asked for.
    """
    if not isinstance(tree, TokenTree):
        raise TypeError(f"propose() returned a {type(tree).__name__}, a TokenTree is needed")
    if len(tree.tokens) != len(context.rows) or tree.num_nodes > max_nodes:
        raise ValueError(
            f"propose() returned a tree of {list(tree.tokens.shape)}, "
            f"at most [{len(context.rows)}, {max_nodes}] was asked for"
        )
    if tree.num_nodes == 1:  # nothing is drafted, and the loop makes its own roots
        return
    tree.validate(vocab_size)
    roots, given = [int(sequence[-1]) for sequence in context.sequences], tree.host_tokens[:, 0].tolist()
    if given != roots:
        raise ValueError(f"the roots must be the rows' last tokens {roots}, got {given}")
