"""From packed words to fp16: `decode_ptx` on NVIDIA, the same in plain Triton elsewhere.

Kernels give an empty ASM where there is no assembler: on AMD and in Triton's interpreter.
"""

import triton
import triton.language as tl

from precalib_kernels.backends.triton.gemm_scales import group_affine

DIGITS = tl.constexpr(("0", "1", "2", "3", "4", "5", "6"))


@triton.jit
def split_tiles(words, stride, BITS: tl.constexpr, SPARE: tl.constexpr):
    """Nibble tiles int16 [rows, 16] of a step of 2 or 3 bits, from pointers to the first.

    `stride` leads to the next. Tiles of 4 and 5 bits are loaded where they are needed, which takes
    fewer registers, so there are none here.
    """
    tiles = ()
    if BITS < 4:
        for i in tl.static_range(2 * BITS - 3):
            tiles = tiles + (tl.load(words + i * stride),)
        tiles = tiles + (spare_tile(tiles, BITS, SPARE),)
    return tiles


@triton.jit
def nibble_tile(words, stride, tiles, INDEX: tl.constexpr, BITS: tl.constexpr):
    """A nibble tile of the step, `tiles` being its `split_tiles`."""
    return tl.load(words + INDEX * stride) if BITS >= 4 else tiles[INDEX]


@triton.jit
def load_chain(
    words, held, group_data, affine, at, padded_rows, CHAIN: tl.constexpr, masks, table,
    BITS: tl.constexpr, MODE: tl.constexpr, INLINE: tl.constexpr, GROUP: tl.constexpr,
    WHOLE: tl.constexpr, J: tl.constexpr, ASM: tl.constexpr, REGISTERS: tl.constexpr,
):  # fmt: skip
    """A chain's group data (a trellis only, whose chain is a group) and decoded dots.

    words: pointers to the step's first tile;  held: its `split_tiles`;  at: the chain's group in
    arrays of groups;  masks: the rows of `constants`;  WHOLE: tiles of nibbles of a step.
    """
    data = at
    state = at
    fifth = at
    terms = ()
    if MODE == "trellis":
        data = tl.load(group_data + at)
        state = (data >> 16).to(tl.int16)
    if INLINE:
        state = chain_plane(words + WHOLE * padded_rows * 16, 2 * CHAIN, ASM)
        terms = group_affine(affine, at, padded_rows, GROUP, MODE)
    if BITS == 5:
        fifth = chain_plane(words + WHOLE * padded_rows * 16, J * CHAIN, ASM)
    first = nibble_tile(words, padded_rows * 16, held, CHAIN * J, BITS)
    second = nibble_tile(words, padded_rows * 16, held, CHAIN * J + J - 1, BITS)
    decoded = decode_chain(
        first, second, state, fifth, terms, masks, table,
        BITS, MODE, INLINE, J, ASM, REGISTERS,
    )  # fmt: skip
    return data, decoded


@triton.jit
def chain_plane(words, PLACES: tl.constexpr, ASM: tl.constexpr):
    """A tile of classes or fifth bits, int16 [rows, 16], moved up so that a chain's are at the top.

    Of a pair of words in a register the first moves into the second; nothing looks there.
    """
    plane = tl.load(words)
    if PLACES > 0:
        if ASM == "":
            plane = plane << PLACES
        else:
            plane = tl.inline_asm_elementwise(
                "shl.b32 $0, $1, " + DIGITS[PLACES] + ";", "=r,r", [plane], tl.int16, True, 2
            )
    return plane


@triton.jit
def spare_tile(tiles, BITS: tl.constexpr, SPARE: tl.constexpr):
    """The tile that is not stored, int16 [rows, 16]; SPARE is its assembler, "" for none."""
    if SPARE == "":
        if BITS == 2:
            tile = tiles[0] >> 2
        else:
            tile = (tiles[0] >> 3) & 0x1111
            tile = tile | ((tiles[1] >> 2) & 0x2222) | ((tiles[2] >> 1) & 0x4444)
    elif BITS == 2:
        tile = tl.inline_asm_elementwise(SPARE, "=r,r", [tiles[0]], tl.int16, True, 2)
    else:
        tile = tl.inline_asm_elementwise(
            SPARE, "=r,r,r,r", [tiles[0], tiles[1], tiles[2]], tl.int16, True, 2
        )
    return tile


