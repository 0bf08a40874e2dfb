"""The operator against the reference: every ISA, layout, type and size."""

import ctypes
import dataclasses
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from x86_cases import LAYOUTS, ROUNDING, assert_right

from precalib_kernels.backends.x86 import library, op
from precalib_kernels.backends.x86.memory_layout import X86Layout, X86LayoutStruct
from precalib_kernels.backends.x86.repack import repack
from precalib_kernels.errors import FormatError
from precalib_kernels.format.layout import Layout
from precalib_kernels.toolchain.compile import BuildError

try:
    ISAS, REASON = library.supported_isas(), "this processor lacks AVX2"
except BuildError as error:
    ISAS, REASON = (), f"the kernels cannot be built here: {error}"
pytestmark = pytest.mark.skipif(not ISAS, reason=REASON)


def test_the_last_isa_is_the_default(make_case):
    case = make_case(LAYOUTS["balanced-4"])
    x = torch.randn(3, case.columns)
    *arguments, _ = case.arguments(ISAS[-1])
    assert torch.equal(op.linear(x, *arguments, -1), case.linear(x, ISAS[-1]))


def test_python_and_the_kernels_mean_the_same_layout():
    assert library.load().precalib_layout_bytes() == ctypes.sizeof(X86LayoutStruct)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_products_are_those_of_the_reference(make_case, name, isa):
    case = make_case(LAYOUTS[name], columns=1056 if name == "far positions" else 416)
    generator = torch.Generator().manual_seed(1)
    for rows in (1, 2, 3, 4, 5, 8, 12, 15, 20, 39, 64):
        for dtype in ROUNDING:
            x = torch.randn((rows, case.columns), generator=generator).to(dtype)
            bias = torch.randn(54, generator=generator).to(dtype)
            assert_right(case, x, isa, bias)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "name",
    [
        *("balanced-5", "balanced-4", "balanced-3", "balanced-2", "five bits, uniform", "signs"),
        *("two bits, trellis", "three bits, table"),  # entries of more than 7 bits
    ],
)
def test_products_with_inputs_of_8_bits(make_case, name, isa):
    """Off by at most half a step of 127, and by more than 16 bits would be."""
    exact = make_case(LAYOUTS[name])
    case = dataclasses.replace(exact, int8_inputs=True)
    for rows in (1, 3, 4, 6, 7, 12, 16, 39, 80):
        for dtype in ROUNDING:
            x = torch.randn(rows, case.columns).to(dtype)
            assert_right(case, x, isa)
            if dtype == torch.float32:
                assert not torch.equal(case.linear(x, isa), exact.linear(x, isa))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["uniform", "codebook", "trellis"])
