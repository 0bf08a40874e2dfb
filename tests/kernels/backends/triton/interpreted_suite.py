"""Numerics of the Triton kernels, run by `test_numerics.py` in a process of its own.

Triton decides when it is imported whether kernels are interpreted, so this file cannot share a
process with other tests. Without TRITON_INTERPRET they run on a GPU. Errors are measured against
Σ|x·w|: a float16 activation is off by at most 2**-12 of itself (2**-11 in tiny ones), a salient
weight by 2**-11 of what it adds to its base weight, all sums are float32, and the result is rounded
once to its own type.
"""

import dataclasses
import itertools

import pytest
import torch
from packed_tensors import RECIPE_LAYOUTS
from torch import Tensor

from precalib_kernels import ops
from precalib_kernels.backends.base import LinearSpec
from precalib_kernels.backends.triton import op
from precalib_kernels.backends.triton.backend import TritonBackend
from precalib_kernels.backends.triton.launch_configs import Blocks, blocks_for
from precalib_kernels.backends.triton.memory_layout import SUBNORMAL, reason_against, triton_layout
from precalib_kernels.backends.triton.repack import LEAST_UNIT, repack
from precalib_kernels.format import reference
from precalib_kernels.format.codebooks import TRELLIS_CODEBOOKS
from precalib_kernels.format.layout import Layout

ON_GPU = not op.interpreted() and torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
EPS = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8 if ON_GPU else 2**-7}
# The interpreter cuts bfloat16 off instead of rounding it.
TABLES = {2: (-100, -30, 31, 100), 3: (-128, -90, -40, 0, 10, 50, 90, 127)}
TABLES[5] = (-128, *range(-111, 112, 8), -3, 103, 127)
TABLES[4] = (-128, -95, -70, -50, -36, -22, -12, -1, 0, 10, 21, 33, 47, 64, 88, 127)


def layout(bits: int, mode: str, group: int, slots: int, **others) -> Layout:
    base = Layout(bits=bits, group_size=group, salient_count=slots, **others)
    if mode == "uniform":
        return base
    levels = TRELLIS_CODEBOOKS[bits] if mode == "trellis" else TABLES[bits]
    trellis = mode == "trellis"
    return dataclasses.replace(
        base, codebook=levels, trellis=trellis, scale="log8", salient_grid="row", column_scale=True
    )


@dataclasses.dataclass
class Case:
    layout: Layout
    parts: list[int]
    columns: int
    tensors: dict[str, Tensor]

    @property
    def packed(self) -> list[Tensor]:
        tensors = {name: tensor.to(DEVICE) for name, tensor in self.tensors.items()}
        arrays = repack(tensors, self.layout, self.columns, self.parts)
        return [arrays[name] for name in ops.array_order(self.layout)]

    def weight(self) -> Tensor:
        return reference.dequantize(self.tensors, self.layout, self.columns, self.parts).double()


@pytest.fixture
def make_case(make_packed):
    def make(chosen: Layout, parts: list[int], columns: int) -> Case:
        packed = make_packed(chosen, sum(parts), columns, seed=sum(parts) + columns)
        tensors = dict(packed.tensors)
        generator = torch.Generator().manual_seed(1)
        if chosen.column_scale:
            shape = (len(parts), columns)
            tensors["column_scale"] = (torch.rand(shape, generator=generator) + 0.5).half()
        return Case(chosen, parts, columns, tensors)

    return make


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
    base, added = (x.double().abs() @ part.T for part in sizes(case))
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    panels = blocks is None and blocks_for(op.family(), rows, 128) is None
    weight_error = EPS[dtype] if panels else 0  # dequantized to the type of x first
    allowed = (2**-11 + weight_error) * base + (2**-8 + weight_error) * added
    allowed += EPS[dtype] * exact.abs() + tiny
    if rows > 32:  # sums in units of the group at hand: a scale of zero counts 2**-60
        row_scale = case.tensors.get("row_scale", torch.ones(1, 1)).double().T
        allowed += 2**-59 * x.double().abs().sum(1, keepdim=True) * row_scale
    worst = ((y.double() - exact).abs() / allowed).max().item()
    assert worst < 1, f"off by {worst} of the bound"