@triton.jit
def decode_chain(
    first,
    second,
    state,
    fifth,
    affine,
    masks,
    table,
    BITS: tl.constexpr,
    MODE: tl.constexpr,
    INLINE: tl.constexpr,
    J: tl.constexpr,
    ASM: tl.constexpr,
    REGISTERS: tl.constexpr,
):
    """fp16 values [rows, 16] of the 4·J dots of a chain.

    first, second: nibble tiles int16 [rows, 16]; the second is used if J is 2, of a trellis.
    state:         int16 [rows], for a trellis; inline `chain_classes`.
    fifth:         int16 [rows, 16], of 5 bits, those of the first tile at the top of nibbles.
    affine:        inline, slope and offset fp16 [rows] for each dot.
    masks:         the rows of `constants`, int16 [16].
    table:         pointer to the lookup's bytes, for the path without assembler.
    """
    if ASM != "":
        inputs = ()
        if MODE != "uniform":
            inputs = (_over(masks[0], first), _over(masks[1], first))
            if not INLINE:
                inputs = inputs + (_over(masks[2], first),)
            if BITS == 5:
                inputs = inputs + (_over(masks[4], first), _over(masks[5], first))
        if INLINE:
            inputs = inputs + (state,)
            for i in tl.static_range(8):
                inputs = inputs + (tl.broadcast_to(affine[i][:, None], first.shape),)
        if MODE == "trellis":
            inputs = inputs + (_over(masks[3], first), tl.broadcast_to(state[:, None], first.shape))
        if BITS == 5:
            inputs = inputs + (fifth,)
        if J == 2:
            result = tl.inline_asm_elementwise(
                ASM, REGISTERS, inputs + (first, second), (tl.float16,) * 8, True, 2
            )
        else:
            result = tl.inline_asm_elementwise(
                ASM, REGISTERS, inputs + (first,), (tl.float16,) * 4, True, 2
            )
    elif INLINE:
        result = _decode_inline(first, state, affine, table, BITS, MODE)
    elif MODE == "uniform":
        result = _decode_uniform(first, fifth, BITS)
    else:
        word = _pair_words(first)
        chained = _pair_words(fifth) if BITS == 5 else word  # what holds u
        before = chained
        if MODE == "trellis":
            pair_shift, _ = tl.split(tl.reshape(masks[3], (8, 2)))
            twice = (state.to(tl.int32) & 0xFFFF) | (state.to(tl.int32) << 16)
            before = (twice[:, None] << pair_shift.to(tl.int32)[None, :]) >> 24
            before = (before & (0x11 << (min(BITS, 4) - 1))) << 24
        result = _decode_codebook(word, chained, before, table, BITS, MODE)
        if J == 2:
            other = _pair_words(second)
            after = chained << 1 if BITS == 5 else other
            result = result + _decode_codebook(other, after, chained, table, BITS, MODE)
    return result


@triton.jit
def _over(values, tile):
    return tl.broadcast_to(values[None, :], tile.shape)


@triton.jit
def _decode_uniform(tile, fifth, BITS: tl.constexpr):
    """1024 + code in even dots, 1024 + 16 · code in odd ones."""
    mask: tl.constexpr = (1 << min(BITS, 4)) - 1
    one = (tile & mask) | 0x6400
    two = (tile & (mask << 4)) | 0x6400
    three = ((tile >> 8) & mask) | 0x6400
    four = ((tile >> 8) & (mask << 4)) | 0x6400
    if BITS == 5:
        one |= (fifth << 1) & 0x10
        two |= (fifth << 1) & 0x100
        three |= (fifth >> 7) & 0x10
        four |= (fifth >> 7) & 0x100
    return (
        one.to(tl.float16, bitcast=True),
        two.to(tl.float16, bitcast=True),
        three.to(tl.float16, bitcast=True),
        four.to(tl.float16, bitcast=True),
    )


