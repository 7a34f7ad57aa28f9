"""What was compiled is found again on the disk, and only what is the same."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from specdec.passes.compiled import package

ROWS = [{0: Dim.DYNAMIC}]


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.factor = factor
        self.register_buffer("table", torch.full((4,), factor), persistent=False)

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        return (inputs[0] * self.weight * self.table,)


class Loaded:
    def get_constant_fqns(self) -> list[str]:
        return ["weight", "table"]

    def load_constants(self, constants: dict[str, Tensor], **_: Any) -> None:
        self.constants = constants

    def __call__(self, x: Tensor) -> list[Tensor]:
        return [x * self.constants["weight"] * self.constants["table"]]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Instead of compiling, an empty package is written; gives the packages that were."""
    written: list[Path] = []

    def compile_and_package(program: Any, package_path: str, inductor_configs: dict[str, Any]) -> None:
        inductor_configs["added by torch"] = True
        Path(package_path).write_text("package")
        written.append(Path(package_path))

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_and_package)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: Loaded())
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    return written


def build(factor: float = 2.0) -> package.Function:
    return package.compile_ahead(Scaled(factor), [torch.ones(3, 4)], ROWS, "Scaled")


def test_what_was_compiled_is_found_again(
    compiled: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(build()(torch.ones(5, 4))[0], torch.full((5, 4), 2.0))
    assert len(compiled) == 1 and len(list((tmp_path / "cache").glob("*.pt2"))) == 1
    assert [record.message for record in caplog.records] == [
        "compiling the passes of Scaled, once on this machine; this takes minutes for many layers"
    ]


def test_other_constants_are_another_package(compiled: list[Path]) -> None:
    assert torch.equal(build(2.0)(torch.ones(5, 4))[0], torch.full((5, 4), 2.0))
    assert torch.equal(build(3.0)(torch.ones(5, 4))[0], torch.full((5, 4), 3.0))
    assert len(compiled) == 2


def test_another_processor_needs_a_package_of_its_own(compiled: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    build()
    monkeypatch.setattr(package, "_processor", lambda: "another one")
    build()
    assert len(compiled) == 2


def test_a_folder_that_cannot_be_written_is_done_without(
    compiled: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "file" / "folder"))
    for _ in range(2):
        assert torch.equal(build()(torch.ones(5, 4))[0], torch.full((5, 4), 2.0))
    assert len(compiled) == 2


def test_the_folder_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SPECDEC_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert package.cache_folder() == tmp_path / "specdec"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert package.cache_folder() == Path.home() / ".cache" / "specdec"


def test_building_draws_nothing(compiled: list[Path]) -> None:
    before = torch.get_rng_state()
    build()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners on this system")
@pytest.mark.parametrize("what", ["file", "folder", "owner"])
def test_what_others_may_have_written_is_not_loaded(
    what: str, compiled: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build()
    (file,) = (tmp_path / "cache").glob("*.pt2")
    assert file.parent.stat().st_mode & 0o777 == 0o700
    if what == "owner":
        os.chown(file, 12345, -1) if os.getuid() == 0 else monkeypatch.setattr(os, "getuid", lambda: 12345)
    else:
        (file if what == "file" else file.parent).chmod(0o777)
    with pytest.raises(
        PermissionError, match=r"belongs to another|written by everyone.*; delete it, or set SPECDEC_CACHE"
    ):
        build()
