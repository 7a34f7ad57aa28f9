"""Ways to call, and the model that is stood in for."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
import transformers as tf

import specdec
from specdec.budget import Budget
from tests.conformance import RandomTreeDrafter, assert_identical, reference
from tests.generate.common import NEW_TOKENS, PADDED, SINGLE, Recorder, accelerated
from tests.tiny_models import PAD, new_model, tiny_model, tiny_tokenizer


def test_hook_of_transformers() -> None:
    model = tiny_model()
    speculation = specdec.speculate("lookahead", strict=True, budget=Budget(16, fixed=True))
    for do_sample in (False, True, True):
        for inputs in (SINGLE, PADDED):
            expected = reference(model, inputs, max_new_tokens=NEW_TOKENS, do_sample=do_sample)
            torch.manual_seed(0)
            got = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=do_sample, custom_generate=speculation)
            assert got.tolist() == expected.ids.tolist()
            assert torch.equal(torch.get_rng_state(), expected.rng_state)
    assert speculation.report.num_accepted_tokens > 0


def test_hook_of_transformers_with_a_streamer() -> None:
    model = tiny_model()
    mine, theirs = Recorder(), Recorder()
    model.generate(**SINGLE, max_new_tokens=6, custom_generate=specdec.speculate(None, streamer=mine))
    model.generate(**SINGLE, max_new_tokens=6, streamer=theirs)
    # The prompt is put in by `generate` itself, which does not know the streamer.
    assert mine.put_in == theirs.put_in[1:]
    assert mine.ends == 1


def test_pipeline() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    fast = specdec.accelerate(model, "lookahead", strict=True)
    texts = ["hello world", "speculative decoding"]
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "return_full_text": False}
    outputs = []
    for target in (model, fast):
        pipe = tf.pipeline("text-generation", model=target, tokenizer=tokenizer)
        torch.manual_seed(0)
        outputs.append([pipe(texts[0], **kwargs), pipe(texts, batch_size=2, **kwargs)])
    assert outputs[0] == outputs[1]
    assert fast.report.num_target_passes > 0
    assert fast.report.fallback is None


def test_adapters() -> None:
    model = new_model("llama")
    before = model.generate(**SINGLE, max_new_tokens=NEW_TOKENS)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, config).eval()
    for inputs in (SINGLE, PADDED):
        for do_sample in (False, True):
            report = assert_identical(
                adapted, RandomTreeDrafter, inputs, max_new_tokens=NEW_TOKENS, do_sample=do_sample
            )
            assert report.fallback is None
            assert report.num_accepted_tokens > 0
    fast = specdec.accelerate(adapted, "lookahead")
    assert fast.capability.mode == "tree"
    assert fast.generate(**SINGLE, max_new_tokens=NEW_TOKENS).tolist() != before.tolist()
    with adapted.disable_adapter():
        assert fast.generate(**SINGLE, max_new_tokens=NEW_TOKENS).tolist() == before.tolist()


def test_training_mode_is_left_as_it_is() -> None:
    model = new_model("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    assert_identical(model, RandomTreeDrafter, SINGLE, max_new_tokens=12)
    assert model.training


def test_everything_else_is_the_models_own() -> None:
    model = new_model("llama")
    fast = specdec.accelerate(model, "lookahead")
    assert fast.model is model
    assert fast.config is model.config
    assert fast.generation_config is model.generation_config
    assert fast.device == model.device
    assert fast.dtype == model.dtype
    assert fast.can_generate()
    assert fast.eval() is fast
    assert fast.to("cpu") is fast
    assert fast.train() is fast and model.training
    assert fast.eval() is fast and not model.training
    assert fast.get_input_embeddings() is model.get_input_embeddings()
    torch.testing.assert_close(fast(**SINGLE).logits, model(**SINGLE).logits)
    torch.testing.assert_close(fast.forward(**SINGLE).logits, model(**SINGLE).logits)
    assert [name for name, _ in fast.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert "generate" in dir(fast) and "lm_head" in dir(fast)
    assert "LlamaForCausalLM" in repr(fast) and "lookahead" in repr(fast)
    fast.note = "kept by the model"
    assert model.note == "kept by the model"
    with pytest.raises(AttributeError):
        _ = fast.no_such_attribute


def test_the_dtype_can_be_changed_between_calls() -> None:
    model = new_model("llama")
    fast = accelerated(model, SINGLE)
    fast.generate(**SINGLE, max_new_tokens=4)
    assert fast.to(torch.float64) is fast
    expected = model.generate(**SINGLE, max_new_tokens=NEW_TOKENS)
    assert fast.generate(**SINGLE, max_new_tokens=NEW_TOKENS).tolist() == expected.tolist()


def test_settings_of_the_stand_in_reach_the_model() -> None:
    model = new_model("llama")
    fast = specdec.accelerate(model, None)
    fast.generation_config = tf.GenerationConfig(max_new_tokens=5, eos_token_id=None, pad_token_id=PAD)
    assert fast.generate(**SINGLE).shape[1] == SINGLE["input_ids"].shape[1] + 5


def test_model_is_not_changed() -> None:
    model = new_model("llama")
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")

    def state() -> Any:
        modules = {name: set(module.__dict__) for name, module in model.named_modules()}
        hooked = {name: [len(getattr(module, hook)) for hook in hooks] for name, module in model.named_modules()}
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        settings = copy.deepcopy((model.config.to_dict(), model.generation_config.to_dict()))
        return modules, hooked, weights, settings

    before = state()
    fast = accelerated(model, PADDED)
    fast.generate(**PADDED, max_new_tokens=NEW_TOKENS, do_sample=True, return_dict_in_generate=True, output_scores=True)
    fast.generate(**SINGLE, max_new_tokens=NEW_TOKENS)
    after = state()
    assert after[0] == before[0]
    assert after[1] == before[1]
    assert after[2].keys() == before[2].keys()
    assert all(torch.equal(after[2][name], weight) for name, weight in before[2].items())
    assert after[3] == before[3]


def test_report_tells_what_was_done() -> None:
    fast = accelerated(tiny_model(), PADDED)
    fast.generate(**PADDED, max_new_tokens=NEW_TOKENS)
    report = fast.report
    figures = report.to_dict()
    assert figures["drafter"] == "random-tree"
    assert figures["guarantee"] == "token-identical"
    assert sum(report.num_accepted_tokens_per_pos) == report.num_accepted_tokens
    assert report.tokens_per_pass > 1
    assert "tokens_per_pass" in str(report)
    fast.generate(**PADDED, max_new_tokens=1)
    assert fast.report is not report
    assert fast.report.num_generated_tokens == 3
