"""Grammars as logits processors: real matchers run as they are, and are never asked once they have terminated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import specdec
from specdec.budget import Budget
from specdec.drafters import LookaheadDrafter
from specdec.generation import FallbackWarning
from tests.conformance import OracleDrafter
from tests.generate.common import PADDED, SINGLE
from tests.tiny_models import BOS, EOS, PAD, VOCAB, tiny_model, tiny_tokenizer

PROMPT = SINGLE["input_ids"].shape[1]
TOKENS = [str(tiny_tokenizer().convert_ids_to_tokens(i)) for i in range(VOCAB)]


class XGrammar(tf.LogitsProcessor):
    """One matcher, without a look at whether it has terminated."""

    def __init__(self) -> None:
        xgr = pytest.importorskip("xgrammar")
        info = xgr.TokenizerInfo(TOKENS, xgr.VocabType.RAW, vocab_size=VOCAB, stop_token_ids=[EOS])
        grammar = xgr.GrammarCompiler(info).compile_grammar('root ::= "{" [a-f]{3,9} ":" [0-9]{2,5} "}"')
        self.matcher = xgr.GrammarMatcher(grammar)
        self.bitmask = xgr.allocate_token_bitmask(1, VOCAB)
        self.apply = xgr.apply_token_bitmask_inplace
        self.is_first = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.is_first:
            assert self.matcher.accept_token(int(input_ids[0, -1]))
        self.is_first = False
        assert not self.matcher.is_terminated()
        self.matcher.fill_next_token_bitmask(self.bitmask)
        self.apply(scores, self.bitmask)
        return scores


class Characters:
    """The tiny tokenizer as llguidance takes one."""

    eos_token_id, bos_token_id = EOS, BOS

    def __init__(self) -> None:
        self.special_token_ids, self.tokens = [PAD, BOS, EOS], [token.encode() for token in TOKENS]

    def __call__(self, text: str | bytes) -> list[int]:
        text = text.decode() if isinstance(text, bytes) else text
        return [TOKENS.index(letter) for letter in text if letter in TOKENS]


class LLGuidance(tf.LogitsProcessor):
    def __init__(self) -> None:
        llg = pytest.importorskip("llguidance")
        torch_llg = pytest.importorskip("llguidance.torch")
        tokenizer = llg.LLTokenizer(llg.TokenizerWrapper(Characters()))
        grammar = llg.LLMatcher.grammar_from_regex(r"\{[a-f]{3,9}:[0-9]{2,5}\}")
        self.matcher, self.fill = llg.LLMatcher(tokenizer, grammar), torch_llg.fill_next_token_bitmask
        self.bitmask, self.apply = torch_llg.allocate_token_bitmask(1, VOCAB), torch_llg.apply_token_bitmask_inplace
        self.is_first = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.is_first:
            assert self.matcher.consume_token(int(input_ids[0, -1])), self.matcher.get_error()
        self.is_first = False
        assert int(input_ids[0, -1]) != EOS
        self.fill(self.matcher, self.bitmask)
        self.apply(scores, self.bitmask)
        return scores


MAKES: list[Callable[[], tf.LogitsProcessor]] = [XGrammar, LLGuidance]


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("drafter", ["oracle", "lookahead", "merged"])
def test_a_matcher_is_not_asked_past_the_end(make: Any, do_sample: bool, drafter: str) -> None:
    model = tiny_model()
    kwargs = {"max_new_tokens": 40, "do_sample": do_sample}
    torch.manual_seed(0)
    expected = model.generate(**SINGLE, **kwargs, logits_processor=[make()])
    assert int(expected[0, -1]) == EOS
    answer = [*expected[0, PROMPT:].tolist(), 7, 8, 9]
    lookahead = LookaheadDrafter()
    lookahead.add(answer, scope="shared")
    drafters = {
        "oracle": OracleDrafter([answer]),
        "lookahead": lookahead,
        "merged": [OracleDrafter([answer]), lookahead],
    }
    fast = specdec.accelerate(model, drafters[drafter], strict=True, budget=Budget(64, fixed=True))
    for _ in range(2):
        torch.manual_seed(0)
        got = fast.generate(**SINGLE, **kwargs, logits_processor=[make()])
        assert got.tolist() == expected.tolist()
        assert fast.report.fallback is None
        assert fast.report.num_accepted_tokens > 0


@pytest.mark.filterwarnings(f"ignore::{FallbackWarning.__module__}.{FallbackWarning.__name__}")
def test_grammars_in_a_batch_are_those_of_plain_decoding() -> None:
    xgr = pytest.importorskip("xgrammar")
    hf = pytest.importorskip("xgrammar.contrib.hf")
    info = xgr.TokenizerInfo(TOKENS, xgr.VocabType.RAW, vocab_size=VOCAB, stop_token_ids=[EOS])
    grammar = xgr.GrammarCompiler(info).compile_grammar('root ::= "{" [a-f]{3,9} "}"')
    fast = specdec.accelerate(tiny_model(), "lookahead")
    got, expected = (
        target.generate(**PADDED, max_new_tokens=24, logits_processor=[hf.LogitsProcessor(grammar)])
        for target in (fast, tiny_model())
    )
    assert got.tolist() == expected.tolist()
    assert "LogitsProcessor may look at the whole batch" in str(fast.report.fallback)
