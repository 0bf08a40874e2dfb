"""Scales of groups, and the units that sums are kept in."""

import triton
import triton.language as tl


@triton.jit
def group_affine(affine, at, rows, GROUP: tl.constexpr, MODE: tl.constexpr):
    """Slope and offset for each of a tile's four dots, from its group's or two groups' terms."""
    first = affine_pair(affine, at, MODE)
    second = first
    if GROUP == 32:
        second = affine_pair(affine, at + rows, MODE)
    return first + second


@triton.jit
def affine_pair(affine, at, MODE: tl.constexpr):
    """Those of an even dot and an odd one, where codes, and uniform levels, count sixteenfold."""
    both = tl.load(affine.to(tl.pointer_type(tl.int32)) + at)
    slope = both.to(tl.int16).to(tl.float16, bitcast=True)
    offset = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    if MODE == "uniform":
        result = slope, offset, slope, offset * 16.0
    else:
        result = slope, offset, slope * 0.0625, offset
    return result


@triton.jit
def group_unit(scale, LOG8: tl.constexpr, INLINE: tl.constexpr):
    """What sums of a group are counted in: a factor, or its logarithm to base 2 if LOG8.

    A scale of zero counts 2**-60, so that a quotient by it is finite; rows of nothing else have
    a row_unit of zero. In place there is none.
    """
    if LOG8:
        unit = tl.where(scale == 255, -60.0, scale.to(tl.float32) * -0.0625)
    elif INLINE:
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
