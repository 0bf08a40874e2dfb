"""Numerics of the Triton kernels, run by `test_numerics.py` in a process of its own.

Triton decides when it is imported whether kernels are interpreted, so this file cannot share a
process with other tests. Without TRITON_INTERPRET they run on a GPU. `triton_cases.py` tells by
how much results may be off.
"""

import dataclasses

import pytest
import torch
from packed_tensors import RECIPE_LAYOUTS
from triton_cases import (
    DEVICE,
    EPS,
    Case,
    inline_bound,
    inline_slack,
    layout,
    make_case,
    product_bound,
    sizes,
)

from precalib_kernels import ops
from precalib_kernels.backends.base import LinearSpec
from precalib_kernels.backends.triton import op
from precalib_kernels.backends.triton.backend import TritonBackend
from precalib_kernels.backends.triton.launch_configs import Blocks, blocks_for
from precalib_kernels.backends.triton.memory_layout import reason_against, triton_layout
from precalib_kernels.format.layout import Layout


def check_product(case: Case, rows: int, dtype=torch.float32, bias=False, blocks=None, x=None):
    generator = torch.Generator().manual_seed(rows)
    if x is None:
        x = torch.randn((rows, case.columns), generator=generator).to(dtype)
    shift = torch.randn(sum(case.parts), generator=generator).to(dtype) if bias else None
    there, bias_there = x.to(DEVICE), None if shift is None else shift.to(DEVICE)
    if blocks is None:
        text = case.layout.to_text()
        y = op.gpu_linear(there, case.packed, bias_there, case.parts, text)
    else:
        arrays = dict(zip(ops.array_order(case.layout), case.packed, strict=True))
        y = op.gemm(there, arrays, bias_there, case.layout, case.parts, blocks)
    assert y.dtype == dtype
    y = y.cpu()
    weight = case.weight()
    exact = x.double() @ weight.T + (0 if shift is None else shift.double())
    panels = blocks is None and blocks_for(op.family(), rows, 128) is None
    weight_error = EPS[dtype] if panels else 0  # dequantized to the type of x first
    allowed = product_bound(case, x, exact, weight_error)
    if rows > 32:  # sums in units of the group at hand: a scale of zero counts 2**-60
        row_scale = case.tensors.get("row_scale", torch.ones(1, 1)).double().T
        allowed += 2**-59 * x.double().abs().sum(1, keepdim=True) * row_scale
    worst = ((y.double() - exact).abs() / allowed).max().item()
    assert worst < 1, f"off by {worst} of the bound"


def check_inline(case: Case, rows: int = 3) -> None:
    text, (slack, _) = case.layout.to_text(), inline_slack(case)
    assert triton_layout(case.layout).inline_salient
    weight = op.gpu_dequantize(case.packed, case.columns, case.parts, text, torch.float32)
    weight = weight.cpu()
    assert ((weight.double() - case.weight()).abs() <= slack).all()
    x = torch.randn(rows, case.columns, generator=torch.Generator().manual_seed(rows))
    y = op.gpu_linear(x.to(DEVICE), case.packed, None, case.parts, text).cpu().double()
    assert ((y - x.double() @ case.weight().T).abs() <= inline_bound(case, x)).all()


FORMS = [
    pytest.param(bits, mode, group, id=f"{bits}-{mode}-{group}")
    for bits in (2, 3, 4, 5)
    for mode in ("uniform", "table", "trellis")
    for group in (32, 64, 128)
    if (mode, group) != ("trellis", 32)
]


@pytest.mark.parametrize(("bits", "mode", "group"), FORMS)
def test_every_form_is_the_reference(bits, mode, group):
    """Ragged in N and K, fused shards with a column scale each."""
    case = make_case(layout(bits, mode, group, 2), [17, 1], 160)
    weight = op.gpu_dequantize(
        case.packed, 160, case.parts, case.layout.to_text(), torch.float32
    ).cpu()
    base, added = sizes(case)
    assert ((weight.double() - case.weight()).abs() <= 2**-20 * base + 2**-11 * added + 1e-9).all()
    check_product(case, 3)


