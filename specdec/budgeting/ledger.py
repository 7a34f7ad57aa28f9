"""What a budget has learned of one kind of call: how good drafts are, and whether they pay."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
from torch import nn

from specdec.budgeting.pass_times import size_class
from specdec.kernels import Floats

SCORE_BINS = 12
PATIENCE, MOST_LOST = 4, 1.0
"""Drafts that may promise less than they cost, since one has brought more, before drafting rests; more of them while
fewer passes are lost by that: what is cheap may go on looking for long."""
FIRST_CREDIT, MOST_CREDIT = 1.0, 2.0
"""Passes without a draft that drafting may lose before anything is known, and after a time in which it has paid."""
MOST_DEBT, DEBT_KEPT = 3.0, 0.7
"""Passes that drafting can owe at most, and what is left of it when a call begins: another prompt may be another
matter."""
DEBT_MARGIN = 0.5
"""What a draft must promise above a pass without, for each pass that drafting owes."""
LEAST_TRUST, MOST_TRUST = 0.7, 1.1
"""Bounds of the factor between promises and what comes of them: the size that promises most is often overrated."""
TRUST_PRIOR = 50.0
"""Draft tokens, promised and accepted, that the factor of 1 is worth."""
FORGIVEN = 0.005
"""What is forgiven in a step of what drafting owes, in passes."""
TRIAL_SHARE = 0.003
"""Share of the time that goes into drafts while drafting does not pay, to see when it does again."""
LONGEST_REST, FIRST_RESTS = 128, 3
"""Steps of a rest at most, and how many rests at most count in a call of those in the calls before."""
LEAST_SHORTENING, SHORTENING_RATE = 2.0, 0.4
"""Passes that a call's rows must need less for anything to be learned of it, and how fast that is."""
FIRST_SHORTENING, SHORTENING_DOUBT = 0.5, 0.05
"""What is supposed at first, and how fast that is returned to: without drafts nothing more would be learned of it."""


@dataclass
class Standing:
    """How drafting stands at one batch size.

    Args:
        credit: What drafts have brought above their cost of late, in passes without a draft; what they owe if negative.
        losses: Drafts that promised less than they cost, since one has brought more.
        lost: Passes that they cost.
        rests: Rests since then.
        rest: Steps for which drafting still rests.
        shortening: Passes by which calls have become shorter, for each pass that their rows needed less on average. The
            row that ends last decides; what other rows gain is less work while they are gone.
    """

    credit: float = FIRST_CREDIT
    losses: int = 0
    lost: float = 0.0
    rests: int = 0
    rest: int = 0
    shortening: float = FIRST_SHORTENING

    @property
    def margin(self) -> float:
        """Speed-up that a draft must promise: promises that were not kept make for higher ones to be asked for."""
        return 1.0 + DEBT_MARGIN * max(-self.credit, 0.0)

    def book(self, passes: float) -> None:
        """Adds to the credit what a draft has brought above its cost, in passes without a draft."""
        self.credit = min(max(self.credit + passes, -MOST_DEBT), MOST_CREDIT)
        if passes > 0.0:
            self.losses, self.lost, self.rests = 0, 0.0, 0

    def forgive(self) -> None:
        """Lets a step pass: what drafting owes is forgiven slowly."""
        self.credit = max(self.credit, min(self.credit + FORGIVEN, 0.0))

    def end_call(self, shorter: int, expected: float) -> None:
        """Takes in by how many passes a call was shorter, and how many its rows needed less on average."""
        if expected >= LEAST_SHORTENING:
            share = min(max(shorter / expected, 0.0), 1.0)
            self.shortening += SHORTENING_RATE * (share - self.shortening)

    def lose(self, passes: float) -> None:
        """Notes a draft that promises less than it costs: rests double up to where such drafts take `TRIAL_SHARE`."""
        self.losses += 1
        self.lost += passes
        if self.losses >= PATIENCE and self.lost >= MOST_LOST:
            self.rest = min(int(passes / TRIAL_SHARE), 2 ** min(self.rests, 10), LONGEST_REST)
            self.rests += 1


@dataclass
class Learned:
    """What was counted of one kind of call.

    Args:
        tried: Drafts whose parent was accepted, by bin of their score, `[bins]`.
        hit: Those among them that were accepted, `[bins]`.
        promised: Draft tokens of late that were expected to be accepted, over all rows.
        kept: Those that were.
        standings: How drafting stands, by batch size.
    """

    tried: Floats = field(default_factory=lambda: np.zeros(SCORE_BINS))
    hit: Floats = field(default_factory=lambda: np.zeros(SCORE_BINS))
    promised: float = 0.0
    kept: float = 0.0
    standings: dict[int, Standing] = field(default_factory=dict)

    def standing(self, rows: int) -> Standing:
        """How drafting stands with so many rows; what is not known yet is supposed to be as with other numbers."""
        size = size_class(rows)
        if size not in self.standings:
            known = [standing.credit for standing in self.standings.values()]
            credit = min(sum(known) / len(known), FIRST_CREDIT) if known else FIRST_CREDIT
            self.standings[size] = Standing(credit)
        return self.standings[size]

    @property
    def trust(self) -> float:
        """Accepted draft tokens for each one that was promised."""
        trust = (self.kept + TRUST_PRIOR) / (self.promised + TRUST_PRIOR)
        return min(max(trust, LEAST_TRUST), MOST_TRUST)

    def begin_call(self) -> None:
        """Another prompt is worth a draft."""
        for standing in self.standings.values():
            standing.rest, standing.rests = 0, min(standing.rests, FIRST_RESTS)
            standing.credit = max(standing.credit, DEBT_KEPT * standing.credit)
            standing.shortening += SHORTENING_DOUBT * (FIRST_SHORTENING - standing.shortening)

    def forget(self, decay: float) -> None:
        """Lets the counts be worth less."""
        self.tried *= decay
        self.hit *= decay
        self.promised *= decay
        self.kept *= decay


LEARNED: WeakKeyDictionary[nn.Module, dict[tuple[Hashable, tuple[Hashable, ...], bool], Learned]] = WeakKeyDictionary()
"""By owner, kind of call, and whether it samples: what one budget has learned of a model, the next one knows."""