@pytest.mark.parametrize(("group", "salient"), [(32, 1), (64, 3), (96, 0), (512, 32)])
def test_products_of_any_layout(make_case, isa, bits, kind, group, salient):
    """All widths, tables and group sizes, with a last group that is shorter."""
    generator = torch.Generator().manual_seed(bits)
    count = 2 ** (bits + (kind == "trellis"))
    entries = (torch.randperm(256, generator=generator)[:count] - 128).sort()[0].tolist()
    layout = Layout(
        bits=bits,
        group_size=group,
        codebook=None if kind == "uniform" else tuple(entries),
        trellis=kind == "trellis",
        salient_count=salient,
    )
    case = make_case(layout, columns=544, shards=(19, 1))
    for rows in (1, 4, 5, 13):
        for dtype in (torch.float32, torch.bfloat16):
            assert_right(case, torch.randn((rows, 544), generator=generator).to(dtype), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("int8_inputs", [False, True])
@pytest.mark.parametrize("entries", [(-128, -126, 1, 127), (-127, -125, 125, 127)])
def test_sums_at_their_limit(make_case, isa, int8_inputs, entries):
    """The largest sum of a group that has to be exact; a shorter group could hide an overflow."""

    def edit(tensors):
        tensors["qweight"].zero_()

    layout = Layout(bits=2, group_size=512, codebook=entries)
    case = dataclasses.replace(
        make_case(layout, columns=512, shards=(20,), edit=edit), int8_inputs=int8_inputs
    )
    for rows in (1, 4, 7):
        for dtype in ROUNDING:
            if case.kernel(isa, dtype, rows) == "gemm_fp32":
                continue  # sums in float32: equal terms are all rounded the same way
            x = torch.ones(rows, 512)
            x[::2] = -1
            assert_right(case, x.to(dtype), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_more_rows_than_a_slab(make_case, isa):
    case = make_case(LAYOUTS["balanced-4"], columns=160, shards=(20,))
    for dtype in (torch.float32, torch.bfloat16):
        assert_right(case, torch.randn(600, 160).to(dtype), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["balanced-4", "five bits, uniform", "signs"])
def test_more_columns_than_a_span(make_case, name, isa):
    case = make_case(LAYOUTS[name], columns=2208)
    assert_right(case, torch.randn(70, 2208).to(torch.bfloat16), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_large_inputs_do_not_drown_the_others(make_case, isa, dtype):
    case = make_case(LAYOUTS["balanced-4"])
    for rows in (1, 7, 40):
        x = torch.randn(rows, case.columns)
        x[:, 5] = 1000
        x[:, 200] = -3000
        assert_right(case, x.to(dtype), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["balanced-3", "paper-4"])
def test_scales_of_zero(make_case, name, isa):
    def edit(tensors):
        zero = 255 if tensors["scales"].dtype == torch.uint8 else 0
        tensors["scales"][:, ::2] = zero
        if "row_scale" in tensors:
            tensors["row_scale"][-1] = 0

    case = make_case(LAYOUTS[name], edit=edit)
    for rows in (1, 9, 40):
        for dtype in (torch.float32, torch.bfloat16):
            assert_right(case, torch.randn(rows, case.columns).to(dtype), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["balanced-4", "rtn-4", "signs", "far positions"])
@pytest.mark.parametrize("int8_inputs", [False, True])
def test_what_is_not_finite_stays_so(make_case, isa, name, int8_inputs):
    """An infinity or a NaN in a row of x leaves no number there, as by torch, and no other row."""
    columns = 1056 if name == "far positions" else 416
    case = dataclasses.replace(make_case(LAYOUTS[name], columns), int8_inputs=int8_inputs)
    weight = case.base * case.scale
    for rows, dtype in itertools.product((1, 4, 6, 12, 40), ROUNDING):
        x = torch.randn(rows, columns).to(dtype)
        whole = case.linear(x, isa)
        for bad, at in ((math.nan, 77), (math.inf, 0), (-math.inf, columns - 1)):
            x[0] = 0
            x[0, at] = bad
            assert not bool((x[:1].double() @ weight.T).isfinite().any())
            result = case.linear(x, isa)
            assert not bool(result[0].isfinite().any())
            assert torch.equal(result[1:], whole[1:])


@pytest.mark.parametrize("isa", ISAS)
def test_inputs_of_nothing_and_of_next_to_nothing(make_case, isa):
    case = make_case(LAYOUTS["balanced-4"])
    for rows in (1, 6, 12, 40):
        zero = torch.zeros(rows, case.columns, dtype=torch.bfloat16)
        assert not bool(case.linear(zero, isa).any())
        tiny = torch.full((rows, case.columns), 1e-38)
        assert bool(case.linear(tiny, isa).isfinite().all())
    assert case.linear(torch.zeros(0, case.columns), isa).shape == (0, 54)


@pytest.mark.parametrize("isa", ISAS)
def test_one_thread_and_two_agree(make_case, isa):
    case = make_case(LAYOUTS["balanced-3"], columns=1024, shards=(520, 40))
    before = torch.get_num_threads()
    try:
        for rows in (1, 4, 20, 40):
            x = torch.randn(rows, 1024, dtype=torch.bfloat16)
            results = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(case.linear(x, isa))
            assert torch.equal(*results)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2])
def test_calls_of_several_threads_do_not_disturb_each_other(make_case, isa, threads):
    case = make_case(LAYOUTS["balanced-4"], columns=1024, shards=(520, 40))
    arguments = case.arguments(isa)
    generator = torch.Generator().manual_seed(2)
    inputs = [
        torch.randn((m, 1024), generator=generator).to(dtype)
        for m in (1, 4, 6, 12, 20, 70)
        for dtype in ROUNDING
    ]
    alone = [op.linear(x, *arguments) for x in inputs]
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        for _ in range(3):
            together = list(pool.map(lambda x: op.linear(x, *arguments), inputs))
            assert all(map(torch.equal, together, alone))


def test_any_shape_and_stride_of_inputs(make_case):
    case = make_case(LAYOUTS["balanced-4"])
    x = torch.randn(3, case.columns, 2, dtype=torch.bfloat16).transpose(1, 2)
    result = case.linear(x, ISAS[-1])
    assert result.shape == (3, 2, 54)
    assert torch.equal(result.flatten(0, 1), case.linear(x.reshape(6, -1), ISAS[-1]))


@pytest.mark.parametrize(
    ("recipe", "most"), [("balanced-4", 0.285), ("balanced-3", 0.245), ("balanced-2", 0.18)]
)
def test_the_packed_form_is_small(recipe, most):
    layout = LAYOUTS[recipe]
    x86 = X86Layout(layout, 4096, (4096,))
    assert x86.nbytes / (2 * 4096 * 4096) <= most


def test_damaged_positions_are_refused_at_packing(make_packed):
    layout = LAYOUTS["balanced-4"]
    tensors = make_packed(layout, 5, 160).tensors
    tensors["salient"] |= 255
    with pytest.raises(FormatError, match=r"^here: 'salient' names a weight outside its group"):
        repack(tensors, X86Layout(layout, 160, (5,)), "here")


def test_packing_in_pieces_changes_nothing(make_case, monkeypatch):
    isa = ISAS[-1]
    whole = make_case(LAYOUTS["balanced-3"]).packed(isa)
    monkeypatch.setattr("precalib_kernels.backends.x86.repack.CHUNK_WEIGHTS", 17 * 416)
    assert torch.equal(make_case(LAYOUTS["balanced-3"]).packed(isa), whole)


@pytest.mark.parametrize("name", ["balanced-4", "rtn-3"])
def test_the_operator_passes_opcheck(make_case, name):
    case = make_case(LAYOUTS[name])
    x = torch.randn(2, case.columns)
    for bias in (None, torch.randn(54)):
        arguments = (x, *case.arguments(ISAS[-1], bias))
        torch.library.opcheck(torch.ops.precalib.cpu_linear.default, arguments)


def test_the_operator_compiles(make_case):
    case = make_case(LAYOUTS["balanced-4"])
    arguments = case.arguments(ISAS[-1])

    def run(x):
        return op.linear(x + 1, *arguments)

    x = torch.randn(3, case.columns)
    assert torch.equal(torch.compile(run, backend="eager", fullgraph=True)(x), run(x))


def test_sizes_that_do_not_belong_together_are_refused(make_case):
    case = make_case(LAYOUTS["balanced-4"])
    x, right = torch.randn(2, 416), case.arguments(ISAS[-1])
    run = torch.ops.precalib.cpu_linear
    packed, layout = right[0], case.memory(ISAS[-1])
    other = dataclasses.replace(layout, nibbles=not layout.nibbles)
    names = ("packed", "x86_layout", "bias", "outputs", "isa")
    for change, text in (
        ({"packed": packed[1:]}, r"bytes of the packed weight are \d+, expected \d+"),
        ({"packed": packed.char()}, "bytes of the packed weight are"),
        ({"packed": packed.repeat_interleave(2)[::2]}, "the packed weight is not contiguous"),
        ({"x86_layout": right[1][1:]}, "this is no layout of x86"),
        ({"x86_layout": right[1][:8]}, "this is no layout of x86"),
        ({"x86_layout": right[1].char()}, "this is no layout of x86"),
        ({"bias": torch.zeros(53)}, "values of the bias are 53, expected 54"),
        ({"bias": torch.zeros(54, 1)}, "values of the bias are"),
        ({"bias": torch.zeros(54).half()}, "the bias is not of the type of x"),
        ({"outputs": 53}, "outputs are 53, expected 54"),
        ({"x86_layout": op.layout_tensor(other)}, "the weight is packed for another ISA"),
        ({"isa": len(ISAS)}, "this machine has no such ISA"),
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