@pytest.mark.parametrize(
    "name", ["balanced-2", "balanced-3", "balanced-5", "paper-4", "paper-3", "rtn-4"]
)
def test_recipes(name):
    check_product(make_case(RECIPE_LAYOUTS[name], [20], 160), 2, torch.bfloat16)


ODD = {3: (-127, -65, -29, -7, 13, 31, 63, 127), 4: (-127, *range(-83, 85, 12), 127)}
NARROW = {3: (-64, -30, -11, 0, 7, 12, 31, 63), 4: (*range(-64, -4, 8), *range(7, 64, 8))}
TABLE_KINDS = {"uniform": {3: None, 4: None}, "odd": ODD, "narrow": NARROW}


def paper(bits: int, group: int, slots: int, table: str = "uniform") -> Layout:
    return Layout(
        bits, group, TABLE_KINDS[table][bits], salient_count=slots, salient_bits=bits,
        salient_grid="min-max",
    )  # fmt: skip


@pytest.mark.parametrize(("group", "slots"), [(32, 32), (64, 7), (128, 16)])
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("table", TABLE_KINDS)
def test_salient_weights_in_place(bits, group, slots, table):
    """Ragged in N and K, fused shards; groups of 32 with nothing but salient weights."""
    check_inline(make_case(paper(bits, group, slots, table), [17, 1], 352))


@pytest.mark.parametrize("table", ["uniform", "odd"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (16, 96), (33, 576), (130, 4160)])
def test_salient_weights_in_place_for_awkward_shapes(rows, columns, table):
    check_inline(make_case(paper(4, 128, 16, table), [3], columns), rows)


def test_salient_weights_in_place_under_a_column_scale():
    chosen = dataclasses.replace(paper(4, 128, 16), column_scale=True)
    check_product(make_case(chosen, [17, 1], 288), 3, torch.bfloat16, bias=True)


@pytest.mark.parametrize("table", TABLE_KINDS)
def test_extremes_in_place(table):
    """Zero and tiny scales beside large salient weights, largest codes, one-sided grids."""
    case = make_case(paper(4, 64, 20, table), [12], 256)
    change = case.tensors
    change["scales"][0], change["scales"][1], change["scales"][2] = 0, 2.0**-24, 1e-4
    if table == "uniform":
        change["zeros"][3], change["zeros"][4] = 0, 15
    change["qweight"][3:5] = 255
    change["salient_scale"][5], change["salient_offset"][5] = 0, 0
    change["salient_scale"][6], change["salient_offset"][6] = 0, 3
    change["salient_offset"][7] = -200
    change["salient_scale"][8], change["salient_offset"][8] = 4000, -30000
    change["scales"][9] = 60000
    change["scales"][10], change["salient_scale"][10] = 0, 2.0**-24
    check_inline(case)
    check_inline(case, 40)


@pytest.mark.parametrize(
    ("rows", "parts", "columns", "dtype", "bias"),
    [
        (1, [1], 32, torch.float16, True),
        (16, [96], 96, torch.bfloat16, True),
        (33, [17], 576, torch.bfloat16, False),
        (1, [3], 4160, torch.float16, False),
        (130, [3], 32, torch.bfloat16, True),
        (257, [70, 5], 64, torch.float16, True),  # beyond the table: dequantized
    ],
)
def test_awkward_shapes(rows, parts, columns, dtype, bias):
    check_product(make_case(layout(4, "trellis", 128, 2), parts, columns), rows, dtype, bias)


@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (16, 576), (70, 320), (257, 96)])
@pytest.mark.parametrize("mode", ["uniform", "table", "trellis"])
def test_awkward_shapes_of_five_bits(mode, rows, columns):
    check_product(make_case(layout(5, mode, 128, 2), [66], columns), rows, torch.bfloat16, True)


