"""What salient weights add to a GEMM: columns of x times differences to the base weight."""

import triton
import triton.language as tl

from precalib_kernels.backends.triton import memory_layout

SALIENT_CHUNK = tl.constexpr(memory_layout.SALIENT_CHUNK)
SALIENT_UNROLL = tl.constexpr(memory_layout.SALIENT_UNROLL)


@triton.jit
def gathered_columns(groups, GROUP: tl.constexpr, SLOTS: tl.constexpr):
    """Columns that the slots of whole rounds can reach, those of `groups` groups or more."""
    return tl.cdiv(tl.cdiv(groups * SLOTS, SALIENT_CHUNK) * SALIENT_CHUNK, SLOTS) * GROUP


@triton.jit
def add_salient(
    total, n, by_column, positions, values, salient_unit, rounds, split, splits, padded_rows,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """total [rows, columns] and what the salient weights of a split's rounds add to it.

    by_column: pointer to this block's activations, float16 [columns, BLOCK_M].
    """
    BLOCK_N: tl.constexpr = total.shape[0]
    BLOCK_M: tl.constexpr = total.shape[1]
    HALF: tl.constexpr = min(BLOCK_M, 32)
    slot_unit = tl.load(salient_unit + n)
    positions = positions.to(tl.pointer_type(tl.int32))
    values = values.to(tl.pointer_type(tl.int64))
    # Zeros, which Triton does not know: so it spreads words over a row's threads, not bytes.
    half = tl.arange(0, HALF)
    nothing = (half // HALF)[None, :]
    rounds_per_split = tl.cdiv(rounds, splits)
    for turn in tl.range(
        split * rounds_per_split,
        tl.minimum(split * rounds_per_split + rounds_per_split, rounds),
        loop_unroll_factor=SALIENT_UNROLL if BLOCK_M <= 16 else 1,
    ):
        # A few products are added up in fp16, two at a time, then in float32.
        few = tl.zeros((BLOCK_N, HALF), tl.float16)
        more = few  # the other half of the columns
        for i in tl.static_range(SALIENT_CHUNK):
            if i % 4 == 0:
                at = (turn * (SALIENT_CHUNK // 4) + i // 4) * padded_rows + n
                places = tl.load(positions + at)[:, None] + nothing
                four = tl.load(values + at)[:, None] + nothing
            base = by_column + slot_group(turn, i, SLOTS) * (GROUP * BLOCK_M) + half[None, :]
            gathered = gather_pointers(base, places, i % 4, BLOCK_M, ASM != "")
            value = (four >> 16 * (i % 4)).to(tl.int16).to(tl.float16, bitcast=True)
            few = multiply_add(tl.load(gathered), value, few, ASM != "")
            if HALF < BLOCK_M:
                more = multiply_add(tl.load(gathered + HALF), value, more, ASM != "")
        if HALF < BLOCK_M:
            both = tl.permute(tl.join(few, more), (0, 2, 1))
            total += tl.reshape(both, (BLOCK_N, BLOCK_M)).to(tl.float32) * slot_unit[:, None]
        else:
            total += few.to(tl.float32) * slot_unit[:, None]
    return total


@triton.jit
def slot_group(turn, SLOT: tl.constexpr, SLOTS: tl.constexpr):
    """Group of slot SALIENT_CHUNK · turn + SLOT of a row."""
    if SALIENT_CHUNK % SLOTS == 0:
        group = turn * (SALIENT_CHUNK // SLOTS) + SLOT // SLOTS
    else:
        group = (turn * SALIENT_CHUNK + SLOT) // SLOTS
    return group


@triton.jit
def gather_pointers(
    base, places, BYTE: tl.constexpr, STRIDE: tl.constexpr, ASSEMBLER: tl.constexpr
):
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
def multiply_add(a, b, c, ASSEMBLER: tl.constexpr):
    """a · b + c in fp16, two at a time where there is assembler."""
    if ASSEMBLER:
        result = tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", (a, b, c), tl.float16, True, 2
        )
    else:
        result = a * b + c
    return result
