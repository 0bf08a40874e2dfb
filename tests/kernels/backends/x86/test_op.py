"""Compiled kernels against the reference: every level of instructions, layout, type and size."""

import ctypes
import dataclasses
import math

import pytest
import torch
from packed_tensors import RECIPE_LAYOUTS

from precalib_kernels.backends.x86 import huge_pages, library, op
from precalib_kernels.backends.x86.memory_layout import X86Layout, X86LayoutStruct
from precalib_kernels.backends.x86.repack import pack
from precalib_kernels.errors import FormatError
from precalib_kernels.format import reference
from precalib_kernels.format.layout import Layout
from precalib_kernels.toolchain.compile import BuildError

try:
    LEVELS, REASON = library.machine_levels(), "this processor lacks AVX2"
except BuildError as error:
    LEVELS, REASON = (), f"the kernels cannot be built here: {error}"
pytestmark = pytest.mark.skipif(not LEVELS, reason=REASON)

PLAIN_CODEBOOK = (-128, -90, -50, -20, 0, 25, 60, 127)
LAYOUTS = {
    **RECIPE_LAYOUTS,
    "two bits": Layout(bits=2, group_size=32),
    "two bits, trellis": Layout(
        bits=2,
        group_size=64,
        codebook=PLAIN_CODEBOOK,
        trellis=True,
        scale="log8",
        salient_count=1,
        salient_bits=5,
        salient_grid="row",
    ),
    "three bits, table": Layout(bits=3, group_size=96, codebook=PLAIN_CODEBOOK, column_scale=True),
    "five bits, uniform": Layout(bits=5, group_size=64, scale="log8", salient_count=3),
    "signs": Layout(bits=4, group_size=64, salient_count=32, salient_bits=8, column_scale=True),
    "far positions": Layout(bits=3, group_size=544, salient_count=5, salient_grid="min-max"),
}
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
ROUND_TO_8_BITS = library.LEVELS[library.LEVELS.index(library.INT8_LEVEL) :]
DIGITS = {torch.float32: 127 * 65793 - 2, torch.float16: 127 * 257 - 1}


@dataclasses.dataclass
class Case:
    """A packed weight of fused shards, with what it stands for."""

    layout: Layout
    columns: int
    parts: tuple[int, ...]
    packed: torch.Tensor
    base: torch.Tensor  # without column scale, float64
    scale: torch.Tensor  # of the columns, a row per output, float64
    int8_inputs: bool = False

    def linear(self, x, level, bias=None):
        return op.linear(x, *self.arguments(level, bias))

    def arguments(self, level, bias=None):
        plan = op.layout_tensor(X86Layout(self.layout, self.columns, self.parts, self.int8_inputs))
        return self.packed, plan, bias, sum(self.parts), library.LEVELS.index(level)


@pytest.fixture
def make_case(make_packed):
    def make(layout, columns=416, parts=(37, 16, 1), edit=None):
        made = [make_packed(layout, rows, columns, seed).tensors for seed, rows in enumerate(parts)]
        for tensors in made:
            if edit:
                edit(tensors)
        plain = dataclasses.replace(layout, column_scale=False)
        base, scale = [], []
        for rows, tensors in zip(parts, made, strict=True):
            base.append(reference.dequantize(tensors, plain, columns))
            ones = torch.ones(1, columns)
            scale.append(tensors.get("column_scale", ones).float().expand(rows, columns))
        fused = {name: torch.cat([tensors[name] for tensors in made]) for name in made[0]}
        packed = pack(fused, X86Layout(layout, columns, parts), "here")
        return Case(
            layout, columns, parts, packed, torch.cat(base).double(), torch.cat(scale).double()
        )

    return make


def rounds_to_bfloat(case, x, level):
    """Whether inputs times column scale, and salient weights at least, become bfloat16."""
    if case.int8_inputs:
        return False
    rows = 9 if case.layout.uniform or level == "avx512_bf16" else 5
    return x.dtype == torch.bfloat16 and len(x) >= rows and level in ("avx512_bf16", "amx")


def error_bound(case, x, expected, level):
    """What a product may be off by, per element.

    Rounding the result; four standard deviations of the rounding of K products and their sums in
    float32, or of inputs and weights in bfloat16; and inputs in fixed point, whose error is half a
    step of their group's largest.
    """
    single = x.dtype == torch.float32
    steps = DIGITS[torch.float32 if single else torch.float16]
    if case.int8_inputs and level in ROUND_TO_8_BITS:
        steps = 127
    u = ROUNDING[x.dtype]
    each = ROUNDING[torch.float32] * math.sqrt(case.columns)
    if rounds_to_bfloat(case, x, level):
        each += u * math.sqrt(2)
    x = x.double()
    scaled = x[:, None] * case.scale  # [M, N, K]
    size = (scaled * case.base).square().sum(-1).sqrt()
    bound = u * expected.abs() + 4 * each * size
    for first in range(0, case.columns, case.layout.group_size):
        group = slice(first, first + case.layout.group_size)
        step = scaled[..., group].abs().amax(-1) / steps
        bound += step / 2 * case.base[:, group].abs().sum(-1)
    return bound


