# mypy: disallow-untyped-defs=False, disable-error-code="assignment"
"""What salient weights add to a product that another kernel has made of the base codes.

Slots lie row by row, so that a program reads them in whole lines however few a group has. Every
element of the tile [rows, slots, BLOCK_M] keeps a sum of its own, in float32; they are added up
once, at the end and in a fixed order.

    out[m, n] = y[m, n] + unit[n] · Σ_slots value[n, slot] · x[m, column of the slot] + bias[n]
"""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["rows", "outputs", "columns"],
    do_not_specialize_on_alignment=["out", "y", "bias"],
)
def sparse_kernel(
    out,  # out: [rows, outputs], the type of y
    y,  # [rows, outputs]
    x,  # [blocks, columns, BLOCK_M]: a column of a block of rows lies in one piece
    bias,  # [outputs], or anything
    positions,  # uint8 [outputs, slots]
    values,  # float16 [outputs, slots]
    salient_unit,  # float32 [outputs]
    rows,  # M
    outputs,  # N
    columns,  # K
    slots,  # groups * COUNT
    GROUP: tl.constexpr,
    COUNT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program (tile of rows of the weight, block of rows of x)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    real = n < outputs
    x += block.to(tl.int64) * columns * BLOCK_M
    row = n.to(tl.int64)[:, None] * slots
    total = tl.zeros((BLOCK_N, BLOCK_S, BLOCK_M), tl.float32)
    for first in tl.range(0, slots, BLOCK_S):
        slot = first + tl.arange(0, BLOCK_S)[None, :]
        inside = real[:, None] & (slot < slots)
        position = tl.load(positions + row + slot, mask=inside, other=0).to(tl.int32)
        value = tl.load(values + row + slot, mask=inside, other=0.0).to(tl.float32)
        column = slot // COUNT * GROUP + position
        picked = tl.load(
            x + (column * BLOCK_M)[:, :, None] + m[None, None, :],
            mask=inside[:, :, None],
            other=0.0,
        )
        total += value[:, :, None] * picked.to(tl.float32)
    added = tl.sum(total, 1) * tl.load(salient_unit + n, mask=real, other=0.0)[:, None]
    if BIAS:
        added += tl.load(bias + n, mask=real, other=0.0).to(tl.float32)[:, None]
    m += block * BLOCK_M
    at = m.to(tl.int64)[None, :] * outputs + n[:, None]
    kept = real[:, None] & (m < rows)[None, :]
    added += tl.load(y + at, mask=kept, other=0.0).to(tl.float32)
    tl.store(out + at, added.to(out.dtype.element_ty), mask=kept)