def sizes(case: Case) -> tuple[Tensor, Tensor]:
    """|base weights| and |what salient weights add to them|."""
    base = reference.base_values(case.tensors, case.layout, case.columns)
    if case.layout.column_scale:
        base = base * reference.expand_shards(case.tensors["column_scale"].float(), case.parts)
    return base.double().abs(), (case.weight() - base.double()).abs()


def inline_slack(case: Case) -> tuple[Tensor, Tensor]:
    """By how much a weight may be off [N, K] where salient weights stay in place, and its size.

    Salient weights: slope and offset of their line over a code, and the half that they become,
    are rounded to float16. Base weights: only where the group's scale was raised. The size is that
    of a half, which holds more than the weight.
    """
    chosen, tensors = case.layout, {k: t.double() for k, t in case.tensors.items()}
    form, top = triton_layout(chosen), 2**chosen.bits - 1
    step, first = tensors["salient_scale"], tensors["salient_offset"]
    largest = torch.maximum(first.abs(), (first + top * step).abs()).maximum(16 * step)
    of_scale = form.entries_per_unit * SUBNORMAL / chosen.codebook_limit
    least = (largest * LEAST_UNIT).maximum(torch.tensor(SUBNORMAL * of_scale)) * 1.001
    own = tensors["scales"].abs() * of_scale
    raised = reference.expand_groups(own < least, chosen, case.columns)
    unit = reference.expand_groups(own.maximum(least), chosen, case.columns)
    level = unit / (form.entries_per_unit * SUBNORMAL)
    zero = unit * form.offset / SUBNORMAL
    if form.zero_points:
        zero = zero + level * reference.expand_groups(tensors["zeros"], chosen, case.columns)
    half = (case.weight() + zero).abs()
    column, _ = reference.salient_codes(case.tensors, chosen, case.columns, "")
    salient = torch.zeros(len(unit), case.columns + 1).scatter_(1, column, 1)[:, :-1].bool()
    line = 2**-11 * (step * top / 2 + (first + zero).abs() + half) + 1.01 * unit
    gap = max(b - a for a, b in itertools.pairwise(sorted(chosen.codebook_values)))
    base = torch.where(raised, gap * level / 2, 2**-20 * (zero + 256 * level))
    return torch.where(salient, line, base), zero + half


def check_inline(case: Case, rows: int = 3) -> None:
    text, (slack, size) = case.layout.to_text(), inline_slack(case)
    assert triton_layout(case.layout).inline_salient
    weight = op.gpu_dequantize(case.packed, case.columns, case.parts, text, torch.float32)
    weight = weight.cpu()
    assert ((weight.double() - case.weight()).abs() <= slack).all()
    x = torch.randn(rows, case.columns, generator=torch.Generator().manual_seed(rows))
    y = op.gpu_linear(x.to(DEVICE), case.packed, None, case.parts, text).cpu().double()
    allowed = slack + 2**-11 * (case.weight().abs() + 2 * slack) + 2**-20 * size
    allowed = x.double().abs() @ allowed.T
    assert ((y - x.double() @ case.weight().T).abs() <= allowed).all()


FORMS = [
    pytest.param(bits, mode, group, id=f"{bits}-{mode}-{group}")
    for bits in (2, 3, 4, 5)
    for mode in ("uniform", "table", "trellis")
    for group in (32, 64, 128)
    if (mode, group) != ("trellis", 32)
]


@pytest.mark.parametrize(("bits", "mode", "group"), FORMS)
def test_every_form_is_the_reference(make_case, bits, mode, group):
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
def test_recipes(make_case, name):
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
def test_salient_weights_in_place(make_case, bits, group, slots, table):
    """Ragged in N and K, fused shards; groups of 32 with nothing but salient weights."""
    check_inline(make_case(paper(bits, group, slots, table), [17, 1], 352))


@pytest.mark.parametrize("table", ["uniform", "odd"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (16, 96), (33, 576), (130, 4160)])
def test_salient_weights_in_place_for_awkward_shapes(make_case, rows, columns, table):
    check_inline(make_case(paper(4, 128, 16, table), [3], columns), rows)


