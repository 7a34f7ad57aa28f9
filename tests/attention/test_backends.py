"""Every backend of tree attention against the definition, over a table of shapes."""

from __future__ import annotations

import pytest
import torch

from specdec.passes.attention.base import TreeAttention, UnsupportedAttentionError
from specdec.passes.attention.dense import SdpaAttention
from specdec.passes.attention.flash import FlashTreeAttention
from specdec.passes.attention.triton_attention import BlockSizes, TritonTreeAttention
from tests.attention.reference import SHAPES, Shape, call_of, flash_attn_in_torch, needs_triton, reference

BACKENDS = {
    "sdpa": SdpaAttention(),
    "flash": FlashTreeAttention(flash_attn_in_torch),
    "triton": TritonTreeAttention(),
}
PARAMETERS = [pytest.param(n, marks=needs_triton) if n == "triton" else n for n in BACKENDS]


def error(backend: TreeAttention, shape: Shape, dtype: torch.dtype = torch.float32) -> float:
    call = call_of(shape, dtype)
    out = backend.attend(call)
    expected = reference(call, shape)
    assert out.shape == expected.shape
    assert out.dtype == dtype
    return float((out.double() - expected).abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PARAMETERS)
def test_attention_is_that_of_the_definition(name: str, shape: str) -> None:
    lacks = {"sdpa": SHAPES[shape].softcap, "flash": SHAPES[shape].chunk}.get(name)
    if lacks is not None:
        with pytest.raises(UnsupportedAttentionError, match=f"'{name}' cannot"):
            error(BACKENDS[name], SHAPES[shape])
    else:
        assert error(BACKENDS[name], SHAPES[shape]) < 1e-5


@needs_triton
@pytest.mark.parametrize("shape", ["ragged rows", "window and padding"])
def test_any_number_of_splits_gives_the_same(shape: str) -> None:
    assert error(TritonTreeAttention(splits=7), SHAPES[shape]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PARAMETERS)
def test_half_precision_differs_by_its_rounding(name: str, dtype: torch.dtype) -> None:
    if name == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    shape = Shape(nodes=16, lengths=(70, 33), heads=(6, 2), sizes=(64, 64))
    assert error(BACKENDS[name], shape, dtype) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", PARAMETERS)
def test_lengths_may_be_a_column_of_something_wider(name: str) -> None:
    shape = SHAPES["ragged rows"]
    call = call_of(shape)
    wide = torch.randint(99, (len(shape.lengths), 5))
    wide[:, 0] = call.plan.lengths
    object.__setattr__(call.plan, "lengths", wide[:, 0])
    assert float((BACKENDS[name].attend(call).double() - reference(call, shape)).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [16, 64, 80, 96, 128, 192, 256, 512])
def test_blocks_are_powers_of_two_and_fit_in_shared_memory(size: int, dtype: torch.dtype) -> None:
    for value in {size, max(size * 2 // 3, 16), 128}:
        for rows in (1, 4, 32, 512):
            blocks = BlockSizes.of(rows, size, value, dtype)
            for number in (blocks.rows, blocks.slots, blocks.head, blocks.value):
                assert number >= 16
                assert number.bit_count() == 1
            if size <= 256:
                keys_and_values = blocks.slots * (blocks.head + blocks.value) * dtype.itemsize
                queries = blocks.rows * blocks.head * dtype.itemsize
                assert 2 * keys_and_values + queries <= 99 * 1024, "what a block has on the smaller cards"


def test_sdpa_leaves_the_mask_out_where_one_node_sees_everything() -> None:
    shape = Shape(nodes=1, lengths=(20, 20))
    call = call_of(shape)
    object.__setattr__(call.plan, "needs_no_mask", True)
    assert float((SdpaAttention().attend(call).double() - reference(call, shape)).abs().max()) < 1e-5
    assert not call.plan._made