@triton.jit
def _decode_inline(tile, classes, affine, table, BITS: tl.constexpr, MODE: tl.constexpr):
    """What each code stands for, or where its class is set what the dot's line makes of it."""
    mask: tl.constexpr = (1 << BITS) - 1
    return (
        _decode_inline_half(tile & mask, classes, affine[0], affine[1], table, 0, MODE),
        _decode_inline_half((tile >> 4) & mask, classes << 8, affine[2], affine[3], table, 4, MODE),
        _decode_inline_half((tile >> 8) & mask, classes << 1, affine[4], affine[5], table, 0, MODE),
        _decode_inline_half(
            (tile >> 12) & mask, classes << 9, affine[6], affine[7], table, 4, MODE
        ),
    )


@triton.jit
def _decode_inline_half(
    code, classes, slope, offset, table, SHIFT: tl.constexpr, MODE: tl.constexpr
):
    if MODE == "uniform":
        raw = (code << SHIFT + 2).to(tl.float16, bitcast=True)
        half = raw
    else:
        raw = (code << SHIFT).to(tl.float16, bitcast=True)
        half = tl.load(table + code).to(tl.int16).to(tl.float16, bitcast=True)
    salient = raw.to(tl.float32) * slope.to(tl.float32)[:, None] + offset.to(tl.float32)[:, None]
    return tl.where(classes < 0, salient.to(tl.float16), half)


@triton.jit
def _pair_words(tile):
    """int16 [rows, 16] as int32 [rows, 8], element 2w being the low half of word w."""
    low, high = tl.split(tl.reshape(tile, (tile.shape[0], 8, 2)))
    return (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)


@triton.jit
def _decode_codebook(word, chained, before, table, BITS: tl.constexpr, MODE: tl.constexpr):
    """Halves of the four dots of one tile.

    chained: its word, of 5 bits its fifth bits;  before: the same of the tile before in the chain.
    """
    one = chained
    x = chained
    if MODE == "trellis":
        one = (chained << 4) | ((before >> 28) & 0xF)
        x = chained ^ one ^ ((chained << 8) | ((before >> 24) & 0xFF))
    return (
        _decode_pairs(word, x, one, table, 0, BITS, MODE),
        _decode_pairs(word, x, one, table, 2, BITS, MODE),
        _decode_pairs(word, x, one, table, 4, BITS, MODE),
        _decode_pairs(word, x, one, table, 6, BITS, MODE),
    )


@triton.jit
def _decode_pairs(
    word, x, one, table, NIBBLE: tl.constexpr, BITS: tl.constexpr, MODE: tl.constexpr
):
    """Codes at NIBBLE and the next of every word, as fp16 [rows, 16]."""
    low: tl.constexpr = 4 * NIBBLE
    high: tl.constexpr = 4 * NIBBLE + 4
    pair = tl.join(
        _half(word >> low, x >> low, one >> low, table, BITS, MODE),
        _half(word >> high, x >> high, one >> high, table, BITS, MODE),
    )
    return tl.reshape(pair, (x.shape[0], 16))


@triton.jit
def _half(word, x, one, table, BITS: tl.constexpr, MODE: tl.constexpr):
    index = (word & 15) | ((x << 1) & 16) if BITS == 5 else x & ((1 << BITS) - 1)
    byte = tl.load(table + index).to(tl.int16)
    if MODE == "trellis":
        odd = (one >> (min(BITS, 4) - 1)) & 1
        byte = (byte ^ (odd * 0x7F).to(tl.int16)) | 0x80
    return (byte | 0x6400).to(tl.float16, bitcast=True)


@triton.jit
def side_by_side(decoded, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT of the tiles [rows, 16] as one [rows, 16 * COUNT], register by register."""
    if COUNT == 1:
        result = decoded[FIRST]
    else:
        left = side_by_side(decoded, FIRST, COUNT // 2)
        right = side_by_side(decoded, FIRST + COUNT // 2, COUNT // 2)
        both = tl.permute(tl.join(left, right), (0, 2, 1))
        result = tl.reshape(both, (both.shape[0], 16 * COUNT))
    return result
