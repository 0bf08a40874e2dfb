"""The fused GEMM for small and middling M: words are decoded to fp16 in registers, times x.

A program computes BLOCK_N rows of the result's transpose for BLOCK_M rows of x, over the steps of
one split. Weights are the left operand: at M ≤ 8 a tensor-core product of 8 columns is enough, and
a group's scale belongs to a row of the accumulator.

    y[m, n] = unit[n] · Σ_g f[n, g] · (Σ_k w16 · x'[m, k] + term[m, g] - zero[n, g] · sum[m, g])
            + salient_unit[n] · Σ_slots value · x'[m, position]          all · x_scale[m], + bias[n]

The partial products of a split are added up in a fixed order by the program that arrives last.

GROUPED, the weights of several experts lie one after the other, and every block of x belongs to
one of them (`routes.Routes`). Programs of blocks that belong to none do nothing.
"""

import triton
import triton.language as tl

from precalib_kernels.backends.triton import memory_layout
from precalib_kernels.backends.triton.decode import load_chain, side_by_side, split_tiles
from precalib_kernels.backends.triton.gemm_epilogue import add_splits, store_result
from precalib_kernels.backends.triton.gemm_grouping import block_expert, of_expert
from precalib_kernels.backends.triton.gemm_salient import add_salient, gathered_columns
from precalib_kernels.backends.triton.gemm_scales import (
    group_scale,
    group_unit,
    one_unit,
    scale_of,
    unit_ratio,
)

SALIENT_CHUNK = tl.constexpr(memory_layout.SALIENT_CHUNK)
ROUTES = ("routes", "expert_ids", "used", "factors")  # slices of tensors may begin anywhere


