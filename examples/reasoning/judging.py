"""A judge that asks nothing: how sure the target itself is of what a step says."""

from __future__ import annotations

import math
from typing import Any

from task import BREAK, STEP

from specdec.verifiers import JudgedStep

THINKING = "<think>\n"
WORDS_FOR_THE_SAME = 12
"""Ways to go on with the same meaning, about, where a word stands; where a digit or a sign stands there is one."""


class CertaintyJudge:
    """Scores a step from 0 to 9 by its least likely token under the target, which the pass over the step tells.

    The score is 9 plus the decimal logarithm, rounded: 9 stands for more than 32 %, and each point less for a tenth of
    that. A word is as good as its likeliest synonyms. That a step is in short is no fault of it: how it begins, where
    the target would have had words, and that it has no more words, is left out.

    Args:
        tokenizer: The target's.
    """

    __name__ = "certainty"

    def __init__(self, tokenizer: Any) -> None:
        self._exact = set(tokenizer.convert_tokens_to_ids([*"0123456789+-*/="]))

    def __call__(self, step: JudgedStep) -> float:
        tokens = step.tokens.tolist()
        is_exact = [token in self._exact for token in tokens]
        # the target may have written the step's first words itself
        whole = (step.prefix + step.text).rstrip().rpartition(BREAK)[2].rpartition(THINKING)[2]
        match = STEP.match(whole)
        is_short = match is not None and not match["opener"]
        begins_at = is_exact.index(True) if is_short and any(is_exact) else -1
        probs = [
            math.exp(log_prob) if exact else min(1.0, WORDS_FOR_THE_SAME * math.exp(log_prob))
            for place, (log_prob, exact) in enumerate(zip(step.log_probs.tolist(), is_exact, strict=True))
            if not is_short or (exact and place > begins_at)
        ]
        return max(0.0, round(9 + math.log10(max(min(probs, default=1.0), 1e-9))))