@pytest.mark.parametrize("programs_per_sm", [0, 100])
def test_any_split_gives_the_same_sum(programs_per_sm):
    case = make_case(layout(3, "uniform", 64, 0), [65], 700 // 32 * 32)
    check_product(case, 5, blocks=Blocks(64, 8, 2, 2, programs_per_sm))
    check_product(case, 40, blocks=Blocks(64, 64, 2, 2, programs_per_sm))


def test_blocks_of_128_rows():
    check_product(
        make_case(layout(4, "uniform", 128, 1), [130], 128), 2, blocks=Blocks(128, 8, 4, 2, 1)
    )


@pytest.mark.parametrize("count", [0, 32])
def test_no_salient_weights_and_whole_groups_of_them(count):
    check_product(make_case(layout(4, "trellis", 64, count), [9], 96), 2)


def test_extremes():
    """Zero scales, largest codes, and activations across the range of their type."""
    case = make_case(layout(4, "trellis", 128, 2), [8], 256)
    case.tensors["scales"][::2] = 255
    case.tensors["scales"][1, 0] = 255
    case.tensors["scales"][3, 1] = 255
    case.tensors["qweight"][1::2] = 255
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))  # others overflow y
    x[0] *= 6e4 / x[0].abs().max()
    x[1] *= 2**-20
    x[2, 1:] = 0
    x[3] = 0
    check_product(case, 4, torch.float16, x=x.half())
    check_product(case, 4, torch.bfloat16, x=(x * 2.0**90).bfloat16())
    many = x.repeat(10, 1)  # the other way of summing up
    check_product(case, 40, torch.float16, x=many.half())
    check_product(case, 40, torch.bfloat16, x=(many * 2.0**90).bfloat16())


def test_groups_of_scale_zero():
    """Between others, first and last, in float16."""
    case = make_case(layout(4, "uniform", 32, 1), [4], 160)
    for row, groups in enumerate(((0,), (1, 2), (4,), (0, 1, 2, 3, 4))):
        case.tensors["scales"][row, list(groups)] = 0
    check_product(case, 3)
    check_product(case, 40)


@pytest.mark.parametrize("chosen", [layout(4, "uniform", 32, 1), paper(4, 32, 16, "odd")])
def test_negative_scales(chosen):
    """Which our quantizer does not write, but the format does not forbid."""
    case = make_case(chosen, [4], 160)
    case.tensors["scales"][:, ::2] *= -1
    for rows in (3, 40):
        if triton_layout(chosen).inline_salient:
            check_inline(case, rows)
        else:
            check_product(case, rows)


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_operators_are_ones_for_torch(with_bias):
    case = make_case(layout(4, "trellis", 128, 2), [17, 1], 160)
    packed, text = case.packed, case.layout.to_text()
    x = torch.randn(3, 160, device=DEVICE)
    bias = torch.randn(18, device=DEVICE) if with_bias else None
    operators = torch.ops.precalib
    torch.library.opcheck(operators.gpu_linear.default, (x, packed, bias, case.parts, text))
    given = packed, 160, case.parts, text, torch.float32
    torch.library.opcheck(operators.gpu_dequantize.default, given)


def test_no_rows():
    case = make_case(layout(4, "uniform", 128, 0), [8], 64)
    y = op.gpu_linear(
        torch.empty(0, 64, device=DEVICE), case.packed, None, [8], case.layout.to_text()
    )
    assert y.shape == (0, 8)


def test_all_of_these_layouts_are_accepted():
    assert {reason_against(layout(*param.values, 2)) for param in FORMS} == {None}


def test_the_backend(as_layer):
    case = make_case(layout(4, "trellis", 128, 2), [17, 1], 160)
    spec = LinearSpec(case.layout, 160, (17, 1), torch.bfloat16, "cuda")
    backend = TritonBackend(spec)
    tensors = {name: tensor.to(DEVICE) for name, tensor in case.tensors.items()}
    layer = as_layer(backend, tensors)
    x = torch.randn(2, 3, 160)
    y = backend.apply(layer, x.to(DEVICE), None).cpu()
    assert y.shape == (2, 3, 18)
    torch.testing.assert_close(y.double(), x.double() @ case.weight().T, rtol=0.02, atol=0.05)