@triton.jit(
    do_not_specialize=["rows", "outputs", "steps"],  # padded_rows is known to be a multiple of 64
    do_not_specialize_on_alignment=["y", "bias", *ROUTES],
)
def gemm_kernel(
    y,  # out: [rows, outputs]
    bias,  # [outputs], or anything
    words,  # int16 [steps, TILES, padded_rows, 16]
    group_data,  # int32 [groups, padded_rows], see `repack.group_data`
    positions,  # uint8 [rounds * SALIENT_CHUNK / 4, padded_rows, 4]
    values,  # float16 [rounds * SALIENT_CHUNK / 4, padded_rows, 4]
    affine,  # float16 [groups, padded_rows, 2]
    row_unit,  # float32 [padded_rows]
    salient_unit,  # float32 [padded_rows]
    table,  # uint8
    constants,  # int16 [4 or 6, 16], see `decode_ptx.constants`
    tiles,  # int32 [padded_rows / 64, 4]
    dots,  # float16 [parts, blocks, steps * STEP / 16, BLOCK_M, 16]
    by_column,  # float16 [parts, blocks, columns of whole rounds, BLOCK_M]
    offset_terms,  # float32 [parts, blocks, groups, BLOCK_M]
    group_sums,  # float32 [parts, blocks, groups, BLOCK_M]
    x_scale,  # float32 [parts, blocks * BLOCK_M]
    partial_sums,  # workspace: float32 [splits, blocks, padded_rows, BLOCK_M]
    counters,  # workspace: int32 [blocks, tiles], zero
    routes,  # GROUPED: int32 [places], the row of y of each row of x; `rows` for none
    expert_ids,  # GROUPED: int32 [blocks], negative for none
    used,  # GROUPED: int32 [1], places in use
    factors,  # WEIGHTED: float32 [rows], what each row of y is multiplied by
    rows,  # M; GROUPED: of y
    outputs,  # N
    padded_rows,
    steps,
    BITS: tl.constexpr, MODE: tl.constexpr, INLINE: tl.constexpr, GROUP: tl.constexpr,
    STEP: tl.constexpr, TILES: tl.constexpr, J: tl.constexpr, OFFSET: tl.constexpr,
    ZEROS: tl.constexpr, SLOTS: tl.constexpr, LOG8: tl.constexpr, BIAS: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
    ASM: tl.constexpr, REGISTERS: tl.constexpr, SPARE: tl.constexpr,
    GROUPED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Program (tile, split of the steps, block of x)."""
    WHOLE: tl.constexpr = TILES - (INLINE or BITS == 5)  # tiles of nibbles
    GROUPS: tl.constexpr = STEP // GROUP
    # Columns of a product: two to a step make Triton give every warp rows of its own on sm_80.
    DEPTH: tl.constexpr = min(GROUP, 64 * J if BLOCK_M < 32 else 64)
    PIECES: tl.constexpr = 64 * J // DEPTH
    # Many sums take fewer instructions and half the registers if they are kept in units of the
    # group at hand: what is there is converted, and the group's products are added to it.
    RUNNING: tl.constexpr = BLOCK_M >= 64
    tile, split, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks, splits = tl.num_programs(2), tl.num_programs(1)
    if GROUPED:
        expert = block_expert(expert_ids, used, block, BLOCK_M)
        if expert < 0:
            return
        words = of_expert(words, expert, steps * TILES * padded_rows * 16)
        group_data = of_expert(group_data, expert, steps * GROUPS * padded_rows)
        affine = of_expert(affine, expert, steps * GROUPS * padded_rows * 2)
    about = tiles + tile * (BLOCK_N // 64) * 4
    part = tl.load(about)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, 16)
    m = tl.arange(0, BLOCK_M)

    masks = tl.load(constants + r), tl.load(constants + 16 + r)
    masks += tl.load(constants + 32 + r), tl.load(constants + 48 + r)
    if BITS == 5:
        masks += tl.load(constants + 64 + r), tl.load(constants + 80 + r)
    plane = part * blocks + block
    words += n[:, None] * 16 + r[None, :]
    dots += plane * (steps * STEP * BLOCK_M) + m[None, :] * 16
    k = tl.arange(0, DEPTH)[:, None]
    dots += k // 16 * (16 * BLOCK_M) + k % 16
    offset_terms += plane * (steps * GROUPS * BLOCK_M)
    group_sums += plane * (steps * GROUPS * BLOCK_M)

    steps_per_split = tl.cdiv(steps, splits)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    unit = one_unit(n, LOG8)
    for step in tl.range(
        split * steps_per_split,
        tl.minimum(split * steps_per_split + steps_per_split, steps),
        num_stages=STAGES,
    ):
        here = words + step * TILES * padded_rows * 16
        held = split_tiles(here, padded_rows * 16, BITS, SPARE)
        step_dots = dots + step * (STEP * BLOCK_M)
        partial, data = total, n
        for chain in tl.static_range(STEP // 64 // J):
            group = step * GROUPS + chain * J * 64 // GROUP
            loaded, decoded = load_chain(
                here, held, group_data, affine, group * padded_rows + n, padded_rows, chain,
                masks, table, BITS, MODE, INLINE, GROUP, WHOLE, J, ASM, REGISTERS,
            )  # fmt: skip
            if MODE == "trellis":
                data = loaded
            for piece in tl.static_range(PIECES):
                first_column = (chain * PIECES + piece) * DEPTH
                current = step * GROUPS + first_column // GROUP
                if first_column % GROUP == 0:
                    if MODE != "trellis":
                        data = tl.load(group_data + current * padded_rows + n)
                    partial, unit = begin_group(
                        total, unit, data, offset_terms + current * BLOCK_M + m,
                        group_sums + current * BLOCK_M + m, OFFSET, ZEROS, LOG8, INLINE, RUNNING,
                        ASM,
                    )  # fmt: skip
                ready = tl.load(step_dots + first_column * BLOCK_M)
                left = side_by_side(decoded, piece * DEPTH // 16, DEPTH // 16)
                partial = tl.dot(left, ready, partial)
                if (first_column + DEPTH) % GROUP == 0:
                    if RUNNING:
                        total = partial
                    else:
                        total += partial * group_scale(scale_of(data, LOG8), LOG8)[:, None]
    if RUNNING:  # registers are short
        tile, split, block, blocks, splits = reread_program(tile, split, block, blocks, splits, ASM)
        about = tiles + tile * (BLOCK_N // 64) * 4
        plane = part * blocks + block
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        total *= unit_ratio(unit, one_unit(n, LOG8), LOG8, ASM != "")[:, None]
    rounds = tl.cdiv(steps * GROUPS * SLOTS, SALIENT_CHUNK)
    if GROUPED:
        expert = tl.load(expert_ids + block)
        row_unit = of_expert(row_unit, expert, padded_rows)
        salient_unit = of_expert(salient_unit, expert, padded_rows)
        positions = of_expert(positions, expert, rounds * SALIENT_CHUNK * padded_rows)
        values = of_expert(values, expert, rounds * SALIENT_CHUNK * padded_rows)
        bias = of_expert(bias, expert, outputs)
    total *= tl.load(row_unit + n)[:, None]
    if SLOTS > 0:
        total = add_salient(
            total, n, by_column + plane * gathered_columns(steps * GROUPS, GROUP, SLOTS) * BLOCK_M,
            positions, values, salient_unit, rounds,
            split, splits, padded_rows, GROUP, SLOTS, ASM,
        )  # fmt: skip
    last = True
    if SPLIT:
        total, last = add_splits(total, partial_sums, counters, tile, split, splits, block, blocks)
    if last:
        store_result(
            y, bias, x_scale, about, total, part, block, blocks, routes, factors, rows, outputs,
            BIAS, GROUPED, WEIGHTED,
        )  # fmt: skip


@triton.jit
def begin_group(
    total, unit, data, offset_terms, group_sums,
    OFFSET: tl.constexpr, ZEROS: tl.constexpr, LOG8: tl.constexpr, INLINE: tl.constexpr,
    RUNNING: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """What a group's products are added to, [rows, columns], and the unit it is kept in.

    total: the sum so far, in `unit` if RUNNING;  data: the group's, int32 [rows];
    offset_terms, group_sums: pointers [columns].
    """
    begin = tl.zeros((total.shape[1],), tl.float32)
    if OFFSET != 0:
        begin = tl.load(offset_terms)
    if RUNNING:
        before, unit = unit, group_unit(scale_of(data, LOG8), LOG8, INLINE)
        partial = total * unit_ratio(before, unit, LOG8, ASM != "")[:, None] + begin[None, :]
    else:
        partial = tl.broadcast_to(begin[None, :], total.shape)
    if ZEROS:
        partial -= (data >> 16).to(tl.float32)[:, None] * tl.load(group_sums)[None, :]
    return partial, unit


@triton.jit
def reread_program(tile, split, block, blocks, splits, ASM: tl.constexpr):
    """A program's numbers and sizes of the grid, read once more."""
    return (
        reread_register(tile, "ctaid.x", ASM),
        reread_register(split, "ctaid.y", ASM),
        reread_register(block, "ctaid.z", ASM),
        reread_register(blocks, "nctaid.z", ASM),
        reread_register(splits, "nctaid.y", ASM),
    )


@triton.jit
def reread_register(number, REGISTER: tl.constexpr, ASM: tl.constexpr):
    """A special register's number, read once more, so that nothing holds it in between."""
    if ASM != "":
        number = tl.inline_asm_elementwise(
            "mov.u32 $0, %" + REGISTER + ";", "=r,r", (number,), tl.int32, False, 1
        )
    return number
