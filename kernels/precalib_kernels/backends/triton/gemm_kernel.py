"""The product for small and middling M: words to halves in registers, times x.

A program computes BLOCK_N rows of the result's transpose for BLOCK_M rows of x, over a share of
the steps. Weights are the left operand: at M ≤ 8 a tensor-core product of 8 columns is enough, and
a group's scale belongs to a row of the accumulator.

    y[m, n] = unit[n] · Σ_g f[n, g] · (Σ_k half · x'[m, k] + start[m, g] - zero[n, g] · sum[m, g])
            + salient_unit[n] · Σ_slots value · x'[m, position]          all · inverse[m], + bias[n]

The partial products of a split are added up in a fixed order by the program that arrives last.
"""

import triton
import triton.language as tl

from precalib_kernels.backends.triton import memory_layout
from precalib_kernels.backends.triton.decode import (
    chain_classes,
    chain_halves,
    nibble_tile,
    split_tiles,
)

PICKS = tl.constexpr(memory_layout.PICKS)


@triton.jit(
    do_not_specialize=["rows", "outputs", "steps"],  # padded_rows is known to be a multiple of 64
    do_not_specialize_on_alignment=["y", "bias"],
)
def product_kernel(
    y,  # out: [rows, outputs]
    bias,  # [outputs], or anything
    words,  # int16 [steps, TILES, padded_rows, 16]
    group_data,  # int32 [groups, padded_rows], see `pack.group_data`
    positions,  # uint8 [rounds * PICKS / 4, padded_rows, 4]
    values,  # float16 [rounds * PICKS / 4, padded_rows, 4]
    lines,  # float16 [groups, padded_rows, 2]
    row_unit,  # float32 [padded_rows]
    salient_unit,  # float32 [padded_rows]
    table,  # uint8
    constants,  # int16 [4, 16], see `assembly.constants`
    tiles,  # int32 [padded_rows / 64, 4]
    dots,  # float16 [parts, blocks, steps * STEP / 16, BLOCK_M, 16]
    by_column,  # float16 [parts, blocks, columns of whole rounds, BLOCK_M]
    start,  # float32 [parts, blocks, groups, BLOCK_M]
    sums,  # float32 [parts, blocks, groups, BLOCK_M]
    inverse,  # float32 [parts, blocks * BLOCK_M]
    shares,  # workspace: float32 [splits, blocks, padded_rows, BLOCK_M]
    counters,  # workspace: int32 [blocks, tiles], zero
    rows,  # M
    outputs,  # N
    padded_rows,
    steps,
    BITS: tl.constexpr,
    MODE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    TILES: tl.constexpr,
    J: tl.constexpr,
    OFFSET: tl.constexpr,
    ZEROS: tl.constexpr,
    SLOTS: tl.constexpr,
    LOG8: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
    REGISTERS: tl.constexpr,
    SPARE: tl.constexpr,
):
    """Program (tile, share of the steps, block of x)."""
    CODES: tl.constexpr = TILES - IN_PLACE  # tiles of codes
    GROUPS: tl.constexpr = STEP // GROUP
    # Columns of a product: two to a step make Triton give every warp rows of its own on sm_80.
    DEPTH: tl.constexpr = min(GROUP, 64 * J if BLOCK_M < 32 else 64)
    PIECES: tl.constexpr = 64 * J // DEPTH
    # Many sums take fewer instructions and half the registers if they are kept in units of the
    # group at hand: what is there is converted, and the group's products are added to it.
    RUNNING: tl.constexpr = BLOCK_M >= 64
    HALF: tl.constexpr = min(BLOCK_M, 32)
    tile, split, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks, splits = tl.num_programs(2), tl.num_programs(1)
    about = tiles + tile * (BLOCK_N // 64) * 4
    part = tl.load(about)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, 16)
    m = tl.arange(0, BLOCK_M)

    low = tl.load(constants + r)
    high = tl.load(constants + 16 + r)
    ones = tl.load(constants + 32 + r)
    shift = tl.load(constants + 48 + r)
    plane = part * blocks + block
    words += n[:, None] * 16 + r[None, :]
    dots += plane * (steps * STEP * BLOCK_M) + m[None, :] * 16
    k = tl.arange(0, DEPTH)[:, None]
    dots += k // 16 * (16 * BLOCK_M) + k % 16
    start += plane * (steps * GROUPS * BLOCK_M)
    sums += plane * (steps * GROUPS * BLOCK_M)

    share = tl.cdiv(steps, splits)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if RUNNING:
        unit = one_unit(n, LOG8)
    for step in tl.range(
        split * share, tl.minimum(split * share + share, steps), num_stages=STAGES
    ):
        here = words + step * TILES * padded_rows * 16
        held = split_tiles(here, padded_rows * 16, BITS, SPARE)
        step_dots = dots + step * (STEP * BLOCK_M)
        partial, data = total, n
        for chain in tl.static_range(STEP // 64 // J):
            group = step * GROUPS + chain * J * 64 // GROUP
            carry = n
            line = ()
            if MODE == "trellis":  # a chain is a group
                data = tl.load(group_data + group * padded_rows + n)
                carry = (data >> 16).to(tl.int16)
            if IN_PLACE:
                carry = chain_classes(here, padded_rows * 16, chain, CODES, ASM)
                line = group_lines(lines, group * padded_rows + n, padded_rows, GROUP, MODE)
            first = nibble_tile(here, padded_rows * 16, held, chain * J, BITS)
            second = nibble_tile(here, padded_rows * 16, held, chain * J + J - 1, BITS)
            halves = chain_halves(
                first, second, carry, line,
                low, high, ones, shift, table, BITS, MODE, IN_PLACE, J, ASM, REGISTERS,
            )  # fmt: skip
            for piece in tl.static_range(PIECES):
                first_column = (chain * PIECES + piece) * DEPTH
                current = step * GROUPS + first_column // GROUP
                if first_column % GROUP == 0:
                    if MODE != "trellis":
                        data = tl.load(group_data + current * padded_rows + n)
                    begin = tl.zeros((BLOCK_M,), tl.float32)
                    if OFFSET != 0:
                        begin = tl.load(start + current * BLOCK_M + m)
                    if RUNNING:
                        before, unit = unit, group_unit(scale_of(data, LOG8), LOG8, IN_PLACE)
                        ratio = unit_ratio(before, unit, LOG8, ASM != "")
                        partial = total * ratio[:, None] + begin[None, :]
                    else:
                        partial = tl.broadcast_to(begin[None, :], (BLOCK_N, BLOCK_M))
                    if ZEROS:
                        zero = (data >> 16).to(tl.float32)
                        sum = tl.load(sums + current * BLOCK_M + m)
                        partial -= zero[:, None] * sum[None, :]
                ready = tl.load(step_dots + first_column * BLOCK_M)
                left = side_by_side(halves, piece * DEPTH // 16, DEPTH // 16)
                partial = tl.dot(left, ready, partial)
                if (first_column + DEPTH) % GROUP == 0:
                    if RUNNING:
                        total = partial
                    else:
                        total += partial * group_scale(scale_of(data, LOG8), LOG8)[:, None]
    if RUNNING:  # registers are short
        tile, split = again(tile, "ctaid.x", ASM), again(split, "ctaid.y", ASM)
        block, blocks = again(block, "ctaid.z", ASM), again(blocks, "nctaid.z", ASM)
        splits = again(splits, "nctaid.y", ASM)
        about = tiles + tile * (BLOCK_N // 64) * 4
        plane = part * blocks + block
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        total *= unit_ratio(unit, one_unit(n, LOG8), LOG8, ASM != "")[:, None]
    total *= tl.load(row_unit + n)[:, None]
    if SLOTS > 0:
        slot_unit = tl.load(salient_unit + n)
        rounds = tl.cdiv(steps * GROUPS * SLOTS, PICKS)
        by_column += plane * (tl.cdiv(rounds * PICKS, SLOTS) * (GROUP * BLOCK_M))
        positions = positions.to(tl.pointer_type(tl.int32))
        values = values.to(tl.pointer_type(tl.int64))
        # Zeros, which Triton does not know: so it spreads words over a row's threads, not bytes.
        half = tl.arange(0, HALF)
        nothing = (half // HALF)[None, :]
        share = tl.cdiv(rounds, splits)
        for turn in tl.range(
            split * share,
            tl.minimum(split * share + share, rounds),
            loop_unroll_factor=4 if BLOCK_M <= 16 else 1,  # loads of several rounds in flight
        ):
            # A few products are added up in fp16, two at a time, then in float32.
            few = tl.zeros((BLOCK_N, HALF), tl.float16)
            more = few  # the other half of the columns
            for i in tl.static_range(PICKS):
                if i % 4 == 0:
                    at = (turn * (PICKS // 4) + i // 4) * padded_rows + n
                    places = tl.load(positions + at)[:, None] + nothing
                    four = tl.load(values + at)[:, None] + nothing
                base = by_column + slot_group(turn, i, SLOTS) * (GROUP * BLOCK_M) + half[None, :]
                picked = pick(base, places, i % 4, BLOCK_M, ASM != "")
                value = (four >> 16 * (i % 4)).to(tl.int16).to(tl.float16, bitcast=True)
                few = multiply_add(tl.load(picked), value, few, ASM != "")
                if HALF < BLOCK_M:
                    more = multiply_add(tl.load(picked + HALF), value, more, ASM != "")
            if HALF < BLOCK_M:
                both = tl.permute(tl.join(few, more), (0, 2, 1))
                total += tl.reshape(both, (BLOCK_N, BLOCK_M)).to(tl.float32) * slot_unit[:, None]
            else:
                total += few.to(tl.float32) * slot_unit[:, None]

    if SPLIT:
        tile_size: tl.constexpr = BLOCK_N * BLOCK_M
        plane_size = tl.num_programs(0) * blocks * tile_size
        inner = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + m[None, :]
        shares += (block * tl.num_programs(0) + tile) * tile_size + inner
        tl.store(shares + split * plane_size, total)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + block * tl.num_programs(0) + tile, 1, sem="acq_rel")
        if arrived == splits - 1:
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            TOGETHER: tl.constexpr = 4 if BLOCK_M < 64 else 1  # loaded at a time, for latency
            for first in tl.range(0, splits, TOGETHER):
                few = ()
                for i in tl.static_range(TOGETHER):
                    here = inner < tl.where(first + i < splits, tile_size, 0)
                    at = shares + (first + i) * plane_size
                    few = few + (tl.load(at, here, 0.0, cache_modifier=".cg"),)
                for i in tl.static_range(TOGETHER):
                    total += few[i]
            _store(y, bias, inverse, about, total, part, block, blocks, rows, outputs, BIAS)
    else:
        _store(y, bias, inverse, about, total, part, block, blocks, rows, outputs, BIAS)


@triton.jit
def again(number, REGISTER: tl.constexpr, ASM: tl.constexpr):
    """A special register's number, read once more, so that nothing holds it in between."""
    if ASM != "":
        number = tl.inline_asm_elementwise(
            "mov.u32 $0, %" + REGISTER + ";", "=r,r", (number,), tl.int32, False, 1
        )
    return number


@triton.jit
def slot_group(turn, SLOT: tl.constexpr, SLOTS: tl.constexpr):
    """Group of slot PICKS · turn + SLOT of a row."""
    if PICKS % SLOTS == 0:
        group = turn * (PICKS // SLOTS) + SLOT // SLOTS
    else:
        group = (turn * PICKS + SLOT) // SLOTS
    return group


@triton.jit
def pick(base, places, BYTE: tl.constexpr, STRIDE: tl.constexpr, ASSEMBLER: tl.constexpr):
    """Pointers base [1, columns] moved by STRIDE times byte BYTE of places [rows, columns].

    The assembler saves two of five instructions that Triton would make of it.
    """
    if ASSEMBLER:
        wide: tl.constexpr = min(8, base.shape[1])
        moved = tl.inline_asm_elementwise(
            "{ .reg .b32 c; prmt.b32 c, $1, 0, $2; mad.wide.u32 $0, c, $3, $4; }",
            "=l,r,r,r,l",
            (places, 0x4440 + BYTE, 2 * STRIDE, base.to(tl.int64)),
            tl.int64,
            True,
            1,
        ).to(tl.pointer_type(tl.float16))
        result = tl.max_contiguous(tl.multiple_of(moved, [1, 2 * wide]), [1, wide])
    else:
        result = base + ((places >> 8 * BYTE) & 0xFF) * STRIDE
    return result


@triton.jit
def side_by_side(halves, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT of the tiles [rows, 16] as one [rows, 16 * COUNT], register by register."""
    if COUNT == 1:
        result = halves[FIRST]
    else:
        left = side_by_side(halves, FIRST, COUNT // 2)
        right = side_by_side(halves, FIRST + COUNT // 2, COUNT // 2)
        both = tl.permute(tl.join(left, right), (0, 2, 1))
        result = tl.reshape(both, (both.shape[0], 16 * COUNT))
    return result


@triton.jit
def group_lines(lines, at, rows, GROUP: tl.constexpr, MODE: tl.constexpr):
    """Slope and offset for each of a tile's four dots, from the `lines` of its group or two."""
    first = line_pair(lines, at, MODE)
    second = first
    if GROUP == 32:
        second = line_pair(lines, at + rows, MODE)
    return first + second


@triton.jit
def line_pair(lines, at, MODE: tl.constexpr):
    """Those of an even dot and an odd one, where codes, and uniform levels, count sixteenfold."""
    both = tl.load(lines.to(tl.pointer_type(tl.int32)) + at)
    slope = both.to(tl.int16).to(tl.float16, bitcast=True)
    offset = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    if MODE == "uniform":
        result = slope, offset, slope, offset * 16.0
    else:
        result = slope, offset, slope * 0.0625, offset
    return result


@triton.jit
def multiply_add(a, b, c, ASSEMBLER: tl.constexpr):
    """a · b + c in fp16, two at a time where there is assembler."""
    if ASSEMBLER:
        result = tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", (a, b, c), tl.float16, True, 2
        )
    else:
        result = a * b + c
    return result


@triton.jit
def group_unit(scale, LOG8: tl.constexpr, IN_PLACE: tl.constexpr):
    """What sums of a group are counted in: a factor, or its logarithm to base 2 if LOG8.

    A scale of zero counts 2**-60, so that a quotient by it is finite; rows of nothing else have
    a row_unit of zero. In place there is none.
    """
    if LOG8:
        unit = tl.where(scale == 255, -60.0, scale.to(tl.float32) * -0.0625)
    elif IN_PLACE:
        unit = scale.to(tl.float32)
    else:
        factor = scale.to(tl.float32)
        unit = tl.where(factor == 0, 2.0**-60, factor)
    return unit


@triton.jit
def one_unit(n, LOG8: tl.constexpr):
    """The unit of what is not scaled, float32 in the shape of n."""
    return tl.zeros_like(n).to(tl.float32) + (0 if LOG8 else 1)


@triton.jit
def unit_ratio(a, b, LOG8: tl.constexpr, ASSEMBLER: tl.constexpr):
    """Unit a over unit b; the assembler's quotient is for such sizes only, and two instructions."""
    if LOG8:
        result = tl.exp2(a - b)
    elif ASSEMBLER:
        result = tl.inline_asm_elementwise(
            "{ .reg .f32 c; rcp.approx.ftz.f32 c, $2; mul.f32 $0, $1, c; }",
            "=r,r,r",
            (a, b),
            tl.float32,
            True,
            1,
        )
    else:
        result = a / b
    return result


@triton.jit
def scale_of(data, LOG8: tl.constexpr):
    """The stored scale in a group's data."""
    return data & 0xFF if LOG8 else data.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def group_scale(scale, LOG8: tl.constexpr):
    """Factor of a group: float16 as it is, or 2**(-code / 16), code 255 being zero."""
    if LOG8:
        return tl.where(scale == 255, 0.0, tl.exp2(scale.to(tl.float32) * -0.0625))
    return scale.to(tl.float32)


@triton.jit
def _store(y, bias, inverse, about, total, part, block, blocks, rows, outputs, BIAS: tl.constexpr):
    BLOCK_N: tl.constexpr = total.shape[0]
    BLOCK_M: tl.constexpr = total.shape[1]
    inner = tl.arange(0, BLOCK_N)
    inside = inner < tl.load(about + 2)
    n = tl.load(about + 1) + inner
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    total *= tl.load(inverse + part * blocks * BLOCK_M + m)[None, :]
    if BIAS:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    # 32 bits do for a few hundred rows; as many 64-bit offsets would not fit into registers.
    at = y + (m[None, :] * outputs + n[:, None])
    tl.store(at, total.to(y.dtype.element_ty), mask=inside[:, None] & (m < rows)[None, :])