def assert_right(case, x, level, bias=None):
    expected = (x.double()[:, None] * case.scale * case.base).sum(-1)
    if bias is not None:
        expected += bias.double()
    result = case.linear(x, level, bias)
    assert result.dtype == x.dtype
    error = (result.double() - expected).abs()
    assert bool((error <= error_bound(case, x, expected, level)).all())


def test_a_torch_without_the_functions_is_told_of(monkeypatch):
    monkeypatch.setattr(library, "TORCH_FUNCTIONS", ("aoti_torch_of_another_age",))
    with pytest.raises(BuildError, match=r"^torch .* lacks what it needs: .*another_age"):
        library.load.__wrapped__()


def test_the_last_level_is_the_default(make_case):
    case = make_case(LAYOUTS["balanced-4"])
    x = torch.randn(3, case.columns)
    *arguments, _ = case.arguments(LEVELS[-1])
    assert torch.equal(op.linear(x, *arguments, isa=-1), case.linear(x, LEVELS[-1]))


def test_python_and_the_kernels_mean_the_same_plan():
    assert library.load().precalib_plan_bytes() == ctypes.sizeof(X86LayoutStruct)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_products_are_those_of_the_reference(make_case, name, level):
    case = make_case(LAYOUTS[name], columns=1056 if name == "far positions" else 416)
    generator = torch.Generator().manual_seed(1)
    for rows in (1, 2, 3, 4, 5, 8, 12, 15, 20, 39, 64):
        for dtype in ROUNDING:
            x = torch.randn((rows, case.columns), generator=generator).to(dtype)
            bias = torch.randn(54, generator=generator).to(dtype)
            assert_right(case, x, level, bias)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["balanced-4", "balanced-3", "five bits, uniform", "signs"])
def test_products_with_inputs_of_8_bits(make_case, name, level):
    """Off by at most half a step of 127, and by more than 16 bits would be."""
    exact = make_case(LAYOUTS[name])
    case = dataclasses.replace(exact, int8_inputs=True)
    rounds = level in ROUND_TO_8_BITS
    for rows in (1, 3, 4, 6, 7, 12, 16, 39, 80):
        for dtype in ROUNDING:
            x = torch.randn(rows, case.columns).to(dtype)
            assert_right(case, x, level)
            if dtype == torch.float32:
                assert torch.equal(case.linear(x, level), exact.linear(x, level)) != rounds


@pytest.mark.parametrize("level", LEVELS)
def test_more_rows_than_a_slab(make_case, level):
    case = make_case(LAYOUTS["balanced-4"], columns=160, parts=(20,))
    for dtype in (torch.float32, torch.bfloat16):
        assert_right(case, torch.randn(600, 160).to(dtype), level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["balanced-4", "five bits, uniform", "signs"])
