"""Which kernel a product takes: the table that the library goes by and reports."""

import dataclasses
import itertools

import pytest
import torch
from x86_cases import LAYOUTS, assert_right

from precalib_kernels.backends.x86 import library
from precalib_kernels.backends.x86.memory_layout import X86Layout
from precalib_kernels.toolchain.compile import BuildError

try:
    ISAS, REASON = library.supported_isas(), "this processor lacks AVX2"
except BuildError as error:
    ISAS, REASON = (), f"the kernels cannot be built here: {error}"
pytestmark = pytest.mark.skipif(not ISAS, reason=REASON)

NAMES = tuple(isa.name for isa in library.ISAS)
CODEBOOK, UNIFORM = LAYOUTS["balanced-4"], LAYOUTS["rtn-4"]  # groups of 128
SHUFFLING = ("avx2", "avx_vnni", "avx512")  # without VBMI
PERMUTING = ("avx512_vnni", "avx512_bf16", "amx")
BOTH_16_BITS = ((4, "gemv_int8x2"), (None, "gemm_int8x2"))
FLOAT32 = ((4, "gemv_int8x3"), (None, "gemm_int8x3"))
ROUNDED = ((4, "gemv_int8x1"), (None, "gemm_int8x1"))
# last M and kernel, by ISA and dtype, for groups of 128
EXPECTED = {
    **{
        (isa, dtype): ((4, "gemv_int16x1"), (None, "gemm_int16x1"))
        for isa in ("avx2", "avx512")
        for dtype in ("bfloat16", "float16")
    },
    **{(isa, "float32"): ((4, "gemv_int16x2"), (None, "gemm_fp32")) for isa in ("avx2", "avx512")},
    **{
        ("avx_vnni", dtype): ((4, "gemv_int8x2"), (None, "gemm_int16x1"))
        for dtype in ("bfloat16", "float16")
    },
    ("avx_vnni", "float32"): ((4, "gemv_int8x3"), (None, "gemm_fp32")),
    **{(isa, "float32"): FLOAT32 for isa in PERMUTING},
    **{(isa, "float16"): BOTH_16_BITS for isa in PERMUTING},
    ("avx512_vnni", "bfloat16"): BOTH_16_BITS,
}
BFLOAT16 = {
    (False, "avx512_bf16"): (
        (4, "gemv_int8x2"),
        (8, "gemm_int8x2"),
        (16, "gemm_bf16_register"),
        (48, "gemm_bf16_unscaled"),
        (None, "gemm_bf16_dequantized"),
    ),
    (True, "avx512_bf16"): (
        (4, "gemv_int8x2"),
        (8, "gemm_int8x2"),
        (16, "gemm_bf16_register"),
        (32, "gemm_int8x2"),
        (None, "gemm_bf16_dequantized"),
    ),
    (False, "amx"): (
        (4, "gemv_int8x2"),
        (48, "gemm_bf16_unscaled"),
        (None, "gemm_bf16_dequantized"),
    ),
    (True, "amx"): (
        (4, "gemv_int8x2"),
        (32, "gemm_int8x2"),
        (None, "gemm_bf16_dequantized"),
    ),
}


def rows_of(layout, isa, dtype, int8_inputs=False):
    table = library.kernel_table(X86Layout(layout, 1088, (16,), int8_inputs))
    return [entry for entry in table if (entry.isa, entry.dtype) == (isa, dtype)]


@pytest.mark.parametrize("isa", NAMES)
@pytest.mark.parametrize("dtype", library.DTYPES)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("int8_inputs", [False, True])
def test_every_batch_size_has_one_kernel(isa, dtype, name, int8_inputs):
    rows = rows_of(LAYOUTS[name], isa, dtype, int8_inputs)
    assert rows[0].first_m == 1
    assert rows[-1].last_m is None
    for one, two in itertools.pairwise(rows):
        assert one.first_m <= one.last_m == two.first_m - 1


@pytest.mark.parametrize("layout", [CODEBOOK, UNIFORM], ids=["codebook", "uniform"])
@pytest.mark.parametrize("isa", NAMES)
@pytest.mark.parametrize("dtype", library.DTYPES)
def test_the_kernels_are_the_measured_choice(layout, isa, dtype):
    expected = EXPECTED.get((isa, dtype)) or BFLOAT16[layout.uniform, isa]
    assert [(row.last_m, row.kernel) for row in rows_of(layout, isa, dtype)] == list(expected)
    rows = rows_of(layout, isa, dtype, int8_inputs=True)
    assert [(row.last_m, row.kernel) for row in rows] == list(ROUNDED)


@pytest.mark.parametrize(
    ("layout", "group", "isa", "last"),
    [
        (CODEBOOK, 32, "amx", 24),
        (CODEBOOK, 64, "amx", 48),
        (UNIFORM, 32, "amx", 8),
        (UNIFORM, 64, "amx", 16),
        (CODEBOOK, 32, "avx512_bf16", 24),
        (UNIFORM, 32, "avx512_bf16", 16),
    ],
)
def test_small_groups_are_dequantized_from_smaller_batches_on(layout, group, isa, last):
    layout = dataclasses.replace(layout, group_size=group)
    row = rows_of(layout, isa, "bfloat16")[-1]
    assert (row.first_m, row.kernel) == (last + 1, "gemm_bf16_dequantized")


@pytest.mark.parametrize("isa", SHUFFLING)
@pytest.mark.parametrize("dtype", library.DTYPES)
def test_groups_whose_sums_of_words_would_overflow_are_dequantized(isa, dtype):
    for group, exact in ((512, True), (544, False)):
        layout = dataclasses.replace(CODEBOOK, group_size=group)
        kernels = {row.kernel for row in rows_of(layout, isa, dtype)}
        assert any("int16" in kernel for kernel in kernels) == (
            exact and (isa, dtype) != ("avx_vnni", "float32")
        )
        if not exact:
            assert rows_of(layout, isa, dtype)[-1].kernel == "gemm_fp32"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", library.DTYPES)
@pytest.mark.parametrize("name", ["balanced-4", "rtn-4", "signs"])
@pytest.mark.parametrize("int8_inputs", [False, True])
def test_each_kernel_keeps_its_bound_where_its_range_begins_and_ends(
    make_case, isa, dtype, name, int8_inputs
):
    case = dataclasses.replace(make_case(LAYOUTS[name]), int8_inputs=int8_inputs)
    generator = torch.Generator().manual_seed(4)
    for row in rows_of(LAYOUTS[name], isa, dtype, int8_inputs):
        for m in (row.first_m, row.last_m or row.first_m + 20):
            x = torch.randn((m, case.columns), generator=generator).to(getattr(torch, dtype))
            assert case.kernel(isa, x.dtype, m) == row.kernel
            assert_right(case, x, isa)
