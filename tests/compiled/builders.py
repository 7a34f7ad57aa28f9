"""Stand-ins for the compiler: all else of a compiled pass runs, in a tenth of the time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor, nn

from specdec.passes.compiled import package, passes

Builder = Callable[[nn.Module, Sequence[Tensor], Sequence[Any], str], package.Function]


def uncompiled(module: nn.Module, inputs: Sequence[Tensor], dynamic: Sequence[Any], name: str) -> package.Function:
    """The module itself."""
    function: package.Function = torch.no_grad()(module)
    return function


def exported(module: nn.Module, inputs: Sequence[Tensor], dynamic: Sequence[Any], name: str) -> package.Function:
    """What would be compiled: the exported program, interpreted."""
    with torch.no_grad():
        program = torch.export.export(module, tuple(inputs), dynamic_shapes=(tuple(dynamic),), strict=False)
    function: package.Function = torch.no_grad()(program.module(check_guards=False))
    return function


@contextmanager
def built_by(builder: Builder) -> Iterator[list[str]]:
    """Inside, passes are built by a stand-in and nothing is known of any model; gives the names of what was built."""
    built: list[str] = []

    def noted(module: nn.Module, inputs: Sequence[Tensor], dynamic: Sequence[Any], name: str) -> package.Function:
        built.append(name)
        return builder(module, inputs, dynamic, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "compile_ahead", noted)
        patch.setattr(passes, "_PASSES", WeakKeyDictionary())
        yield built
