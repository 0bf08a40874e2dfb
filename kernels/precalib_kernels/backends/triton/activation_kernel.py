"""Activations made ready: one small kernel before the product.

Rows become fp16 that fill its range, by a power of two per row, so one kernel serves every type
of x exactly; the column scale of each fused shard is multiplied in. They are written twice: in the
order of the dots, which the tensor cores read, and column by column, which the salient weights
pick from. Sums per group take the decoders' offset and the zero points off.

GROUPED, row m is that of the token of route m (`routes.Routes`), and the column scales are those
of its block's expert. Places without a route become zeros.
"""

import triton
import triton.language as tl

from precalib_kernels.backends.triton.gemm_grouping import block_expert, of_expert


@triton.jit(
    do_not_specialize=[
        "counter_count",
        "rows",
        "columns",
        "padded",
        "gathered",
        "row_stride",
        "top_k",
    ],
    do_not_specialize_on_alignment=["x", "column_scale", "routes", "expert_ids", "used"],
)
def prepare_kernel(
    x,  # [rows, columns], any float type
    column_scale,  # [parts, padded] float16, or anything
    dots,  # out: float16 [parts, blocks, padded / 16, BLOCK_M, 16]
    by_column,  # out: float16 [parts, blocks, gathered, BLOCK_M]
    offset_terms,  # out: float32 [parts, blocks, groups, BLOCK_M]: minus offset times sum of dots
    group_sums,  # out: float32 [parts, blocks, groups, BLOCK_M]: sums over ENTRIES_PER_UNIT
    x_scale,  # out: float32 [parts, blocks * BLOCK_M]: what undoes the power of two
    counters,  # out: int32, zeroed: arrivals of split programs
    routes,  # GROUPED: as in `gemm_kernel`, as the next two are
    expert_ids,
    used,
    counter_count,
    rows,  # of x; GROUPED: routes
    columns,
    padded,  # columns of whole steps
    gathered,  # columns that salient weights are picked from, zeros beyond the others
    row_stride,
    top_k,  # GROUPED: routes of a row of x
    OFFSET: tl.constexpr,
    ENTRIES_PER_UNIT: tl.constexpr,
    GROUP: tl.constexpr,
    MODE: tl.constexpr,
    J: tl.constexpr,
    SCALED: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """Program (m, part, chunk) makes BLOCK_K columns of one row of x ready for one part.

    ROW_BLOCK: columns taken at a time for the row's maximum, which every program finds for itself:
    reading a row again costs less than waiting for another program.
    """
    m = tl.program_id(0)
    part = tl.program_id(1)
    chunk = tl.program_id(2)
    blocks = tl.num_programs(0) // BLOCK_M
    block = part * blocks + m // BLOCK_M
    lane = m % BLOCK_M
    if (m == 0) & (part == 0) & (chunk == 0):
        for first in tl.range(0, counter_count, BLOCK_K):
            counter = first + tl.arange(0, BLOCK_K)
            tl.store(counters + counter, counter * 0, mask=counter < counter_count)
    row, real = m, m < rows  # rows of a block past the last are zeros
    if GROUPED:
        expert = block_expert(expert_ids, used, m // BLOCK_M, BLOCK_M)
        if expert < 0:
            return
        route = tl.load(routes + m)
        row, real = route // top_k, route < rows
        column_scale = of_expert(column_scale, expert, tl.num_programs(1) * padded)
    wide = tl.arange(0, ROW_BLOCK)
    largest = tl.full((), 0.0, tl.float32)
    for first in tl.range(0, padded, ROW_BLOCK):
        values = _scaled(
            x, column_scale, row, real, part, first + wide, columns, padded, row_stride, SCALED
        )
        largest = tl.maximum(largest, tl.max(tl.abs(values), 0))
    # 2**14 <= largest * factor < 2**15; exponents are kept where factor and 1 / factor are normal
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(268 - exponent, 1), 253)
    factor = (exponent << 23).to(tl.float32, bitcast=True)
    if chunk == 0:
        back = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        tl.store(x_scale + part * blocks * BLOCK_M + m, back)

    column = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = column < padded
    values = _scaled(x, column_scale, row, real, part, column, columns, padded, row_stride, SCALED)
    half = (values * factor).to(tl.float16)
    if BY_COLUMN:
        at = by_column + (block * gathered + column) * BLOCK_M + lane
        # below 2**10: eight products are added up
        tl.store(at, half * 0.03125, mask=column < gathered)
    dot, r = dot_position(column, GROUP, MODE, J)
    stored = half
    if MODE == "uniform":  # codes of odd dots count sixteenfold
        stored = tl.where(dot % 2 == 1, half * 0.0625, half)
    tl.store(dots + ((block * (padded // 16) + dot) * BLOCK_M + lane) * 16 + r, stored, mask=inside)
    group = chunk * (BLOCK_K // GROUP) + tl.arange(0, BLOCK_K // GROUP)
    at = (block * (padded // GROUP) + group) * BLOCK_M + lane
    inside_groups = group < padded // GROUP
    grouped = tl.reshape(stored.to(tl.float32), (BLOCK_K // GROUP, GROUP))
    tl.store(offset_terms + at, -OFFSET * tl.sum(grouped, 1), mask=inside_groups)
    if MODE == "uniform":
        grouped = tl.reshape(half.to(tl.float32), (BLOCK_K // GROUP, GROUP))
        tl.store(group_sums + at, tl.sum(grouped, 1) / ENTRIES_PER_UNIT, mask=inside_groups)


@triton.jit
def _scaled(
    x, column_scale, row, real, part, column, columns, padded, row_stride, SCALED: tl.constexpr
):
    inside = column < tl.where(real, columns, 0)
    at = x + row.to(tl.int64) * row_stride + column
    values = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        values *= tl.load(column_scale + part * padded + column, mask=column < padded, other=0.0)
    return values


@triton.jit
def dot_position(column, GROUP: tl.constexpr, MODE: tl.constexpr, J: tl.constexpr):
    """Dot and place in it of a column; `memory_layout` tells the order."""
    if MODE != "trellis":
        return column // 16, column % 16
    inside = column % GROUP
    pair = inside // (8 * J)
    tile = inside // 8 % J
    code = inside % 8
    dot = column // GROUP * (4 * J) + 4 * tile + code // 2
    return dot, 2 * pair + code % 2
