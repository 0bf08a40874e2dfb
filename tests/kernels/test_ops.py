"""Operators: schema, fakes, compile, and refusals."""

import pytest
import torch

from offline_quantize.method.recipes import RECIPES
from precalib_kernels import ops
from precalib_kernels.errors import FormatError
from precalib_kernels.format import reference


@pytest.fixture(params=list(RECIPES))
def arguments(request, make_packed):
    packed = make_packed(RECIPES[request.param].layout, rows=6, columns=160)
    return packed, ops.packed_list(packed.tensors, packed.layout, 160)


@pytest.mark.parametrize("with_bias", [False, True])
def test_operators_pass_opcheck(arguments, with_bias):
    packed, tensors = arguments
    bias = torch.randn(6) if with_bias else None
    text = packed.layout.to_text()
    torch.library.opcheck(
        torch.ops.precalib.linear.default, (torch.randn(2, 160), tensors, bias, [6], text)
    )
    torch.library.opcheck(
        torch.ops.precalib.dequantize.default, (tensors, 160, [6], text, torch.bfloat16)
    )


def test_linear_is_the_reference_also_when_compiled(arguments):
    packed, tensors = arguments
    x, bias, text = torch.randn(3, 160), torch.randn(6), packed.layout.to_text()
    expected = reference.linear(x, packed.tensors, packed.layout, bias)
    assert torch.equal(torch.ops.precalib.linear(x, tensors, bias, [6], text), expected)

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.precalib.linear(x, tensors, bias, [6], text)

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)


def test_dequantize_gives_the_weight_in_the_wanted_type(arguments):
    packed, tensors = arguments
    weight = torch.ops.precalib.dequantize(tensors, 160, [6], packed.layout.to_text(), torch.half)
    assert torch.equal(weight, reference.dequantize(packed.tensors, packed.layout, 160).half())


def test_wrong_tensors_are_refused_before_any_arithmetic(arguments):
    packed, tensors = arguments
    x, text = torch.randn(3, 160), packed.layout.to_text()
    with pytest.raises(FormatError, match="do not add up to 6 output rows"):
        torch.ops.precalib.linear(x, tensors, None, [4], text)
    with pytest.raises(FormatError, match="packed tensors, expected"):
        torch.ops.precalib.linear(x, tensors[:-1], None, [6], text)
    with pytest.raises(FormatError, match="'qweight' is "):
        torch.ops.precalib.linear(torch.randn(3, 192), tensors, None, [6], text)