def test_more_columns_than_a_span(make_case, name, level):
    case = make_case(LAYOUTS[name], columns=2208)
    assert_right(case, torch.randn(70, 2208).to(torch.bfloat16), level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_large_inputs_do_not_drown_the_others(make_case, level, dtype):
    case = make_case(LAYOUTS["balanced-4"])
    for rows in (1, 7, 40):
        x = torch.randn(rows, case.columns)
        x[:, 5] = 1000
        x[:, 200] = -3000
        assert_right(case, x.to(dtype), level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["balanced-3", "paper-4"])
def test_scales_of_zero(make_case, name, level):
    def edit(tensors):
        zero = 255 if tensors["scales"].dtype == torch.uint8 else 0
        tensors["scales"][:, ::2] = zero
        if "row_scale" in tensors:
            tensors["row_scale"][-1] = 0

    case = make_case(LAYOUTS[name], edit=edit)
    for rows in (1, 9, 40):
        for dtype in (torch.float32, torch.bfloat16):
            assert_right(case, torch.randn(rows, case.columns).to(dtype), level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [1, 6, 12, 40])
def test_what_is_not_finite_stays_so(make_case, level, rows):
    case = make_case(LAYOUTS["balanced-4"])
    for bad in (math.nan, math.inf):
        x = torch.randn(rows, case.columns, dtype=torch.bfloat16)
        x[0, 77] = bad
        result = case.linear(x, level)
        assert not bool(result[0].isfinite().any())
        assert bool(result[1:].isfinite().all())


@pytest.mark.parametrize("level", LEVELS)
def test_inputs_of_nothing_and_of_next_to_nothing(make_case, level):
    case = make_case(LAYOUTS["balanced-4"])
    for rows in (1, 6, 12, 40):
        zero = torch.zeros(rows, case.columns, dtype=torch.bfloat16)
        assert not bool(case.linear(zero, level).any())
        tiny = torch.full((rows, case.columns), 1e-38)
        assert bool(case.linear(tiny, level).isfinite().all())
    assert case.linear(torch.zeros(0, case.columns), level).shape == (0, 54)


@pytest.mark.parametrize("level", LEVELS)
def test_one_thread_and_two_agree(make_case, level):
    case = make_case(LAYOUTS["balanced-3"], columns=1024, parts=(520, 40))
    before = torch.get_num_threads()
    try:
        for rows in (1, 4, 20, 40):
            x = torch.randn(rows, 1024, dtype=torch.bfloat16)
            results = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(case.linear(x, level))
            assert torch.equal(*results)
    finally:
        torch.set_num_threads(before)


def test_any_shape_and_stride_of_inputs(make_case):
    case = make_case(LAYOUTS["balanced-4"])
    x = torch.randn(3, case.columns, 2, dtype=torch.bfloat16).transpose(1, 2)
    result = case.linear(x, LEVELS[-1])
    assert result.shape == (3, 2, 54)
    assert torch.equal(result.flatten(0, 1), case.linear(x.reshape(6, -1), LEVELS[-1]))


def test_packed_forms_share_regions_of_memory_and_nothing_else():
    made = [
        huge_pages.zeros(size)
        for size in (1, 100, huge_pages.REGION + 1, 64, 0, 3 * huge_pages.PAGE)
    ]
    for value, tensor in enumerate(made, 1):
        assert not bool(tensor.any())
        assert tensor.data_ptr() % huge_pages.LINE == 0
        tensor.fill_(value)
    for value, tensor in enumerate(made, 1):
        assert bool((tensor == value).all())
    many = [huge_pages.zeros(huge_pages.PAGE) for _ in range(40)]  # several regions
    assert len({tensor.untyped_storage().data_ptr() for tensor in many}) < len(many)
    assert not bool(torch.cat(many).any())


@pytest.mark.parametrize("recipe", ["balanced-4", "balanced-3"])
def test_the_packed_form_is_small(recipe):
    layout = LAYOUTS[recipe]
    plan = X86Layout(layout, 4096, (4096,))
    assert plan.nbytes / (2 * 4096 * 4096) <= {"balanced-4": 0.285, "balanced-3": 0.245}[recipe]


def test_damaged_positions_are_refused_at_packing(make_packed):
    layout = LAYOUTS["balanced-4"]
    tensors = make_packed(layout, 5, 160).tensors
    tensors["salient"] |= 255
    with pytest.raises(FormatError, match=r"^here: 'salient' names a weight outside its group"):
        pack(tensors, X86Layout(layout, 160, (5,)), "here")


def test_packing_in_pieces_changes_nothing(make_case, monkeypatch):
    whole = make_case(LAYOUTS["balanced-3"])
    monkeypatch.setattr("precalib_kernels.backends.x86.repack.CHUNK_WEIGHTS", 17 * 416)
    assert torch.equal(make_case(LAYOUTS["balanced-3"]).packed, whole.packed)


@pytest.mark.parametrize("name", ["balanced-4", "rtn-3"])
def test_the_operator_passes_opcheck(make_case, name):
    case = make_case(LAYOUTS[name])
    x = torch.randn(2, case.columns)
    for bias in (None, torch.randn(54)):
        arguments = (x, *case.arguments(LEVELS[-1], bias))
        torch.library.opcheck(torch.ops.precalib.cpu_linear.default, arguments)


def test_the_operator_compiles(make_case):
    case = make_case(LAYOUTS["balanced-4"])
    arguments = case.arguments(LEVELS[-1])

    def run(x):
        return op.linear(x + 1, *arguments)

    x = torch.randn(3, case.columns)
    assert torch.equal(torch.compile(run, backend="eager", fullgraph=True)(x), run(x))


def test_sizes_that_do_not_belong_together_are_refused(make_case):
    case = make_case(LAYOUTS["balanced-4"])
    x, right = torch.randn(2, 416), case.arguments(LEVELS[-1])
    run = torch.ops.precalib.cpu_linear
    names = ("packed", "plan", "bias", "outputs", "level")
    for change, text in (
        ({"packed": case.packed[1:]}, r"bytes of the packed weight are \d+, expected \d+"),
        ({"packed": case.packed.char()}, "bytes of the packed weight are"),
        ({"packed": case.packed.repeat_interleave(2)[::2]}, "the packed weight is not contiguous"),
        ({"plan": right[1][1:]}, "this is no plan"),
        ({"plan": right[1][:8]}, "this is no plan"),
        ({"plan": right[1].char()}, "this is no plan"),
        ({"bias": torch.zeros(53)}, "values of the bias are 53, expected 54"),
        ({"bias": torch.zeros(54, 1)}, "values of the bias are"),
        ({"bias": torch.zeros(54).half()}, "the bias is not of the type of x"),
        ({"outputs": 53}, "outputs are 53, expected 54"),
        ({"level": len(LEVELS)}, "this machine has no such level"),
    ):
        arguments = dict(zip(names, right, strict=True)) | change
        with pytest.raises(RuntimeError, match="cpu_linear: " + text):
            run(x, *arguments.values())
    for wrong, text in (
        (x.double(), "x is not of float32, bfloat16 or float16"),
        (x[:, 1:].contiguous(), "columns of x are 415, expected 416"),
        (x[:, ::2], "x is not contiguous"),
        (torch.tensor(1.0), "x has too few or too many dimensions"),
    ):
        with pytest.raises(RuntimeError, match="cpu_linear: " + text):
            run(wrong, *right)
