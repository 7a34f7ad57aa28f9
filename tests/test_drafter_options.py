"""Drafters by name and settings, as the command line has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from specdec.commands.drafter_options import DrafterFlags
from specdec.common import embedded
from specdec.common.conversion import convert
from specdec.common.errors import UserError
from specdec.drafters import DRAFTERS, DraftContext, Drafter
from specdec.tree import TokenTree


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("3", int, 3),
        ("0.5", float, 0.5),
        ("yes", bool, True),
        ("FALSE", bool, False),
        ("1,2,4", tuple[int, ...], (1, 2, 4)),
        ("[1, 2]", list[int], [1, 2]),
        ("none", int | None, None),
        ("7", int | None, 7),
        ("path/to", str | Any, "path/to"),
        ("3", int | str, 3),
        ("a", int | str, "a"),
        ("B", Literal["a", "B"], "B"),
        ("2", Literal[1, 2], 2),
    ],
)
def test_drafter_option_is_converted(text: str, annotation: Any, value: Any) -> None:
    converted = convert(text, annotation, "x")
    assert converted == value
    assert type(converted) is type(value)


@pytest.mark.parametrize(
    ("text", "annotation"), [("1.5", int), ("x", float), ("maybe", bool), ("c", Literal["a", "b"]), ("x", int | None)]
)
def test_drafter_option_of_another_type(text: str, annotation: Any) -> None:
    with pytest.raises(ValueError, match="--drafter-option depth"):
        convert(text, annotation, "--drafter-option depth")


def test_drafter_with_a_required_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Needy(Drafter):
        model: str
        depth: int = 3

        def propose(self, context: DraftContext, max_nodes: int) -> TokenTree:
            raise NotImplementedError

    monkeypatch.setitem(DRAFTERS, "needy", Needy)
    with pytest.raises(UserError, match="needs model; give --drafter-option model="):
        DrafterFlags("needy", ["depth=2"]).build()
    assert DrafterFlags("needy", ["depth=2", "model=x=y"]).build() == Needy("x=y", 2)


def test_embedded_draft_model_goes_with_the_embedded_model() -> None:
    flags = DrafterFlags("draft-model", ["growth=chain", "max_depth=3"], "embedded")
    drafter = flags.build()
    assert drafter.draft_model == str(embedded.embedded_path("draft"))
    assert (drafter.growth, drafter.max_depth) == ("chain", 3)
    assert DrafterFlags("draft-model", ["draft_model=self", "layers=2"], "embedded").build().draft_model == "self"
    assert DrafterFlags("draft-model", ["draft_model=embedded-draft"]).build().draft_model == drafter.draft_model
    with pytest.raises(UserError, match="needs a draft model"):
        DrafterFlags("draft-model", [], "other/model").build()
