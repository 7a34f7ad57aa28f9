"""Checkpoints that hold no heads: every fault named, nothing run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from specdec.heads import MedusaHeads
from tests.heads.checkpoint_files import (
    HIDDEN,
    save_raw,
    wild,
    wild_vllm,
)
from tests.tiny_models import VOCAB, tiny_model

Fault = Callable[[dict[str, Tensor]], Any]
FAULTS: dict[str, tuple[Fault, list[str]]] = {
    "a bias is missing": (lambda t: t.pop("1.0.linear.bias"), ["missing: 1.0.linear.bias"]),
    "a weight is missing": (lambda t: t.pop("4.1.linear.weight"), ["missing: 4.1.linear.weight"]),
    "a projection is missing": (lambda t: t.pop("0.2.weight"), ["missing: 0.2.weight"]),
    "a head is missing": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith("2.")],
        ["missing: 2.0.linear.weight, 2.0.linear.bias, 2.1.linear.weight, 2.1.linear.bias, 2.2.weight"],
    ),
    "a layer is missing": (
        lambda t: [t.pop(name) for name in list(t) if ".1.linear" in name],
        [f"{head}.1.linear.{kind}" for head in range(5) for kind in ("weight", "bias")],
    ),
    "one is extra": (lambda t: t.update({"5.weight": torch.ones(2)}), ["unexpected: 5.weight"]),
    "a projection is among the layers": (
        lambda t: t.update({"3.1.weight": torch.ones(VOCAB, HIDDEN)}),
        ["unexpected: 3.1.weight"],
    ),
    "shapes": (
        lambda t: t.update(
            {
                "0.0.linear.weight": torch.ones(HIDDEN, HIDDEN + 1),
                "1.1.linear.bias": torch.ones(1, HIDDEN),
                "2.2.weight": torch.ones(VOCAB - 1, HIDDEN),
            }
        ),
        [
            f"0.0.linear.weight ({HIDDEN}, {HIDDEN + 1}) instead of ({HIDDEN}, {HIDDEN})",
            f"1.1.linear.bias (1, {HIDDEN}) instead of ({HIDDEN},)",
            f"2.2.weight ({VOCAB - 1}, {HIDDEN}) instead of ({VOCAB}, {HIDDEN})",
        ],
    ),
    "a number": (lambda t: t.update({"0.0.linear.weight": torch.tensor(1.0)}), ["0.0.linear.weight () instead of"]),
    "integers": (
        lambda t: t.update({"0.0.linear.bias": torch.ones(HIDDEN, dtype=torch.int8)}),
        ["not of floats: 0.0.linear.bias"],
    ),
    "several": (
        lambda t: (t.pop("0.0.linear.bias"), t.pop("4.2.weight"), t.update({"x": torch.ones(1), "y": torch.ones(1)})),
        ["missing: 0.0.linear.bias, 4.2.weight", "unexpected: x, y"],
    ),
}


@pytest.mark.parametrize("file_name", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_tensor_that_does_not_fit_is_named(fault: str, file_name: str, tmp_path: Path) -> None:
    change, named = FAULTS[fault]
    tensors = wild(5, 2)
    change(tensors)
    with pytest.raises(ValueError, match="do not make a set of heads") as error:
        MedusaHeads.from_pretrained(save_raw(tmp_path, tensors, None, file_name))
    assert file_name in str(error.value)
    for words in named:
        assert words in str(error.value)


def test_faults_of_vllm_tensors_are_named(tmp_path: Path) -> None:
    tensors = wild_vllm(bias=True)
    del tensors["blocks.1.layers.0.bias"], tensors["lm_heads.2.weight"]
    tensors |= {"blocks.0.layers.1.weight": torch.ones(2, 3), "fc.weight": torch.ones(1)}
    with pytest.raises(ValueError, match="do not make") as error:
        MedusaHeads.from_pretrained(save_raw(tmp_path, tensors, None, "model.safetensors"))
    for words in (
        "missing: blocks.1.layers.0.bias, lm_heads.2.weight",
        "unexpected: fc.weight",
        f"blocks.0.layers.1.weight (2, 3) instead of ({HIDDEN}, {HIDDEN})",
    ):
        assert words in str(error.value)


def test_another_models_file_is_not_heads(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no Medusa heads: no tensor is named like '0\.0\.linear\.weight'"):
        MedusaHeads.from_pretrained(tmp_path)


class Harmful:
    """Leaves a trace when it is unpickled."""

    trace: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    harmful = Harmful()
    harmful.trace = tmp_path / "trace"
    torch.save(wild() | {"0.0.linear.weight": harmful}, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(ValueError, match=r"medusa_lm_head\.pt is damaged or holds pickled objects, which are refused"):
        MedusaHeads.from_pretrained(tmp_path)
    assert not harmful.trace.exists()
    torch.save(nn.Linear(2, 2), tmp_path / "medusa_lm_head.pt")
    with pytest.raises(ValueError, match="refused because reading them can run code"):
        MedusaHeads.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [[torch.ones(2)], {"0.0.linear.weight": 3}])
def test_files_of_something_else(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "medusa_lm_head.pt")
    with pytest.raises(ValueError, match="is not a dictionary of tensors"):
        MedusaHeads.from_pretrained(tmp_path)


@pytest.mark.parametrize("file_name", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
@pytest.mark.parametrize("kept", [0, 20, 0.5])
def test_files_cut_short(kept: float, file_name: str, tmp_path: Path) -> None:
    save_raw(tmp_path, wild(), None, file_name)
    whole = (tmp_path / file_name).read_bytes()
    (tmp_path / file_name).write_bytes(whole[: int(kept * len(whole)) if kept < 1 else int(kept)])
    with pytest.raises(ValueError, match=rf"{file_name}.*(cut short|damaged)"):
        MedusaHeads.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_config_that_is_none(text: str, tmp_path: Path) -> None:
    save_raw(tmp_path, wild(), None, "medusa_lm_head.pt")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is not"):
        MedusaHeads.from_pretrained(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none of medusa_lm_head\.safetensors, medusa_lm_head\.pt"):
        MedusaHeads.from_pretrained(tmp_path)
    for name in (tmp_path / "no such folder", "nobody/has-such-heads"):
        with pytest.raises(FileNotFoundError, match=str(name)):
            MedusaHeads.from_pretrained(name)
