"""Rows of the weight by number, from the in-memory form: embeddings."""

import triton
import triton.language as tl

from precalib_kernels.backends.triton.dequantize_kernel import dequantize_rows


@triton.jit(
    do_not_specialize=["count", "outputs", "columns"], do_not_specialize_on_alignment=["ids"]
)
def gather_kernel(
    weight,  # out: [count, columns], any float type
    ids,  # int64 [count]
    words,
    group_data,
    positions,
    values,
    affine,
    row_unit,
    salient_unit,
    table,
    constants,
    column_scale,  # [1, steps * STEP] float16
    count,
    outputs,  # N
    columns,
    padded_rows,
    BITS: tl.constexpr,
    MODE: tl.constexpr,
    INLINE: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    TILES: tl.constexpr,
    J: tl.constexpr,
    OFFSET: tl.constexpr,
    ZEROS: tl.constexpr,
    SLOTS: tl.constexpr,
    LOG8: tl.constexpr,
    SCALED: tl.constexpr,
    ENTRIES_PER_UNIT: tl.constexpr,
    ASM: tl.constexpr,
    REGISTERS: tl.constexpr,
    SPARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (BLOCK ids, step). Arguments as in `gemm_kernel`."""
    columns = columns // 32 * 32  # it always is; so Triton knows, and stores more than one at once
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = number < count
    row = tl.load(ids + number, mask=inside, other=0)
    known = (row >= 0) & (row < outputs)
    tl.device_assert(known, "id is not one of the rows")
    n = tl.where(known, row, 0).to(tl.int32)
    dequantize_rows(
        weight, n, number, inside, tl.program_id(1), words, group_data, positions, values, affine,
        row_unit, salient_unit, table, constants, column_scale, columns, padded_rows,
        BITS, MODE, INLINE, GROUP, STEP, TILES, J, OFFSET, ZEROS, SLOTS, LOG8, SCALED,
        ENTRIES_PER_UNIT, False, ASM, REGISTERS, SPARE,
    )  # fmt: skip
