"""Whether one more level of a draft pays."""

from __future__ import annotations

import numpy as np

from specdec.budgeting.kernels import seconds_of
from specdec.budgeting.pass_times import StepTimes
from specdec.drafters.small_model.growth import DraftNodes
from specdec.kernels import Floats, Ints, kernel, kernel_part

WIDTHS = np.array([1, 2, 4, 8])
"""Nodes that a level may feed."""
SCORE_CLASSES = 4
"""Classes of a node's score, over which the scores of its children are averaged; the root is a class of its own."""
FIRST_MEANS = np.array([[0.5, 0.1, 0.05], [0.6, 0.12, 0.06], [0.7, 0.12, 0.06], [0.8, 0.08, 0.04], [0.7, 0.12, 0.06]])
"""Acceptance by rank, behind nodes of each class, that is supposed before anything is known."""
MEMORY = 0.98
"""What is kept per level or step of the averages."""
WORTH_MEMORY = 0.95
"""What is kept per draft of the average that tells what drafts are worth."""
IDLE_GAIN = 0.02
"""Tokens that drafts are thought to be worth more for each step without one, so that they are tried again."""
LOOK_AHEAD = 8
"""Levels to look ahead."""


class Pace:
    """What drafting costs and brings at one batch size: measured, with decay."""

    def __init__(self) -> None:
        self.means = FIRST_MEANS.copy()
        self.level_times = StepTimes(int(WIDTHS[-1]))
        self.tokens = 0.0
        self.seconds = 0.0
        self.worth = 0.5

    def is_worth_it(self) -> bool:
        """Whether drafts of late brought more tokens than could have been made in their time."""
        return self.worth > 0.0

    def price(self, rows: int, plain_seconds: float) -> float:
        """Tokens per second of late, over all rows."""
        return self.tokens / self.seconds if self.seconds else rows / plain_seconds

    def width(
        self, nodes: DraftNodes, max_depths: Ints, step_seconds: tuple[Ints, Floats], max_nodes: int, widths: Ints
    ) -> int:
        """How many nodes to feed next, 0 to stop; see `best_width`."""
        if not self.level_times.is_known:
            return 1
        price = self.price(len(nodes.tokens), float(step_seconds[1][0]))
        times = self.level_times.known()
        means = self.means
        return best_width(nodes, max_depths, means, price, widths, *times, *step_seconds, max_nodes, LOOK_AHEAD)

    def observe_level(self, nodes: DraftNodes, level: Ints, seconds: float) -> None:
        """Takes in a level whose children have been added."""
        self.level_times.update(level.shape[1], seconds)
        average_scores(nodes, level, self.means, MEMORY)

    def observe_step(
        self, rows: int, accepted: int, draft_seconds: float, seconds: float, plain_seconds: float
    ) -> None:
        """Takes in a step.

        Args:
            rows: Rows of the batch.
            accepted: Draft tokens accepted, over all rows.
            draft_seconds: What drafting took; 0 where nothing was drafted.
            seconds: What the target's pass took.
            plain_seconds: What it takes without a draft.
        """
        if draft_seconds == 0.0:
            self.worth += IDLE_GAIN
        else:
            more = draft_seconds + seconds - plain_seconds
            worth = (accepted - self.price(rows, plain_seconds) * more) / rows
            self.worth = WORTH_MEMORY * self.worth + (1 - WORTH_MEMORY) * worth
        self.tokens = MEMORY * self.tokens + rows + accepted
        self.seconds = MEMORY * self.seconds + draft_seconds + seconds


@kernel_part
def score_class(score: float, classes: int) -> int:
    """Class of a node's score."""
    return int(min(max(int(score * classes), 0), classes - 1))


@kernel
def average_scores(nodes: DraftNodes, level: Ints, means: Floats, memory: float) -> None:
    """Moves the average scores by the parent's class and rank, `[classes, ranks]`, towards those of a level's children.

    Behind likely nodes they count for more.
    """
    classes, ranks = means.shape
    for row in range(level.shape[0]):
        for place in range(level.shape[1]):
            parent = level[row, place]
            if parent < 0 or nodes.num_children[row, parent] == 0:
                continue
            at = classes - 1 if parent == 0 else score_class(nodes.scores[row, parent], classes - 1)
            share = (1.0 - memory) * nodes.orders[row, parent]
            start = nodes.first_child[row, parent]
            for child in range(start, start + min(nodes.num_children[row, parent], ranks)):
                rank = nodes.ranks[row, child]
                if rank < ranks:
                    means[at, rank] += share * (nodes.scores[row, child] - means[at, rank])


@kernel
def insert_pair(best: Floats, others: Floats, count: int, value: float, other: float) -> int:
    """Inserts a value into a falling list, which drops its last one when it is full; `others` keeps the same order.

    Returns:
        The new length.
    """
    size = best.shape[0]
    if count == size:
        if value <= best[size - 1]:
            return count
        count -= 1
    at = count
    while at > 0 and best[at - 1] < value:
        best[at], others[at] = best[at - 1], others[at - 1]
        at -= 1
    best[at], others[at] = value, other
    return count + 1


@kernel
def insert(best: Floats, count: int, value: float) -> int:
    """`insert_pair` of one list alone."""
    return int(insert_pair(best, best, count, value, value))


