"""Which tokenizers are compared; what is refused; and that nothing of the user's is changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf

import specdec
from specdec.drafters import DraftModelDrafter
from specdec.verifiers import BlockVerifier
from tests.conformance import assert_identical
from tests.drafters.small_tokenizers import words
from tests.drafters.test_cross_vocabulary import TEXTS, draft, drafter_of, inputs_of, model_of, target
from tests.tiny_models import new_model, tiny_model


def test_tokenizers_are_found_beside_the_weights(tmp_path: Any) -> None:
    for name, (model, tokenizer) in {"target": target(), "draft": draft("shuffled")}.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    drafter = DraftModelDrafter(str(tmp_path / "draft"))
    report = assert_identical(model, drafter, inputs_of("single"), max_new_tokens=12)
    assert report.drafter_figures["vocabulary"] == "intersection"
    assert report.num_accepted_tokens > 0
    same = DraftModelDrafter(draft("padded")[0], tokenizer=str(tmp_path / "target"))
    report = assert_identical(model, same, inputs_of("single"), max_new_tokens=12)
    assert report.drafter_figures == {"vocabulary": "shared"}


def test_only_what_was_named_is_looked_for_on_the_hub(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft model's tokenizer is fetched as its weights were, if it was named; a lookup for nothing takes long."""
    asked = []

    def refuse(name: str, local_files_only: bool = False) -> Any:
        asked.append((name.rsplit("/", 1)[-1], local_files_only))
        raise OSError("not found")

    monkeypatch.setattr(tf.AutoTokenizer, "from_pretrained", refuse)
    tiny_model("gpt2").save_pretrained(tmp_path / "named")
    target = new_model("gpt2")
    target.name_or_path = "some/target"
    for drafter in (DraftModelDrafter(str(tmp_path / "named")), DraftModelDrafter(new_model("gpt2"))):
        drafter.bind(target)
    assert asked == [("target", True), ("named", True), ("named", False), ("target", True)]


def test_a_folder_without_a_tokenizer_is_told_by_its_sizes(tmp_path: Any) -> None:
    model = new_model("gpt2")
    model.save_pretrained(tmp_path / "gpt2")
    named = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    report = assert_identical(tiny_model("gpt2"), DraftModelDrafter(named), inputs, max_new_tokens=8)
    assert report.drafter_figures == {"vocabulary": "shared"}


def test_the_draft_model_is_as_it_was() -> None:
    for kind in ("shuffled", "other"):
        model, tokenizer = copy.deepcopy(draft(kind)[0]), copy.deepcopy(draft(kind)[1])
        ids = torch.arange(3, 20)[None]
        before = model.generate(ids, max_new_tokens=8), model(ids).logits, model.config.to_dict()
        state = {key: value.clone() for key, value in model.state_dict().items()}
        content = tokenizer.get_vocab(), tokenizer.backend_tokenizer.to_str()
        for use in ("intersection", "text"):
            drafter = DraftModelDrafter(model, tokenizer=tokenizer, target_tokenizer=target()[1], vocabulary=use)  # type: ignore[arg-type]
            assert_identical(target()[0], drafter, inputs_of("ragged"), max_new_tokens=12, do_sample=True)
        assert torch.equal(model.generate(ids, max_new_tokens=8), before[0])
        assert torch.equal(model(ids).logits, before[1])
        assert model.config.to_dict() == before[2]
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert (tokenizer.get_vocab(), tokenizer.backend_tokenizer.to_str()) == content


def test_nothing_is_drafted_beyond_the_draft_models_positions() -> None:
    tokenizer = draft("thin")[1]
    length = len(tokenizer(TEXTS["single"][0])["input_ids"])
    for positions in (length - 2, length + 4):
        model = model_of(len(tokenizer), max_position_embeddings=positions)
        drafter = DraftModelDrafter(model, tokenizer=tokenizer, target_tokenizer=target()[1])
        report = assert_identical(target()[0], drafter, inputs_of("single"), max_new_tokens=16)
        assert (report.num_draft_tokens > 0) == (positions > length)


def endless() -> Any:
    """A tokenizer of a few words, without a token that ends a text."""
    tokenizer = words()
    tokenizer.eos_token = None
    return tokenizer


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"vocabulary": "both"}, "vocabulary='both' is not known; use one of 'auto'"),
    "no target tokenizer": ({"target_tokenizer": None}, r"comparing tokenizers needs both .* pass target_tokenizer="),
    "no tokenizer": ({"tokenizer": None, "vocabulary": "text"}, r"vocabulary='text' needs both .* pass tokenizer="),
    "nothing in common": (
        {"tokenizer": endless(), "vocabulary": "intersection"},
        "have no token in common; use 'text'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_told_apart_is_refused_before_any_work(case: str) -> None:
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        specdec.accelerate(target()[0], drafter_of("other", **settings))


def test_vocabularies_without_a_common_token() -> None:
    tokenizer = endless()
    drafter = DraftModelDrafter(model_of(len(tokenizer)), tokenizer=tokenizer, target_tokenizer=target()[1])
    for do_sample in (False, True):
        report = assert_identical(
            target()[0], drafter, inputs_of("ragged"), max_new_tokens=12, do_sample=do_sample, eos_token_id=None
        )
        assert report.drafter_figures["overlap_tokens"] == 0
    fast = specdec.accelerate(target()[0], drafter, BlockVerifier(), strict=True)
    fast.generate(**inputs_of("single"), max_new_tokens=12, do_sample=True)
    assert fast.report.num_draft_tokens == 0
    assert fast.report.drafter_figures == {}


def test_sizes_decide_without_tokenizers() -> None:
    without = {"tokenizer": None, "target_tokenizer": None}
    with pytest.raises(ValueError, match=r"of 700 tokens .* one of 400.* or tokenizer=\.\.\. \(the draft model's\)"):
        specdec.accelerate(target()[0], drafter_of("padded", **without))
    report = assert_identical(target()[0], drafter_of("shuffled", **without), inputs_of("single"), max_new_tokens=8)
    assert report.drafter_figures == {"vocabulary": "shared"}


def test_what_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(TypeError, match="a tokenizer of transformers is needed, got dict"):
        specdec.accelerate(target()[0], drafter_of("other", tokenizer={}))


def test_text_has_no_distribution() -> None:
    fast = specdec.accelerate(target()[0], drafter_of("other", vocabulary="text"), BlockVerifier(), strict=True)
    with pytest.raises(ValueError, match="vocabulary='text' cannot be used with a verifier that compares"):
        fast.generate(**inputs_of("single"), max_new_tokens=8, do_sample=True)


def test_settings_can_be_written_down() -> None:
    settings = drafter_of("other").settings()
    assert settings["tokenizer"] and isinstance(settings["tokenizer"], str)
    assert settings["vocabulary"] == "auto"
