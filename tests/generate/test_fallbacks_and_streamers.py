"""What cannot be speculated on, and tokens on their way."""

from __future__ import annotations

import warnings
from threading import Thread
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor

import specdec
from specdec.budget import Budget
from specdec.generation import FallbackWarning
from tests.generate.common import NEW_TOKENS, PADDED, SINGLE, Recorder, accelerated, one_fallback
from tests.tiny_models import new_model, tiny_model, tiny_tokenizer

FALLBACKS: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 3}, "beam search"),
    "sampled beams": ({"num_beams": 2, "do_sample": True}, "beam sample"),
    "no cache": ({"use_cache": False}, "use_cache is False"),
    "hidden states": ({"return_dict_in_generate": True, "output_hidden_states": True}, "hidden states"),
    "static cache": ({"cache_implementation": "static"}, "StaticCache"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens is given"),
}


@pytest.mark.parametrize("case", FALLBACKS)
@pytest.mark.parametrize("do_batch", [False, True], ids=["single", "padded"])
def test_what_cannot_be_speculated_on_is_left_to_the_model(case: str, do_batch: bool) -> None:
    kwargs, reason = FALLBACKS[case]
    if do_batch and case == "prompt lookup":
        pytest.skip("transformers takes one row only")
    model, inputs = tiny_model(), PADDED if do_batch else SINGLE
    fast = accelerated(model, inputs)
    with one_fallback(reason):
        for _ in range(2):
            torch.manual_seed(0)
            got = fast.generate(**inputs, max_new_tokens=12, **kwargs)
    torch.manual_seed(0)
    expected = model.generate(**inputs, max_new_tokens=12, **kwargs)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        fast.generate(**inputs, max_new_tokens=12, **kwargs)  # one warning is enough
    assert torch.equal(torch.get_rng_state(), state)
    assert type(got) is type(expected)
    ids, expected_ids = (out if isinstance(out, Tensor) else out.sequences for out in (got, expected))
    assert ids.tolist() == expected_ids.tolist()
    if "return_dict_in_generate" in kwargs:
        assert len(got.hidden_states) == len(expected.hidden_states)
    assert reason in str(fast.report.fallback)
    assert fast.report.capability == "plain"


def test_assistant_model_is_left_to_the_model() -> None:
    model = tiny_model()
    fast = accelerated(model, SINGLE)
    with one_fallback("assistant_model is given"):
        got = fast.generate(**SINGLE, max_new_tokens=12, assistant_model=new_model("llama", seed=1))
    assert got.tolist() == model.generate(**SINGLE, max_new_tokens=12).tolist()


def test_encoder_decoder_is_left_to_the_model() -> None:
    torch.manual_seed(0)
    config = tf.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    model = tf.T5ForConditionalGeneration(config).eval()
    fast = specdec.accelerate(model, "lookahead")
    with one_fallback("encoder-decoder"):
        got = fast.generate(**SINGLE, max_new_tokens=12)
    assert got.tolist() == model.generate(**SINGLE, max_new_tokens=12).tolist()


@pytest.mark.parametrize("inputs", [SINGLE, PADDED], ids=["single", "padded"])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("settings", [{}, {"eos_token_id": [2, 5, 9, 30, 31, 32, 33]}, {"num_beams": 1}])
def test_streamer_is_fed_as_by_plain_decoding(inputs: Any, do_sample: bool, settings: dict[str, Any]) -> None:
    model = tiny_model()
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": do_sample, **settings}
    fast = accelerated(model, inputs, **kwargs)
    mine, theirs = Recorder(), Recorder()
    torch.manual_seed(0)
    fast.generate(**inputs, **kwargs, streamer=mine)
    torch.manual_seed(0)
    model.generate(**inputs, **kwargs, streamer=theirs)
    assert mine.put_in == theirs.put_in
    assert mine.ends == theirs.ends == 1


def test_text_streamer_in_a_thread() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    fast = accelerated(model, SINGLE)
    streamer = tf.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60.0)
    thread = Thread(target=fast.generate, kwargs={**SINGLE, "max_new_tokens": NEW_TOKENS, "streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    new = model.generate(**SINGLE, max_new_tokens=NEW_TOKENS)[0, SINGLE["input_ids"].shape[1] :]
    assert text == tokenizer.decode(new)


def test_streamer_of_a_fallback() -> None:
    fast = accelerated(tiny_model(), SINGLE)
    mine, theirs = Recorder(), Recorder()
    with one_fallback("use_cache"):
        fast.generate(**SINGLE, max_new_tokens=6, use_cache=False, streamer=mine)
    tiny_model().generate(**SINGLE, max_new_tokens=6, use_cache=False, streamer=theirs)
    assert mine.put_in == theirs.put_in
    assert mine.ends == 1


def test_streamer_of_one_call_is_not_that_of_the_next() -> None:
    fast = accelerated(tiny_model(), SINGLE)
    recorder = Recorder()
    fast.generate(**SINGLE, max_new_tokens=6, streamer=recorder)
    count = len(recorder.put_in)
    fast.generate(**SINGLE, max_new_tokens=6)
    assert len(recorder.put_in) == count


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_virtual_tokens_of_peft(kind: str) -> None:
    """Their keys and values come into the cache behind the caller's back, also where the probe knew the bare model."""
    model = new_model("llama")
    assert specdec.accelerate(model).capability.mode == "tree"
    configs = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}
    tuned = peft.get_peft_model(model, configs[kind](task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    torch.manual_seed(0)
    expected = tuned.generate(**SINGLE, max_new_tokens=NEW_TOKENS)
    fast = specdec.accelerate(tuned, "lookahead", strict=True, budget=Budget(16, fixed=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        assert fast.generate(**SINGLE, max_new_tokens=NEW_TOKENS).tolist() == expected.tolist()
    assert fast.report.fallback