@kernel
def net_tokens(best: Floats, filled: Ints, price: float, known: Ints, seconds: Floats) -> float:
    """Tokens of the best target pass over these nodes, less those that would be made elsewhere in its time.

    Args:
        best: Each row's path products, falling, `[rows, nodes]`.
        filled: How many there are, `[rows]`.
        price: Tokens per second made otherwise.
        known: Node counts whose time is known, `[sizes]`.
        seconds: Their times, `[sizes]`.
    """
    rows = best.shape[0]
    most = filled.max()
    net = rows - price * seconds_of(1, known, seconds)
    tokens = float(rows)
    bucket = 0
    for node in range(most):
        for row in range(rows):
            if node < filled[row]:
                tokens += best[row, node]
        size = node + 2
        while bucket < known.shape[0] and known[bucket] < size:
            bucket += 1
        if node == most - 1 or (bucket < known.shape[0] and known[bucket] == size):
            net = max(net, tokens - price * seconds_of(size, known, seconds))
    return float(net)


@kernel
def sort_nodes(
    nodes: DraftNodes,
    max_depths: Ints,
    best: Floats,
    filled: Ints,
    waiting: Floats,
    scores: Floats,
    num_waiting: Ints,
) -> int:
    """Lists what was drafted, and what of it may be fed, by what it is ranked by.

    Args:
        nodes: What was drafted so far.
        max_depths: Largest depth of a node, `[rows]`.
        best: Written: path products, falling, `[rows, nodes]`.
        filled: Written: how many there are, `[rows]`.
        waiting: Written: the same of nodes that may be fed, `[rows, width]`.
        scores: Written: their scores, `[rows, width]`.
        num_waiting: Written: how many there are, `[rows]`.

    Returns:
        How many levels may follow those nodes at most.
    """
    deepest = 0
    for row in range(nodes.tokens.shape[0]):
        for node in range(nodes.counts[row]):
            if node > 0:
                filled[row] = insert(best[row], filled[row], nodes.orders[row, node])
            is_new = nodes.fed[row, node] < 0 or (node == 0 and nodes.counts[row] == 1)
            if is_new and nodes.depths[row, node] < max_depths[row]:
                num_waiting[row] = insert_pair(
                    waiting[row], scores[row], num_waiting[row], nodes.orders[row, node], nodes.scores[row, node]
                )
                deepest = max(deepest, max_depths[row] - nodes.depths[row, node])
    return deepest


@kernel
def best_width(
    nodes: DraftNodes,
    max_depths: Ints,
    means: Floats,
    price: float,
    widths: Ints,
    level_sizes: Ints,
    level_seconds: Floats,
    known: Ints,
    seconds: Floats,
    max_nodes: int,
    max_levels: int,
) -> int:
    """How many nodes to feed next, 0 to stop: what makes the most tokens, time counted at what it is worth.

    Levels to come are supposed to bring children as good as those of late: each way of going on, by its width and its
    number of levels, is worth the tokens of the best target pass over all nodes by then, less what could be made in
    the time of that pass and of the levels. A step may pay only together with those after it, as two tokens cost a
    target pass much and eight hardly more.

    Args:
        nodes: What was drafted so far.
        max_depths: Largest depth of a node, `[rows]`.
        means: Acceptance of children of late, by their parent's class and their rank, `[classes, ranks]`.
        price: Tokens per second made of late, over all rows.
        widths: What may be chosen, rising.
        level_sizes: Widths of levels whose time is known, `[sizes]`.
        level_seconds: Their times, `[sizes]`.
        known: Node counts of target passes whose time is known, `[sizes]`.
        seconds: Their times, `[sizes]`.
        max_nodes: Largest tree, the root included.
        max_levels: How many levels ahead to look at most.
    """
    rows = nodes.tokens.shape[0]
    best = np.zeros((rows, max(max_nodes - 1, 1)))
    waiting, scores = np.zeros((rows, widths[-1])), np.zeros((rows, widths[-1]))
    filled, num_waiting = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    deepest = sort_nodes(nodes, max_depths, best, filled, waiting, scores, num_waiting)
    most, width = net_tokens(best, filled, price, known, seconds), 0
    ahead, ahead_filled = np.empty_like(best), np.empty_like(filled)
    for option in widths:
        if option > 1 and option > 2 * num_waiting.max():
            break
        cost = price * seconds_of(option, level_sizes, level_seconds)
        ahead[:] = best
        ahead_filled[:] = filled
        front, front_scores = waiting[:, :option].copy(), scores[:, :option].copy()
        for levels in range(1, min(max_levels, deepest) + 1):
            for row in range(rows):
                for i in range(min(option, num_waiting[row])):
                    at = score_class(front_scores[row, i], means.shape[0] - 1)
                    if nodes.counts[row] == 1 and levels == 1:
                        at = means.shape[0] - 1
                    for rank in range(means.shape[1]):
                        path = front[row, i] * means[at, rank]
                        ahead_filled[row] = insert(ahead[row], ahead_filled[row], path)
                    front[row, i] *= means[at, 0]
                    front_scores[row, i] = means[at, 0]
            net = net_tokens(ahead, ahead_filled, price, known, seconds) - levels * cost
            if net > most:
                most, width = net, option
    return width