def test_salient_weights_in_place_under_a_column_scale(make_case):
    chosen = dataclasses.replace(paper(4, 128, 16), column_scale=True)
    check_product(make_case(chosen, [17, 1], 288), 3, torch.bfloat16, bias=True)


@pytest.mark.parametrize("table", TABLE_KINDS)
def test_extremes_in_place(make_case, table):
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
def test_awkward_shapes(make_case, rows, parts, columns, dtype, bias):
    check_product(make_case(layout(4, "trellis", 128, 2), parts, columns), rows, dtype, bias)


@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (16, 576), (70, 320), (257, 96)])
@pytest.mark.parametrize("mode", ["uniform", "table", "trellis"])
def test_awkward_shapes_of_five_bits(make_case, mode, rows, columns):
    check_product(make_case(layout(5, mode, 128, 2), [66], columns), rows, torch.bfloat16, True)


@pytest.mark.parametrize("programs_per_sm", [0, 100])
def test_any_split_gives_the_same_sum(make_case, programs_per_sm):
    case = make_case(layout(3, "uniform", 64, 0), [65], 700 // 32 * 32)
    check_product(case, 5, blocks=Blocks(64, 8, 2, 2, programs_per_sm))
    check_product(case, 40, blocks=Blocks(64, 64, 2, 2, programs_per_sm))


def test_blocks_of_128_rows(make_case):
    check_product(
        make_case(layout(4, "uniform", 128, 1), [130], 128), 2, blocks=Blocks(128, 8, 4, 2, 1)
    )


@pytest.mark.parametrize("count", [0, 32])
def test_no_salient_weights_and_whole_groups_of_them(make_case, count):
    check_product(make_case(layout(4, "trellis", 64, count), [9], 96), 2)


def test_extremes(make_case):
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


def test_groups_of_scale_zero(make_case):
    """Between others, first and last, in float16."""
    case = make_case(layout(4, "uniform", 32, 1), [4], 160)
    for row, groups in enumerate(((0,), (1, 2), (4,), (0, 1, 2, 3, 4))):
        case.tensors["scales"][row, list(groups)] = 0
    check_product(case, 3)
    check_product(case, 40)


@pytest.mark.parametrize("chosen", [layout(4, "uniform", 32, 1), paper(4, 32, 16, "odd")])
def test_negative_scales(make_case, chosen):
    """Which our quantizer does not write, but the format does not forbid."""
    case = make_case(chosen, [4], 160)
    case.tensors["scales"][:, ::2] *= -1
    for rows in (3, 40):
        if triton_layout(chosen).inline_salient:
            check_inline(case, rows)
        else:
            check_product(case, rows)


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_operators_are_ones_for_torch(make_case, with_bias):
    case = make_case(layout(4, "trellis", 128, 2), [17, 1], 160)
    packed, text = case.packed, case.layout.to_text()
    x = torch.randn(3, 160, device=DEVICE)
    bias = torch.randn(18, device=DEVICE) if with_bias else None
    operators = torch.ops.precalib
    torch.library.opcheck(operators.gpu_linear.default, (x, packed, bias, case.parts, text))
    given = packed, 160, case.parts, text, torch.float32
    torch.library.opcheck(operators.gpu_dequantize.default, given)


def test_no_rows(make_case):
    case = make_case(layout(4, "uniform", 128, 0), [8], 64)
    y = op.gpu_linear(
        torch.empty(0, 64, device=DEVICE), case.packed, None, [8], case.layout.to_text()
    )
    assert y.shape == (0, 8)


def test_all_of_these_layouts_are_accepted():
    assert {reason_against(layout(*param.values, 2)) for param in FORMS} == {None}


def test_the_backend(make_case, as_layer):
    case = make_case(layout(4, "trellis", 128, 2), [17, 1], 160)
    spec = LinearSpec(case.layout, 160, (17, 1), torch.bfloat16, "cuda")
    backend = TritonBackend(spec)
    tensors = {name: tensor.to(DEVICE) for name, tensor in case.tensors.items()}
    layer = as_layer(backend, tensors)
    x = torch.randn(2, 3, 160)
    y = backend.apply(layer, x.to(DEVICE), None).cpu()
    assert y.shape == (2, 3, 18)
    torch.testing.assert_close(y.double(), x.double() @ case.weight().T, rtol=0.02, atol=0.05)
