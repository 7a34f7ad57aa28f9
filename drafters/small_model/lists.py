"""What a draft model's logits propose: the likeliest tokens, those that the target's own noise favours, or draws."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.drafters.tokenizers.draft_vocabulary import DraftVocabulary
from specdec.kernels import Ints, host_array, largest
from specdec.sampling import SCORE_ONLY, Sampler

Kind: TypeAlias = Literal["likeliest", "coupled", "drawn"]


class DraftLists:
    """Makes lists of draft tokens out of a draft model's logits, for one call.

    Coupled lists hold the largest `q / e`, where `q` is the draft distribution and `e` the noise with which the target
    will pick its token at that position: were `q` the target's distribution, the first would be its token.

    Args:
        sampler: How the target's tokens are picked; None counts as greedy.
        coupled: Use the target's noise.
        is_drawn: Draw at random, without replacement, and keep the distributions.
        vocabulary: The tokens to draft in the draft model's logits.
        target_size: Token ids that the target can take are below.
    """

    def __init__(
        self,
        sampler: Sampler | None,
        coupled: bool,
        is_drawn: bool,
        vocabulary: DraftVocabulary,
        target_size: int,
    ) -> None:
        self.noise = sampler.noise if sampler is not None else None
        self.sampler = sampler
        self.vocabulary = vocabulary
        self.target_size = target_size
        self.kind: Kind = "likeliest"
        self.processors: list[Any] = []
        if sampler is not None and self.noise is not None:
            self.kind = "drawn" if is_drawn else "coupled" if coupled else "likeliest"
            self.processors = [p for p in sampler.processors if type(p) in SCORE_ONLY]
        self.draft_probs: list[Tensor] = []
        self._generator: torch.Generator | None = None

    def begin(self) -> None:
        """A draft begins."""
        self.draft_probs = []

    def make(self, logits: Tensor, count: int, rows: Sequence[int], depths: Ints) -> tuple[Ints, NDArray[np.float32]]:
        """The lists behind some nodes.

        Args:
            logits: The draft model's, `[rows, width, draft_vocab]`.
            count: Length of a list.
            rows: Index of each row in the batch.
            depths: Of the nodes, `[rows, width]`.

        Returns:
            Tokens, -1 where there are no more, and their share: of the probability, or coupled of all `q / e`;
            `[rows, width, count]` each.
        """
        scores = self.vocabulary.to_nodes(logits, self.target_size).float()
        for processor in self.processors:  # of the score-only kind: no prefix is looked at
            flat = scores.reshape(-1, scores.shape[-1])
            scores = processor(None, flat).view_as(scores)
        probs = keys = torch.softmax(scores, dim=-1)
        if self.kind == "coupled":
            keys = probs / self._noise(probs, rows, depths)
            keys /= keys.sum(-1, keepdim=True)
        elif self.kind == "drawn":
            keys = probs / self._draws(probs)
            self.draft_probs.append(probs)
        count = min(count, keys.shape[-1])
        if keys.is_cpu:
            listed, shares = largest(host_array(keys), count)
            listed[shares <= 0] = -1
            if self.kind == "drawn":
                shares = np.take_along_axis(probs.numpy(), listed.clip(0), -1)
            return listed, shares
        best, tokens = keys.topk(count, dim=-1)
        tokens = tokens.where(best > 0, -1)
        if self.kind == "drawn":
            best = probs.gather(-1, tokens.clamp(min=0))
        packed = torch.stack([tokens.int(), best.view(torch.int32)]).cpu().numpy()
        return packed[0].astype(np.int64), np.ascontiguousarray(packed[1]).view(np.float32)

    def probs_of(self, fed: Ints) -> Tensor:
        """Distributions that the children of nodes were drawn from, `[rows, nodes, target_size]`.

        Args:
            fed: Places among the nodes fed, -1 for leaves, `[rows, nodes]`: these get the root's.
        """
        probs = torch.cat(self.draft_probs, 1)
        index = torch.from_numpy(fed.clip(0)).to(probs.device)
        probs = probs[torch.arange(len(fed), device=probs.device)[:, None], index]
        width = self.noise.vocab if self.noise is not None else self.target_size
        return torch.nn.functional.pad(probs, (0, width - probs.shape[-1]))

    def _noise(self, probs: Tensor, rows: Sequence[int], depths: Ints) -> Tensor:
        """The target's noise at the tokens behind some nodes, `[rows, width, vocab]`, or `[rows, 1, vocab]`."""
        assert self.noise is not None and self.sampler is not None
        first = [self.sampler.sequences.num_generated(row) for row in rows]
        if (depths == depths[:, :1]).all():
            depths = depths[:, :1]
        noise = [self.noise.at(first[i] + depth, row) for i, row in enumerate(rows) for depth in depths[i].tolist()]
        stacked = noise[0][None] if len(noise) == 1 else torch.stack(noise)
        return stacked.view(*depths.shape, -1)[..., : probs.shape[-1]].to(probs.device)

    def _draws(self, probs: Tensor) -> Tensor:
        if self._generator is None:
            self._generator = own_generator(probs.device)
        return torch.empty_like(probs).exponential_(generator=self._generator)


def own_generator(device: torch.device) -> torch.Generator:
    """A generator apart from the global one, which it leaves alone, and as reproducible: seeded by its state."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    digest = hashlib.blake2b(b"drafts", digest_size=7)
    for state in states:
        digest.update(state.cpu().numpy().tobytes())
    return torch.Generator(device).manual_seed(int.from_bytes(digest.digest(), "little"))
