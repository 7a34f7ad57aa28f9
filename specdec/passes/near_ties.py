"""Near-ties: positions at which another rounding could have picked another token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.sampling import Sampler, margins
from specdec.verifiers.base import Acceptance

HALF = (torch.bfloat16, torch.float16)
"""Types in which near-ties are counted."""


@dataclass(frozen=True)
class NearTies:
    """Finds picks whose two best tokens are closer than rounding moves them.

    In half precision a pass over many tokens rounds differently from a pass over one, so such a pick may differ from
    plain decoding's.

    Args:
        gap: Closer than this is a near-tie, in the scores that are picked from; when sampling, in log probabilities
            minus the logarithms of the draws, whose highest is the sampled token.
    """

    gap: float

    def find(self, sampler: Sampler, acceptance: Acceptance) -> Tensor:
        """Which of the new tokens were near-ties.

        Args:
            sampler: Picked them.
            acceptance: Of the last pass.

        Returns:
            Accepted tokens and then the next one, `[batch, depth + 1]`, int64, 1 at near-ties.
        """
        return self._marks(sampler.margins_at(path_of(acceptance)), acceptance)

    def find_among(self, values: Tensor, acceptance: Acceptance, is_sampled: bool) -> Tensor:
        """The same where no value is read by the host.

        Args:
            values: Scores, or probabilities divided by draws, of which the highest was picked, `[batch, nodes, vocab]`.
            acceptance: Of them.
            is_sampled: Whether `values` are divided probabilities.
        """
        nodes = path_of(acceptance)
        rows = torch.arange(len(nodes), device=nodes.device)[:, None]
        values = values[rows, nodes]
        return self._marks(margins(values, is_sampled), acceptance)

    def _marks(self, margin: Tensor, acceptance: Acceptance) -> Tensor:
        is_token = torch.arange(margin.shape[1], device=margin.device) <= acceptance.num_accepted[:, None]
        return (is_token & (margin < self.gap)).long()


def path_of(acceptance: Acceptance) -> Tensor:
    """The nodes at which the new tokens were picked, the root first, `[batch, depth + 1]`; 0 behind the end."""
    return torch.nn.functional.pad(acceptance.nodes, (1, 0)).clamp(min=0)


def gap_of(rounding: float) -> float:
    """The gap of logits below which a pick is a near-tie.

    Args:
        rounding: How far logits of a wide pass are from those of a pass over one token, root mean square. The
            difference of two logits moves by 1.4 times that; four times are nearly three standard deviations.
    """
    return 4.0 * rounding
