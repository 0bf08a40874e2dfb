"""The end of a GEMM: partial sums of a split K are added up, and the result is stored."""

import triton
import triton.language as tl


@triton.jit
def add_splits(total, partial_sums, counters, tile, split, splits, block, blocks):
    """The sum of all splits of K, and whether this program, the last to arrive, has it.

    Partial sums are added in the order of the splits, so results repeat bit for bit.
    """
    BLOCK_N: tl.constexpr = total.shape[0]
    BLOCK_M: tl.constexpr = total.shape[1]
    tile_size: tl.constexpr = BLOCK_N * BLOCK_M
    TOGETHER: tl.constexpr = 4 if BLOCK_M < 64 else 1  # loaded at a time, for latency
    plane_size = tl.num_programs(0) * blocks * tile_size
    inner = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    partial_sums += (block * tl.num_programs(0) + tile) * tile_size + inner
    tl.store(partial_sums + split * plane_size, total)
    tl.debug_barrier()
    arrived = tl.atomic_add(counters + block * tl.num_programs(0) + tile, 1, sem="acq_rel")
    last = arrived == splits - 1
    if last:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for first in tl.range(0, splits, TOGETHER):
            few = ()
            for i in tl.static_range(TOGETHER):
                here = inner < tl.where(first + i < splits, tile_size, 0)
                at = partial_sums + (first + i) * plane_size
                few = few + (tl.load(at, here, 0.0, cache_modifier=".cg"),)
            for i in tl.static_range(TOGETHER):
                total += few[i]
    return total, last


@triton.jit
def store_result(
    y, bias, x_scale, about, total, part, block, blocks, routes, factors, rows, outputs,
    BIAS: tl.constexpr, GROUPED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Undo the scaling of x, add the bias and write total, [rows of the weight, rows of x].

    GROUPED: a row of x goes to the row of y that its route names; WEIGHTED: times its factor.
    """
    BLOCK_N: tl.constexpr = total.shape[0]
    BLOCK_M: tl.constexpr = total.shape[1]
    inner = tl.arange(0, BLOCK_N)
    inside = inner < tl.load(about + 2)
    n = tl.load(about + 1) + inner
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    total *= tl.load(x_scale + part * blocks * BLOCK_M + m)[None, :]
    if BIAS:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    if GROUPED:
        m = tl.load(routes + m)
    if WEIGHTED:
        total *= tl.load(factors + m, mask=m < rows, other=0.0)[None, :]
    # 32 bits do for a few hundred rows; as many 64-bit offsets would not fit into registers.
    at = y + (m[None, :] * outputs + n[:, None])
    tl.store(at, total.to(y.dtype.element_ty), mask=inside[:, None] & (m < rows)[None, :])
