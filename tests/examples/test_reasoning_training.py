"""The pair of the reasoning test bed: its training can be resumed, and what is shipped is what the docs say."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec.reasoning import StepText
from specdec.verifiers import JudgedStep

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDERS = (EXAMPLES / "reasoning", EXAMPLES / "embedded")
NAMES = ("task", "chains", "solving", "learn", "packing", "judging", "make", "corpus", "muon", "trainer", "export")
MODELS = EXAMPLES / "reasoning" / "models"
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """The modules of examples/reasoning and of examples/embedded, which import each other by bare name."""
    kept = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    path = list(sys.path)
    sys.path[:0] = map(str, FOLDERS)
    try:
        yield {name: __import__(name) for name in NAMES}
    finally:
        sys.path[:] = path
        for name in NAMES:
            sys.modules.pop(name, None)
        sys.modules.update(kept)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer(scripts, tmp_path_factory):
    return scripts["chains"].make_tokenizer(tmp_path_factory.mktemp("work") / "tokenizer")


def trained(scripts, tokenizer, folder: Path, which: str, tokens: list[int]) -> Any:
    """A tiny model trained in one go or in several."""
    for total in tokens:
        settings = scripts["learn"].Settings(
            tokens=total, decay_tokens=0, batch=1, window=400, eval_every=3, save_every=2
        )
        run = scripts["learn"].Run.fresh(TINY, len(tokenizer), settings)
        assert scripts["learn"].learn(run, scripts["chains"].Writer(tokenizer), which, settings, folder / which)
    return run


@pytest.mark.parametrize("which", ["target", "draft"])
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(scripts, tokenizer, tmp_path, which):
    whole = trained(scripts, tokenizer, tmp_path / "whole", which, [2000])
    parts = trained(scripts, tokenizer, tmp_path / "parts", which, [800, 2000])
    assert whole.step == parts.step == 5
    assert whole.losses == parts.losses
    for mine, theirs in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_digits_of_results_and_scores_are_counted_apart(scripts, tokenizer):
    """A model that always says "6" is right where the digit is a 6."""
    writer = scripts["chains"].Writer(tokenizer)
    examples = scripts["learn"].draw(writer, "target", "some", 4, 400)
    batch = writer.batch(examples, 400)
    scores = [points for example in examples for _, points in example.judged]

    class Six(torch.nn.Module):
        def forward(self, input_ids, **kwargs):
            logits = torch.zeros(*input_ids.shape, len(tokenizer))
            logits[..., writer.digit_ids[6]] = 1
            return type("Output", (), {"logits": logits})

    shares = scripts["learn"].accuracies(Six(), batch, writer.mark_ids)
    assert shares["scores"] == pytest.approx(scores.count(6) / len(scores))
    assert 0 < shares["results"] < 0.5


def test_exported_models_load_as_trained(scripts, tokenizer, tmp_path):
    trained(scripts, tokenizer, tmp_path, "draft", [800])
    state = torch.load(tmp_path / "draft" / "checkpoint.pt", weights_only=True)
    model = scripts["make"].load_checkpoint(tmp_path / "draft")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scripts["packing"].write("draft", model, tokenizer, state, 0.5, 10, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())
    assert "50.0% of 10" in (tmp_path / "out" / "README.md").read_text()


def test_chains_of_a_draft_are_its_steps(scripts, tokenizer, monkeypatch):
    solving = scripts["solving"]
    monkeypatch.setattr(
        solving,
        "solve",
        lambda model, tokenizer, problems, do_sample: ["(a) 1+1=2.\n\n(b) 2+2=4.\n\n</think>\n\n4"] * 3,
    )
    chains = list(solving.draft_chains(None, tokenizer, 6))
    assert len(chains) == 6
    assert chains[0]["steps"] == ["(a) 1+1=2.\n\n", "(b) 2+2=4.\n\n"]
    assert json.loads(json.dumps(chains[0]))["operations"]


# --- what is shipped ---


@pytest.fixture(scope="module")
def pair() -> dict[str, Any]:
    return {
        name: (AutoModelForCausalLM.from_pretrained(MODELS / name).eval(), AutoTokenizer.from_pretrained(MODELS / name))
        for name in ("target", "draft")
    }


def test_the_pair_is_small_and_loads_exactly(pair):
    sizes = {name: (MODELS / name / "model.safetensors").stat().st_size for name in pair}
    assert sizes["target"] > 4 * sizes["draft"]
    assert sum(sizes.values()) < 10_000_000
    for name, (model, tokenizer) in pair.items():
        assert model.dtype == torch.float32
        with safe_open(MODELS / name / "model.safetensors", "pt") as stored:
            key = "model.layers.0.mlp.up_proj.weight"
            assert torch.equal(stored.get_tensor(key).float(), model.state_dict()[key])
        assert tokenizer.get_vocab() == pair["target"][1].get_vocab()
        assert len(tokenizer) == model.config.vocab_size


def test_tokens_of_the_shipped_tokenizer(pair):
    _, tokenizer = pair["target"]
    for text in (*map(str, range(10)), "</think>", "<think>", ".\n\n"):
        (token,) = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode([token]) == text
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|user|>x<|assistant|><think>\n"


def test_the_target_solves_more_than_the_draft(scripts, pair):
    problems = list(scripts["chains"].problems(24))
    shares = {name: scripts["solving"].accuracy(*of, problems) for name, of in pair.items()}
    assert shares["target"] >= 0.9
    assert shares["draft"] < shares["target"]


def test_the_judge_tells_right_steps_from_wrong_ones(scripts, pair):
    """In full and in short, behind nothing or behind the target's own first words."""
    model, tokenizer = pair["target"]
    task, writer = scripts["task"], scripts["chains"].Writer(tokenizer)
    judge = scripts["judging"].CertaintyJudge(tokenizer)
    scores: dict[bool, list[float]] = {True: [], False: []}
    for number in range(8):
        problem = scripts["chains"].held_out_problem(number)
        values, operation = problem.values, problem.operations[0]
        slip = values[1] + 10 if values[1] < 90 else values[1] - 10
        for is_right, result in ((True, values[1]), (False, slip)):
            short = number % 2 == 1
            step = str(task.write_step(0, operation, values[0], result, random.Random(number), short))
            prompt = writer.prompt(problem)
            ids = writer.encode(step)
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            log_probs = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
            for begun in (0, 2):
                words = StepText(ids[begun:], prompt + ids[:begun], lambda some: str(tokenizer.decode(list(some))))
                judged = JudgedStep(torch.tensor(ids[begun:]), log_probs[begun:], None, words)
                scores[is_right].append(judge(judged))
    assert min(scores[True]) >= 7
    assert max(scores[False]) < 7
