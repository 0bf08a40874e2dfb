"""Codes of any number of bits as a little-endian stream of bytes."""

import math

import torch
from torch import Tensor


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last dimension into a little-endian bit stream.

    codes:   uint8 [..., n], each below 2**bits; code i takes bits [i*bits, (i+1)*bits) of the
             stream, bit 0 being the lowest bit of byte 0.
    returns: uint8 [..., ceil(n*bits/8)], missing high bits zero.
    """
    unit = 8 // math.gcd(8, bits)  # codes per whole number of bytes
    *lead, count = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -count % unit)) if count % unit else codes
    code = padded.reshape(*lead, -1, unit).unbind(-1)
    packed = []
    for byte in range(unit * bits // 8):
        value: Tensor | None = None
        for i in range(unit):
            shift = i * bits - 8 * byte  # of code i against this byte; uint8 drops what sticks out
            if -bits < shift < 8:
                part = code[i] << shift if shift >= 0 else code[i] >> -shift
                value = part if value is None else value | part
        assert value is not None
        packed.append(value)
    return torch.stack(packed, -1).view(*lead, -1)[..., : (count * bits + 7) // 8].contiguous()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_bits`.

    packed:  uint8 [..., ceil(count*bits/8)].
    returns: uint8 [..., count].
    """
    unit = 8 // math.gcd(8, bits)
    size = unit * bits // 8
    *lead, length = packed.shape
    padded = torch.nn.functional.pad(packed, (0, -length % size)) if length % size else packed
    byte = padded.reshape(*lead, -1, size).unbind(-1)
    codes = []
    for i in range(unit):
        first, shift = divmod(i * bits, 8)
        code = byte[first] >> shift
        if shift + bits > 8:
            code = code | byte[first + 1] << (8 - shift)
        codes.append(code & (2**bits - 1))
    return torch.stack(codes, -1).view(*lead, -1)[..., :count]
