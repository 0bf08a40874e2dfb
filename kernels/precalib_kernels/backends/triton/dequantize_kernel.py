"""The weight itself, from the in-memory form: for large M, where a plain product is best."""

import triton
import triton.language as tl

from precalib_kernels.backends.triton.decode import load_chain, split_tiles
from precalib_kernels.backends.triton.gemm_scales import group_scale, scale_of


@triton.jit(do_not_specialize=["first_tile", "columns"])
def dequantize_kernel(
    weight,  # out: [rows, columns], any float type; row 0 is that of first_tile
    words,
    group_data,
    positions,
    values,
    affine,
    row_unit,
    salient_unit,
    table,
    constants,
    tiles,
    column_scale,  # [parts, steps * STEP] float16
    first_tile,
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
    IN_DOTS: tl.constexpr,
    ASM: tl.constexpr,
    REGISTERS: tl.constexpr,
    SPARE: tl.constexpr,
):
    """Program (tile of 64 rows, step). Arguments as in `gemm_kernel`.

    IN_DOTS: columns are left in the order of the dots, whole steps of them, which a product can
    take as well if x has that order: a dot's 16 columns then lie together in memory.
    """
    columns = columns // 32 * 32  # it always is; so Triton knows, and stores more than one at once
    tile, step = first_tile + tl.program_id(0), tl.program_id(1)
    inner = tl.arange(0, 64)
    n = tile * 64 + inner
    part = tl.load(tiles + tile * 4)
    row = tl.load(tiles + tile * 4 + 1) - tl.load(tiles + first_tile * 4 + 1) + inner
    inside = inner < tl.load(tiles + tile * 4 + 2)
    dequantize_rows(
        weight, n, row, inside, step, words, group_data, positions, values, affine, row_unit,
        salient_unit, table, constants, column_scale + part * tl.num_programs(1) * STEP, columns,
        padded_rows, BITS, MODE, INLINE, GROUP, STEP, TILES, J, OFFSET, ZEROS, SLOTS, LOG8, SCALED,
        ENTRIES_PER_UNIT, IN_DOTS, ASM, REGISTERS, SPARE,
    )  # fmt: skip


@triton.jit
def dequantize_rows(
    weight, n, row, inside, step, words, group_data, positions, values, affine, row_unit,
    salient_unit, table, constants, column_scale, columns, padded_rows,
    BITS: tl.constexpr, MODE: tl.constexpr, INLINE: tl.constexpr, GROUP: tl.constexpr,
    STEP: tl.constexpr, TILES: tl.constexpr, J: tl.constexpr, OFFSET: tl.constexpr,
    ZEROS: tl.constexpr, SLOTS: tl.constexpr, LOG8: tl.constexpr, SCALED: tl.constexpr,
    ENTRIES_PER_UNIT: tl.constexpr, IN_DOTS: tl.constexpr, ASM: tl.constexpr,
    REGISTERS: tl.constexpr, SPARE: tl.constexpr,
):  # fmt: skip
    """Write the columns of one step of rows n into rows `row` of `weight`, where `inside`.

    n, row, inside: [any]; column_scale: that of the part.
    """
    WHOLE: tl.constexpr = TILES - (INLINE or BITS == 5)  # tiles of nibbles
    GROUPS: tl.constexpr = STEP // GROUP
    r = tl.arange(0, 16)
    masks = tl.load(constants + r), tl.load(constants + 16 + r)
    masks += tl.load(constants + 32 + r), tl.load(constants + 48 + r)
    if BITS == 5:
        masks += tl.load(constants + 64 + r), tl.load(constants + 80 + r)

    here = words + step * TILES * padded_rows * 16 + n[:, None] * 16 + r[None, :]
    held = split_tiles(here, padded_rows * 16, BITS, SPARE)
    unit = tl.load(row_unit + n)
    for chain in tl.static_range(STEP // 64 // J):
        first_group = step * GROUPS + chain * J * 64 // GROUP
        data, scale, places, added = n, unit, (), ()
        _, decoded = load_chain(
            here, held, group_data, affine, first_group * padded_rows + n, padded_rows, chain,
            masks, table, BITS, MODE, INLINE, GROUP, WHOLE, J, ASM, REGISTERS,
        )  # fmt: skip
        for dot in tl.static_range(4 * J):
            group = first_group + dot * 16 // GROUP
            if dot * 16 % GROUP == 0:
                data = tl.load(group_data + group * padded_rows + n)
                scale = group_scale(scale_of(data, LOG8), LOG8) * unit
                places, added = group_slots(
                    positions, values, salient_unit, group, n, padded_rows, SLOTS
                )
            entry = decoded[dot].to(tl.float32) - OFFSET
            if MODE == "uniform" and dot % 2 == 1:
                entry *= 0.0625
            if ZEROS:
                entry -= ((data >> 16).to(tl.float32) / ENTRIES_PER_UNIT)[:, None]
            value = entry * scale[:, None]
            number = step * (STEP // 16) + chain * 4 * J + dot
            column = dot_column(number, r, GROUP, MODE, J)
            inside_group = column - group * GROUP
            for slot in tl.static_range(SLOTS):
                hit = places[slot][:, None] == inside_group[None, :]
                value += tl.where(hit, added[slot][:, None], 0.0)
            if SCALED:
                factor = tl.load(column_scale + column)
                value *= factor.to(tl.float32)[None, :]
            stored = value.to(weight.dtype.element_ty)
            if IN_DOTS:
                to = weight + row.to(tl.int64)[:, None] * columns + (number * 16 + r)[None, :]
                tl.store(to, stored, mask=inside[:, None])
            else:
                to = weight + row.to(tl.int64)[:, None] * columns + column[None, :]
                tl.store(to, stored, mask=inside[:, None] & (column < columns)[None, :])


@triton.jit
def group_slots(positions, values, salient_unit, group, n, padded_rows, SLOTS: tl.constexpr):
    """Positions in the group, and what is added there, [rows] each, of a group's salient slots."""
    places = ()
    added = ()
    for slot in tl.static_range(SLOTS):
        place = group * SLOTS + slot
        at = (place // 4 * padded_rows + n) * 4 + place % 4
        places = places + (tl.load(positions + at).to(tl.int32),)
        # salient_unit is for activations divided by 32
        value = tl.load(values + at).to(tl.float32) * tl.load(salient_unit + n) / 32
        added = added + (value,)
    return places, added


@triton.jit
def dot_column(dot, r, GROUP: tl.constexpr, MODE: tl.constexpr, J: tl.constexpr):
    """Inverse of `dot_position`."""
    if MODE == "trellis":
        inside = dot % (4 * J)
        column = r // 2 * (8 * J) + inside // 4 * 8 + inside % 4 * 2 + r % 2
        column += dot // (4 * J) * GROUP
    else:
        column = dot * 16 + r
    return column
