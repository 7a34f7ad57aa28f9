"""The pair of the reasoning test bed: its training can be resumed, and what is shipped is what the docs say."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec.verifiers import JudgedStep
from specdec.verifiers.judges import StepText
from tests.examples.scripts import EXAMPLES, imported

NAMES = (
    "task",
    "chains",
    "solving",
    "learn",
    "packing",
    "judging",
    "scoring",
    "make",
    "corpus",
    "muon",
    "trainer",
    "export",
)
LAYERS = {"solver": 2, "target": 6, "draft": 2}
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
    with imported(["reasoning", "embedded"], NAMES) as modules:
        yield modules


@pytest.fixture(scope="module")
def tokenizer(scripts, tmp_path_factory):
    return scripts["chains"].make_tokenizer(tmp_path_factory.mktemp("work") / "tokenizer")


def trained(scripts, tokenizer, folder: Path, which: str, tokens: list[int]) -> Any:
    """A tiny model trained in one go or in several."""
    for total in tokens:
        learn = scripts["learn"]
        settings = learn.Settings(tokens=total, decay_tokens=0, batch=1, window=400, eval_every=3, save_every=2)
        run = learn.Run.fresh(TINY | {"num_hidden_layers": LAYERS[which]}, len(tokenizer), settings)
        teacher = None
        if which == "target":
            teacher = copy.deepcopy(run.model)
            learn.learns_to_judge(run, 2)
        writer = scripts["chains"].Writer(tokenizer, None, scripts["chains"].Mixture(judged=which == "target"))
        assert learn.learn(run, writer, which, settings, folder / which, teacher=teacher)
    return run


@pytest.mark.parametrize("which", LAYERS)
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

    shares = scripts["learn"].accuracies(Six(), batch, writer.digit_ids)
    assert shares["scores"] == pytest.approx(scores.count(6) / len(scores))
    assert 0 < shares["results"] < 0.5
    assert shares["steps kept or not"] == 0.5


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
    chains = list(solving.draft_chains(None, tokenizer, list(scripts["chains"].problems(6))))
    assert len(chains) == 6
    assert chains[0]["steps"] == ["(a) 1+1=2.\n\n", "(b) 2+2=4.\n\n"]
    assert json.loads(json.dumps(chains[0]))["operations"]


def test_figures_of_judges(scripts, tokenizer):
    """Of two right steps and two wrong ones, scored 9, 5 and 5, 1."""
    scoring = scripts["scoring"]
    digits = torch.eye(10)
    steps = [
        (points, JudgedStep(torch.tensor([0]), torch.zeros(1), digits[score]))
        for points, score in ((9, 9), (9, 5), (6, 5), (0, 1))
    ]
    figures = scoring.figures_of(steps, scoring.judges_of(tokenizer)[:2])
    assert figures["expectation"] == figures["argmax"]
    assert figures["argmax"]["auc"] == 3.5 / 4
    assert figures["argmax"]["sorted as they ought to be at 7"] == 0.75
    assert (figures["argmax"]["right kept at 5"], figures["argmax"]["wrong kept at 5"]) == (1.0, 0.5)
    assert scoring.table(figures, "title").row_count == len(figures["argmax"])


def test_steps_are_judged_as_spec_reason_would(scripts, tokenizer):
    """The digits and log-probabilities of one pass over all steps are those of a pass over each."""
    learn, writer = scripts["learn"], scripts["chains"].Writer(tokenizer)
    model = learn.Run.fresh(TINY, len(tokenizer), learn.Settings()).model.eval()
    chain = {"start": 34, "operations": [["add", 27], ["halve", 2]], "steps": ["(a) 34+27=60.\n\n", "(b) 60/2=30.\n\n"]}
    judged = list(scripts["scoring"].judged_steps(model, writer, [chain]))
    assert [points for points, _ in judged] == [3, 9]
    before = "<|user|>Start with 34.\n(a) add 27\n(b) halve\nWhat is left?<|assistant|><think>\n"
    for (_, step), text in zip(judged, chain["steps"], strict=True):
        assert (step.prefix, step.text) == (before, text)
        ids = writer.encode(before + text + scripts["task"].JUDGE_PROMPT)
        with torch.inference_mode():
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        start, stop = len(writer.encode(before)), len(writer.encode(before + text))
        each = log_probs[start - 1 : stop - 1].gather(-1, torch.tensor(ids[start:stop])[:, None])[:, 0]
        torch.testing.assert_close(step.log_probs, each)
        torch.testing.assert_close(step.digit_probs, log_probs[-1, writer.digit_ids].exp())
        before += text


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
    assert shares["target"] > 0.8
    assert shares["draft"] < shares["target"]


def test_the_target_judges_with_a_digit(scripts, pair):
    """Steps in full and in short of held-out problems, each once right and once with another result."""
    model, tokenizer = pair["target"]
    task, writer = scripts["task"], scripts["chains"].Writer(tokenizer)
    chains = []
    for number in range(24):
        problem = scripts["chains"].held_out_problem(number)
        values, operation = problem.values, problem.operations[0]
        for result in (values[1], values[1] + 1):
            step = str(task.write_step(0, operation, values[0], result, random.Random(number), short=number % 2 == 1))
            operations = [(operation.kind, operation.number) for operation in problem.operations]
            chains.append({"start": problem.start, "operations": operations, "steps": [step]})
    steps = list(scripts["scoring"].judged_steps(model, writer, chains))
    judges = scripts["scoring"].judges_of(tokenizer)
    figures = scripts["scoring"].figures_of(steps, judges)
    assert min(float(step.digit_probs.sum()) for _, step in steps) > 0.9
    for name in ("expectation", "argmax"):
        assert figures[name]["auc"] > 0.9
        assert figures[name]["right kept at 7"] > 0.9
        assert figures[name]["wrong kept at 7"] < 0.2


def test_certainty_tells_right_steps_from_wrong_ones(scripts, pair):
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
